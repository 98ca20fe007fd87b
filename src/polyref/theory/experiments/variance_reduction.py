"""When does an auxiliary preference model make the fitted rewards more precise? [VR] arXiv 2504.03784."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from polyref.theory.auxiliary import G_QUALITIES
from polyref.theory.experiments import Experiment, Progress, _precision, _rates
from polyref.theory.preferences import MISSPECIFICATIONS
from polyref.theory.replicates import map_replicates
from polyref.theory.results import Cell, Curve, Estimate, ExperimentResult, Guide, Panel, Table

TITLE = "Variance reduction by misspecification and by quality of the auxiliary model"
PAIRS, AUXILIARY = 4000, 4
GROWING = (500, 1000, 2000, 4000, 8000, 16000)
WELL_SPECIFIED = "bradley_terry"


def run(replicates: int, seed: int, progress: Progress) -> ExperimentResult:
    """Squared error and regret of the variance-reduced fit as a share of the plain one's, by law of labels, g and n."""
    drawn = map_replicates(_replicates, replicates, seed, chunk=25, progress=progress)
    rows: list[tuple[Cell, ...]] = []
    shares: dict[tuple[str, str], Estimate] = {}
    for law in MISSPECIFICATIONS:
        for quality in G_QUALITIES:
            key = f"{law} {quality}"
            error, regret = (
                _precision.cell(_precision.share(drawn[f"{key} {what}"], drawn[f"{law} plain {what}"]))
                for what in ("error", "regret")
            )
            predicted = float(drawn[f"{key} predicted"].mean() / drawn[f"{law} predicted"].mean())
            shares[law, quality] = error
            rows.append((law.replace("_", "-"), quality, error, predicted, regret))
    wrong = [law for law in MISSPECIFICATIONS if law != WELL_SPECIFIED]
    helped = [law for law in wrong if shares[law, "true"].high < 1]
    hurt = [quality for quality in list(G_QUALITIES)[1:] if any(shares[law, quality].low > 1 for law in MISSPECIFICATIONS)]
    by_law = ", ".join(f"{_rates.told(shares[law, 'true'])} {law.replace('_', '-')}" for law in MISSPECIFICATIONS)
    return ExperimentResult(
        name="variance-reduction",
        title=TITLE,
        question="Given a model of the annotators, how much more precise do the fitted rewards become, and when less?",
        claim="An auxiliary model lowers error and regret where Bradley-Terry is wrong, and keeps them where it is right [VR].",
        finding=(
            f"Claimed: less error under every misspecification. Measured with the true g, M = {AUXILIARY}, {PAIRS:,} pairs, as "
            f"a share of the plain error: {by_law}; less under {len(helped)} of {len(wrong)} misspecifications. With these "
            f"other g the error grows under some law: {', '.join(hurt) or 'none'}."
        ),
        agreement="agrees" if len(helped) == len(wrong) else "misses the claim",
        panels=(_by_quality(shares), _by_size(drawn)),
        table=Table(("labels", "g", "error / plain", "predicted", "regret / plain"), tuple(rows)),
        settings={"replicates": replicates, "seed": seed, "pairs": PAIRS, "growing": list(GROWING), "auxiliary": AUXILIARY}
        | _precision.SIZES,
        notes=(
            *_precision.ASSUMPTIONS,
            "predicted: the ratio of the exact asymptotic variances (polyref.theory.asymptotics), which no run enters.",
        ),
    )


def _replicates(generator: torch.Generator, size: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for law in MISSPECIFICATIONS:
        problem = _precision.draw_problem(law, size, generator)
        found[f"{law} predicted"] = _precision.predicted_error(problem)
        wins, seen = torch.zeros_like(problem.law), 0
        for pairs in GROWING:
            wins, seen = wins + _precision.draw_data(problem, pairs - seen, generator), pairs
            plain = _precision.plain_errors(problem, wins)
            reduced = _precision.reduced_errors(problem, wins, problem.preference, AUXILIARY, generator)
            found[f"{law} plain at {pairs}"], found[f"{law} reduced at {pairs}"] = plain["error"], reduced["error"]
            if pairs == PAIRS:
                found |= {f"{law} plain {what}": value for what, value in plain.items()}
                found |= _by_g(law, problem, wins, generator)
    return found


def _by_g(law: str, problem: _precision.Problem, wins: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for quality, make in G_QUALITIES.items():
        g = make(problem.preference, generator)
        errors = _precision.reduced_errors(problem, wins, g, AUXILIARY, generator)
        found |= {f"{law} {quality} {what}": value for what, value in errors.items()}
        found[f"{law} {quality} predicted"] = _precision.predicted_error(problem, g, AUXILIARY)
    return found


def _by_quality(shares: dict[tuple[str, str], Estimate]) -> Panel:
    curves = []
    for law in MISSPECIFICATIONS:
        value, low, high = np.array([shares[law, quality] for quality in G_QUALITIES]).T
        curves.append(Curve(law.replace("_", "-"), range(len(G_QUALITIES)), value, low, high))
    return Panel(
        f"Squared error by quality of g, {PAIRS:,} pairs, M = {AUXILIARY}",
        "auxiliary model g",
        "variance-reduced / plain",
        tuple(curves),
        (Guide(0.0, "as plain", (0, 1.0)),),
        log_x=False,
        categories=tuple(G_QUALITIES),
    )


def _by_size(drawn: dict[str, Tensor]) -> Panel:
    curves = []
    for law in MISSPECIFICATIONS:
        reduced, plain = (torch.stack([drawn[f"{law} {fit} at {n}"] for n in GROWING]) for fit in ("reduced", "plain"))
        curves.append(Curve.of(law.replace("_", "-"), GROWING, _precision.share(reduced, plain)))
    return Panel(
        f"Squared error with the true g, M = {AUXILIARY}",
        "preference pairs",
        "variance-reduced / plain",
        tuple(curves),
        (Guide(0.0, "as plain", (GROWING[0], 1.0)),),
        log_y=False,
    )


EXPERIMENT = Experiment("variance-reduction", TITLE, run, default_replicates=400, seconds=60.0)
