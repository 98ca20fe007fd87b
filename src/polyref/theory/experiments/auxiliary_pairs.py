"""How many auxiliary pairs does variance reduction need? [VR] arXiv 2504.03784, and theory of control variates."""

from __future__ import annotations

import torch
from torch import Tensor

from polyref.objectives.variance_reduced import optimal_control
from polyref.theory.experiments import Experiment, Progress, _precision, _words
from polyref.theory.regression import Estimates
from polyref.theory.replicates import map_replicates
from polyref.theory.results import Agreement, Curve, Estimate, ExperimentResult, Guide, Panel, Table

TITLE = "Variance reduction by number of auxiliary pairs, with and without the control coefficient"
LAW, PAIRS, AUXILIARY = "intransitive", 4000, (1, 2, 4, 8, 16, 32)
KINDS = {"c = 1": lambda m: 1.0, "c = M/(M+1)": optimal_control}


def run(replicates: int, seed: int, progress: Progress) -> ExperimentResult:
    """Squared error with the true g as a share of the plain fit's, against M."""
    drawn = map_replicates(_replicates, replicates, seed, chunk=25, progress=progress)
    plain, limit = drawn["plain"][None], float(drawn["inf"].mean() / drawn["predicted"].mean())
    shares = {
        kind: _precision.share(torch.stack([drawn[f"{kind} {m}"] for m in AUXILIARY]), plain.expand(len(AUXILIARY), -1))
        for kind in KINDS
    }
    cells = {kind: _words.cells(found) for kind, found in shares.items()}
    predicted = {
        kind: [float(drawn[f"{kind} {m} predicted"].mean() / drawn["predicted"].mean()) for m in AUXILIARY] for kind in KINDS
    }
    columns = [column for kind in KINDS for column in (cells[kind], predicted[kind])]
    (one, _, four, *_), halved = cells["c = 1"], cells["c = M/(M+1)"][0]
    agreement = _agreement(one, halved, four)
    return ExperimentResult(
        name="auxiliary-pairs",
        title=TITLE,
        question="How many auxiliary pairs a data pair are worth drawing?",
        claim="At M = 1 nothing is gained, and with c = M/(M+1) something is; the gain tends to that of the exact law as 1/M.",
        finding=_words.finding(
            "no gain at M = 1 without the control coefficient",
            f"with the true g on {LAW} labels, error {_words.told(one)} of plain at M = 1, {_words.told(halved)} there with "
            f"c = 1/2, {_words.told(four)} at M = 4, and {limit:.2f} predicted in the limit",
            _words.outcome(agreement),
        ),
        agreement=agreement,
        panels=(_panel(shares, limit),),
        table=Table(
            ("M", *(name for kind in KINDS for name in (f"error / plain, {kind}", "predicted"))),
            tuple(zip(AUXILIARY, *columns, strict=True)),
        ),
        settings={"replicates": replicates, "seed": seed, "pairs": PAIRS, "auxiliary": list(AUXILIARY), "labels": LAW}
        | _precision.SIZES,
        notes=(
            *_precision.ASSUMPTIONS,
            "predicted: the ratio of the exact asymptotic variances (polyref.theory.asymptotics), which no run enters.",
        ),
    )


def _replicates(generator: torch.Generator, size: int) -> dict[str, Tensor]:
    problem = _precision.draw_problem(LAW, size, generator)
    wins, g = _precision.draw_data(problem, PAIRS, generator), problem.preference
    found = {
        "plain": _precision.plain_errors(problem, wins)["error"],
        "predicted": _precision.predicted_error(problem),
        "inf": _precision.predicted_error(problem, g),
    }
    for kind, control in KINDS.items():
        for m in AUXILIARY:
            found[f"{kind} {m}"] = _precision.reduced_errors(problem, wins, g, m, generator, control(m))["error"]
            found[f"{kind} {m} predicted"] = _precision.predicted_error(problem, g, m, control(m))
    return found


def _agreement(one: Estimate, halved: Estimate, four: Estimate) -> Agreement:
    """At M = 1 nothing gained, beside the gain at M = 4; and a gain with c = 1/2 and at M = 4."""
    nothing = -1 if one.high < 1 else int(one.low > four.high)
    return _words.joint((nothing, _words.lower(halved), _words.lower(four)))


def _panel(shares: dict[str, Estimates], limit: float) -> Panel:
    return Panel(
        f"Squared error with the true g, {LAW} labels, {PAIRS:,} pairs",
        "auxiliary pairs a data pair, M",
        "variance-reduced / plain",
        tuple(Curve.of(kind, AUXILIARY, found) for kind, found in shares.items()),
        (Guide(0.0, "as plain", (AUXILIARY[0], 1.0)), Guide(0.0, "predicted limit, exact law", (AUXILIARY[0], limit))),
        log_y=False,
    )


EXPERIMENT = Experiment("auxiliary-pairs", TITLE, run, default_replicates=400, seconds=20.0)
