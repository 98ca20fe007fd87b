"""Is the doubly robust win rate right when either of its two models is? [DR] arXiv 2506.01183."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from polyref.theory.auxiliary import distorted, doubly_robust_win_rate
from polyref.theory.bandit import random_bandit
from polyref.theory.experiments import Experiment, Progress, _words
from polyref.theory.preferences import intransitive, pair_law
from polyref.theory.regression import SlopeFit, estimates, fit_slope, mean, rms
from polyref.theory.replicates import map_replicates
from polyref.theory.results import SLOPE_TOLERANCE, Agreement, Cell, Curve, ExperimentResult, Guide, Panel, Table, agreement_of
from polyref.theory.sampling import Pairs, draw_pairs
from polyref.theory.solutions import reverse_optimum

TITLE = "The doubly robust win rate with either model right, or neither"
SIZES: Final = tuple(250 * 4**k for k in range(5))
CONTEXTS, ACTIONS, REFERENCES, BETA = 5, 5, 3, 0.5
CASES: Final = {
    "g and mu right": (True, True),
    "only g right": (True, False),
    "only mu right": (False, True),
    "neither right": (False, False),
}
ESTIMATORS: Final = ("doubly robust", "direct", "importance")


def run(replicates: int, seed: int, progress: Progress) -> ExperimentResult:
    """Bias and root mean square error of three estimates of P(pi beats mu), by which of g and mu is right."""
    drawn = map_replicates(_replicates, replicates, seed, chunk=25, progress=progress)
    errors = {name: torch.stack([drawn[f"{name} {n}"] for n in SIZES]) for name in _names()}
    fits = {name: fit_slope(SIZES, values, rms, name=name, claimed=-0.5) for name, values in errors.items()}
    robust = {case: fits[f"doubly robust, {case}"] for case in CASES}
    agreement = _agreement(robust)
    return ExperimentResult(
        name="doubly-robust",
        title=TITLE,
        question="Which model may be wrong before the estimated win rate of a policy is?",
        claim="The doubly robust estimate is consistent, with error 1/sqrt(n), if g or mu is right [DR].",
        finding=_words.finding(
            "slope -0.5 of the root mean square error if g or mu is right",
            ", ".join(f"{_words.shown(fit)} with {case}" for case, fit in robust.items()),
            _words.outcome(agreement),
        ),
        agreement=agreement,
        panels=tuple(_panel(estimator, errors) for estimator in ESTIMATORS),
        table=_table(errors, fits),
        slopes=tuple(fits.values()),
        settings={
            "replicates": replicates,
            "seed": seed,
            "pairs": list(SIZES),
            "contexts": CONTEXTS,
            "actions": ACTIONS,
            "references": REFERENCES,
            "beta": BETA,
        },
        notes=(
            "Every replicate is a problem of its own, with intransitive preferences; pairs are independent draws from mu, the "
            "mixture of the references, and the policy is the regularised optimum of the rewards.",
            "A wrong g has half the log-odds and a taste of its own; a wrong mu is mu at half its log-probabilities.",
            f"As claimed: with either right, the slope's interval comes within {SLOPE_TOLERANCE:g} of -0.5 and stays short of "
            "0 and -1, or lies below; with neither it lies above, without which the first would tell little.",
            "Ratios are not clipped. The direct estimate does not see mu, nor importance weighting g: two cases each.",
        ),
    )


def _agreement(robust: Mapping[str, SlopeFit]) -> Agreement:
    """With either model right a slope of -0.5 or steeper; with neither a flatter one, or the contrast is missing."""
    right = {agreement_of(fit) for case, fit in robust.items() if any(CASES[case])}
    if "misses the claim" in right:
        return "misses the claim"
    contrast = agreement_of(robust["neither right"]) == "misses the claim"
    return "agrees" if contrast and "undecided" not in right else "undecided"


def _panel(estimator: str, errors: Mapping[str, Tensor]) -> Panel:
    seen = {case: errors[f"{estimator}, {case}"] for case in CASES if f"{estimator}, {case}" in errors}
    curves = tuple(Curve.of(case, SIZES, estimates(values, rms)) for case, values in seen.items())
    guides = (Guide(-0.5, "claimed: 1/√n"),)
    return Panel(f"Root mean square error, {estimator}", "preference pairs", "error of the win rate", curves, guides)


def _table(errors: Mapping[str, Tensor], fits: Mapping[str, SlopeFit]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for name, values in errors.items():
        bias, size = _words.cells(estimates(values, mean)), _words.cells(estimates(values, rms))
        rows.append((name, bias[0], bias[-1], size[-1], _words.shown(fits[name])))
    first, last = f"{SIZES[0]:,}", f"{SIZES[-1]:,}"
    return Table(("estimate", f"bias, {first} pairs", f"bias, {last}", f"RMS error, {last}", "slope of RMS error"), tuple(rows))


def _names() -> list[str]:
    """Each estimator in the cases that it can tell apart."""
    direct = [f"direct, {case}" for case in ("only g right", "neither right")]
    importance = [f"importance, {case}" for case in ("only mu right", "neither right")]
    return [*(f"doubly robust, {case}" for case in CASES), *direct, *importance]


def _replicates(generator: torch.Generator, size: int) -> dict[str, Tensor]:
    bandit = random_bandit(
        generator, replicates=(size,), contexts=CONTEXTS, actions=ACTIONS, references=REFERENCES, beta=BETA, reward_range=2.0
    )
    mu, policy = bandit.mixture, reverse_optimum(bandit)
    preference = intransitive(bandit.rewards, 2.0, generator)
    beliefs = {True: preference, False: distorted(preference, generator, scale=0.5, bias=1.0)}
    laws = {True: mu, False: (mu / 2).log_softmax(-1)}
    law = pair_law(bandit.contexts, mu, distinct=False)
    truth = bandit.mean(torch.einsum("rxi,rxj,rxij->rx", policy.exp(), mu.exp(), preference))
    data = draw_pairs(law, preference, SIZES[-1], size, generator)
    found = {}
    for n in SIZES:
        seen = Pairs(*(part[:, :n] for part in data))
        for case, (g_right, mu_right) in CASES.items():
            rates = doubly_robust_win_rate(seen, beliefs[g_right], policy, laws[mu_right])
            for estimator, rate in zip(ESTIMATORS, rates, strict=True):
                found[f"{estimator}, {case} {n}"] = rate - truth
    return found


EXPERIMENT = Experiment("doubly-robust", TITLE, run, default_replicates=300, seconds=9.0)
