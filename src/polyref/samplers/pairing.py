"""Pairings: which two of a prompt's scored completions make a preference pair.

A pairing gives every pair that could be a key; the smallest keys are taken first. `polyref.samplers.pairs` turns them into
records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from polyref.errors import ConfigError

Floats = NDArray[np.float64]


class Candidates(NamedTuple):
    """C pairs that could be: indices of the better and of the worse completion (C,), rewards (n,), stds (n,) or None.

    `apart` (C,) says how far the two are from each other, None where nothing does.
    """

    better: NDArray[np.intp]
    worse: NDArray[np.intp]
    rewards: Floats
    stds: Floats | None
    apart: Floats | None = None

    @property
    def margins(self) -> Floats:
        """Reward of the better less that of the worse, (C,), at least 0."""
        return self.rewards[self.better] - self.rewards[self.worse]

    def with_best(self, keys: Floats) -> Floats:
        """`keys` where the better is the best of all candidates (of equals the first), elsewhere infinity."""
        best = self.better[np.lexsort((self.better, -self.rewards[self.better]))[0]]
        return np.where(self.better == best, keys, math.inf)


Pairing = Callable[[Candidates, np.random.Generator], Floats]
"""Keys (C,) of the candidates: the smallest are taken first, infinity never."""


def best_worst(candidates: Candidates, stream: np.random.Generator) -> Floats:
    """The largest margin."""
    return -candidates.margins


def best_random(candidates: Candidates, stream: np.random.Generator) -> Floats:
    """The best, and any other."""
    return candidates.with_best(stream.random(len(candidates.better)))


def best_second(candidates: Candidates, stream: np.random.Generator) -> Floats:
    """The best, and the one next to it."""
    return candidates.with_best(candidates.margins)


def uniform(candidates: Candidates, stream: np.random.Generator) -> Floats:
    """Any two."""
    return stream.random(len(candidates.better))


def closest(candidates: Candidates, stream: np.random.Generator) -> Floats:
    """The least margin."""
    return candidates.margins


def uncertain(candidates: Candidates, stream: np.random.Generator) -> Floats:
    """Any two, with probability in proportion to the variance of their reward difference, the errors of the two independent.

    ConfigError without standard deviations. A pair without variance is never taken.
    """
    if candidates.stds is None:
        raise ConfigError("the pairing 'uncertain' needs a standard deviation a completion", fix="give stds, or choose another")
    scale = candidates.stds.max() or 1.0
    variances = ((candidates.stds / scale) ** 2)[np.stack([candidates.better, candidates.worse])].sum(0)
    # exponential waiting times: the order in which they end is that of draws without replacement (Efraimidis, Spirakis)
    waits = stream.exponential(size=len(variances))
    return np.divide(waits, variances, out=np.full(len(variances), math.inf), where=variances > 0)


def farthest(candidates: Candidates, stream: np.random.Generator) -> Floats:
    """The two that are farthest apart, as by |phi difference|_{S^-1} of features [IT]. ConfigError without distances."""
    if candidates.apart is None:
        raise ConfigError("the pairing 'farthest' needs how far completions are apart", fix="give apart, or choose another")
    return -candidates.apart


PAIRINGS: Final[Mapping[str, Pairing]] = {
    "best_worst": best_worst,
    "best_random": best_random,
    "best_second": best_second,
    "random": uniform,
    "closest": closest,
    "uncertain": uncertain,
}
"""Pairings by the name that settings know them by."""
