"""What the experiments on rates share: one random problem a replicate, growing data, and maximum-likelihood rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from polyref.theory.bandit import FiniteBandit, random_bandit
from polyref.theory.estimators import fit_tabular
from polyref.theory.experiments import Progress
from polyref.theory.experiments._data import growing_wins
from polyref.theory.experiments._words import cells
from polyref.theory.planner import measured_constants
from polyref.theory.preferences import bradley_terry, pair_law
from polyref.theory.regression import SlopeFit, estimates, fit_slope, mean, quantile
from polyref.theory.replicates import map_replicates
from polyref.theory.results import Curve, Measured, Table

SIZES: Final = tuple(500 * 2**k for k in range(9))
"""Pairs: 500 to 128,000."""

CONTEXTS, ACTIONS, REFERENCES, BETA, REWARD_RANGE = 5, 5, 3, 0.5, 2.0
RADIUS: Final = 5.0
"""Of the ball of rewards a context, centred: it holds every true one, whose norm is at most sqrt(Y)/2 reward ranges = 2.2."""

DIMENSION: Final = CONTEXTS * (ACTIONS - 1)
ASSUMPTIONS: Final = (
    f"Every replicate is a problem of its own: {CONTEXTS} contexts, {ACTIONS} actions, {REFERENCES} references "
    f"softmax(normal) with equal weights, rewards uniform on [0, {REWARD_RANGE:g}], beta {BETA:g}; "
    "Bradley-Terry labels of distinct pairs drawn from the mixture of the references; nested data sets.",
    f"Rewards by maximum likelihood, tabular, in a ball of radius {RADIUS:g} a context that holds the truth.",
)

Measure = Callable[[Tensor, FiniteBandit], Tensor]
"""(estimated rewards (R, X, Y), problems) -> one value a replicate (R,)."""


class Rates(NamedTuple):
    """A quantity over the replicates at every size, and one of each problem that does not depend on the data."""

    values: Tensor
    """(P, R)."""
    constants: Tensor
    """(R,)."""


def problems(generator: torch.Generator, size: int) -> FiniteBandit:
    """`size` random problems."""
    return random_bandit(
        generator,
        replicates=(size,),
        contexts=CONTEXTS,
        actions=ACTIONS,
        references=REFERENCES,
        beta=BETA,
        reward_range=REWARD_RANGE,
    )


def measure_over_sizes(
    measure: Measure, constant: Callable[[FiniteBandit], Tensor], replicates: int, seed: int, progress: Progress
) -> Rates:
    """`measure` of the rewards estimated from each of SIZES pairs, and `constant` of each problem."""

    def run(generator: torch.Generator, size: int) -> dict[str, Tensor]:
        bandit = problems(generator, size)
        law, preference = pair_law(bandit.contexts, bandit.mixture), bradley_terry(bandit.rewards)
        values = [measure(fit_tabular(wins, radius=RADIUS), bandit) for wins in growing_wins(law, preference, SIZES, generator)]
        return {"values": torch.stack(values, -1), "constants": constant(bandit).expand(size)}

    drawn = map_replicates(run, replicates, seed, chunk=50, progress=progress)
    return Rates(drawn["values"].T, drawn["constants"])


class GapFits(NamedTuple):
    """A non-negative gap at every size: its mean and 90% quantile as curves and table, and the slope of each."""

    curves: tuple[Curve, Curve]
    table: Table
    mean: SlopeFit
    upper: SlopeFit


def fit_gaps(name: str, gaps: Tensor, claimed: float) -> GapFits:
    """`gaps` (P, R) at SIZES, against the slope `claimed`, beyond the asymptotic knee."""
    statistics = (mean, quantile(0.9))
    average, upper = (estimates(gaps, statistic) for statistic in statistics)
    slopes = [fit_slope(SIZES, gaps, statistic, name=name, claimed=claimed, drop=None) for statistic in statistics]
    rows = zip(SIZES, cells(average), cells(upper), strict=True)
    return GapFits(
        (Curve.of("mean", SIZES, average), Curve.of("90% quantile", SIZES, upper)),
        Table(("pairs", "mean gap", "90% quantile"), tuple(rows)),
        *slopes,
    )


def constants(name: str, gaps: Tensor, coverages: Tensor, seed: int) -> tuple[Measured, ...]:
    """What the planner may use: the constants of `gaps` (P, R) at the largest size, `coverages` (R,) those of the optimum."""
    return measured_constants(name, gaps[-1], pairs=SIZES[-1], beta=BETA, dimension=DIMENSION, coverage=coverages, seed=seed)


def settings(replicates: int, seed: int) -> dict[str, Any]:
    """What an ExperimentResult records."""
    return {
        "replicates": replicates,
        "seed": seed,
        "pairs": list(SIZES),
        "contexts": CONTEXTS,
        "actions": ACTIONS,
        "references": REFERENCES,
        "beta": BETA,
        "reward_range": REWARD_RANGE,
        "radius": RADIUS,
    }
