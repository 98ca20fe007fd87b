"""What the experiments on learning share: random linear problems, and words for comparisons of gaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from polyref.theory.bandit import FiniteBandit, random_bandit
from polyref.theory.regression import estimates
from polyref.theory.results import Curve
from polyref.theory.solutions import reverse_optimum

CONTEXTS, ACTIONS, REFERENCES, DIMENSION, BETA, REWARD_RANGE, SPREAD = 4, 8, 3, 6, 0.1, 2.0, 2.0
RADIUS: Final = 2 * REWARD_RANGE
"""Of the ball of theta, whose true norm is REWARD_RANGE."""

SCALE: Final = 3.0
"""c of bonus and enhancer: near the sqrt(d/s') of 5 at d = 6 and s' = 0.2, and picked after runs at 0.3, 1, 3 and 10."""

ASSUMPTIONS: Final = (
    f"Every replicate is a problem of its own: {CONTEXTS} contexts, {ACTIONS} actions, {REFERENCES} references "
    f"softmax({SPREAD:g} normal) with equal weights, {DIMENSION} features uniform in the unit ball, theta of norm "
    f"{REWARD_RANGE:g}, beta {BETA:g}, Bradley-Terry labels.",
    f"theta by maximum likelihood in a ball of radius {RADIUS:g}, twice its true norm; gaps are of the regularised objective.",
    f"Chosen after trial runs, not beforehand: c = {SCALE:g} among 0.3, 1, 3 and 10, and beta, reward range and spread of the "
    "references among three sets of values. Intervals are of the runs shown, and do not count that choice.",
)


def problems(generator: torch.Generator, size: int) -> FiniteBandit:
    """`size` random problems."""
    return random_bandit(
        generator,
        replicates=(size,),
        contexts=CONTEXTS,
        actions=ACTIONS,
        references=REFERENCES,
        beta=BETA,
        features=DIMENSION,
        reward_range=REWARD_RANGE,
        spread=SPREAD,
    )


def around_the_optimum(bandit: FiniteBandit) -> Tensor:
    """A data law that covers the optimum and little else, log mu (R, X, Y): the cube of half the optimum, half the anchor."""
    return (3 * torch.logaddexp(reverse_optimum(bandit), bandit.geometric)).log_softmax(-1)


def few_actions(generator: torch.Generator, size: int) -> Tensor:
    """A data law of bad coverage, log mu (R, X, Y) = softmax(6 normal): in each context one or two actions at random."""
    return (6 * torch.randn(size, CONTEXTS, ACTIONS, generator=generator, dtype=torch.float64)).log_softmax(-1)


def curve(name: str, x: Sequence[float], values: Tensor) -> Curve:
    """The mean of `values` (P, R) with its interval."""
    return Curve.of(name, x, estimates(values))


def settings(replicates: int, seed: int, **more: Any) -> dict[str, Any]:
    """What an ExperimentResult records."""
    own = {"contexts": CONTEXTS, "actions": ACTIONS, "references": REFERENCES, "features": DIMENSION, "beta": BETA}
    return {"replicates": replicates, "seed": seed, **own, "reward_range": REWARD_RANGE, "radius": RADIUS, **more}
