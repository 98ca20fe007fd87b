"""When does an auxiliary preference model make the fitted rewards more precise? [VR] arXiv 2504.03784."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from polyref.theory.auxiliary import FITTED_PAIRS, G_QUALITIES
from polyref.theory.experiments import Experiment, Progress, _precision, _words
from polyref.theory.experiments._data import growing_wins
from polyref.theory.experiments._words import MARGIN
from polyref.theory.preferences import MISSPECIFICATIONS
from polyref.theory.replicates import map_replicates
from polyref.theory.results import Agreement, Curve, Estimate, ExperimentResult, Guide, Panel, Table

TITLE = "Variance reduction by misspecification and by quality of the auxiliary model"
PAIRS, AUXILIARY = 4000, 4
GROWING = (500, 1000, 2000, 4000, 8000, 16000)
WELL_SPECIFIED = "bradley_terry"

Shares = dict[tuple[str, str], Estimate]
"""By law of labels and quality of g."""


def run(replicates: int, seed: int, progress: Progress) -> ExperimentResult:
    """Squared error and regret of the variance-reduced fit as a share of the plain one's, by law of labels, g and n."""
    drawn = map_replicates(_replicates, replicates, seed, chunk=25, progress=progress)
    errors, regrets = (_shares(drawn, what) for what in ("error", "regret"))
    predicted = {
        (law, quality): float(drawn[f"{law} {quality} predicted"].mean() / drawn[f"{law} predicted"].mean())
        for law, quality in errors
    }
    agreement, finding = _finding(errors, regrets)
    return ExperimentResult(
        name="variance-reduction",
        title=TITLE,
        question="Given a model of the annotators, how much more precise do the fitted rewards become, and when less?",
        claim="An auxiliary model lowers error and regret where Bradley-Terry is wrong, and keeps them where it is right [VR].",
        finding=finding,
        agreement=agreement,
        panels=(_by_quality(errors), _by_size(drawn)),
        table=Table(
            ("labels", "g", "error / plain", "predicted", "regret / plain"),
            tuple((_name(key[0]), key[1], errors[key], predicted[key], regrets[key]) for key in errors),
        ),
        settings={"replicates": replicates, "seed": seed, "pairs": PAIRS, "growing": list(GROWING), "auxiliary": AUXILIARY}
        | _precision.SIZES,
        notes=(
            _hurt(errors),
            *_precision.ASSUMPTIONS,
            "predicted: the ratio of the exact asymptotic variances (polyref.theory.asymptotics), which no run enters.",
            "Under groups few fits end on the ball of rewards, where no asymptotics hold, but they make most of the error of a "
            "wrong g, which is then far above the prediction.",
            f"An interval above {1 - MARGIN:g} counts as no gain, else one below 1 as less; one below {1 + MARGIN:g} as kept.",
            f"The fitted g has seen {FITTED_PAIRS} labelled pairs a context of its own, {FITTED_PAIRS * _precision.CONTEXTS} "
            "in all, on top of those that the plain fit sees too: its comparison is not at equal labels. Other g see none.",
        ),
    )


def _replicates(generator: torch.Generator, size: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for law in MISSPECIFICATIONS:
        problem = _precision.draw_problem(law, size, generator)
        found[f"{law} predicted"] = _precision.predicted_error(problem)
        growing = growing_wins(problem.law, problem.preference, GROWING, generator)
        for pairs, wins in zip(GROWING, growing, strict=True):
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


def _shares(drawn: dict[str, Tensor], what: str) -> Shares:
    """Error or regret with each g as a share of the plain fit's."""
    return {
        (law, quality): _words.ratio_cell(drawn[f"{law} {quality} {what}"], drawn[f"{law} plain {what}"])
        for law in MISSPECIFICATIONS
        for quality in G_QUALITIES
    }


def _finding(errors: Shares, regrets: Shares) -> tuple[Agreement, str]:
    """With the true g: less of both under each wrong law, and under the right one no more than MARGIN above."""
    wrong = [law for law in MISSPECIFICATIONS if law != WELL_SPECIFIED]
    less = {what: [_words.lower(shares[law, "true"]) for law in wrong] for what, shares in (("e", errors), ("r", regrets))}
    kept = [-_words.side(shares[WELL_SPECIFIED, "true"], 1 + MARGIN) for shares in (errors, regrets)]
    agreement = _words.joint((*less["e"], *less["r"], *kept))
    gains = [_name(law) for law, sign in zip(wrong, less["e"], strict=True) if sign < 0]
    by_law = ", ".join(f"{_words.told(errors[law, 'true'])} {_name(law)}" for law in MISSPECIFICATIONS)
    return agreement, _words.finding(
        "less error and regret under every misspecification",
        f"with the true g, M = {AUXILIARY}, {PAIRS:,} pairs, error as a share of the plain one, {by_law}, so less under "
        f"{less['e'].count(1)} of {len(wrong)} misspecifications, no gain of {MARGIN:.0%} under {', '.join(gains) or 'none'}, "
        f"and less regret under {less['r'].count(1)}",
        _words.outcome(agreement),
    )


def _hurt(errors: Shares) -> str:
    """The qualities of g with which the error grows."""
    hurt = [quality for quality in list(G_QUALITIES)[1:] if any(errors[law, quality].low > 1 for law in MISSPECIFICATIONS)]
    return f"With these other g the error grows under some law: {', '.join(hurt) or 'none'}."


def _name(law: str) -> str:
    return law.replace("_", "-")


def _by_quality(shares: Shares) -> Panel:
    curves = []
    for law in MISSPECIFICATIONS:
        value, low, high = np.array([shares[law, quality] for quality in G_QUALITIES]).T
        curves.append(Curve(_name(law), range(len(G_QUALITIES)), value, low, high))
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
        curves.append(Curve.of(_name(law), GROWING, _precision.share(reduced, plain)))
    return Panel(
        f"Squared error with the true g, M = {AUXILIARY}",
        "preference pairs",
        "variance-reduced / plain",
        tuple(curves),
        (Guide(0.0, "as plain", (GROWING[0], 1.0)),),
        log_y=False,
    )


EXPERIMENT = Experiment("variance-reduction", TITLE, run, default_replicates=400, seconds=36.0)
