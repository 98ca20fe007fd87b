"""What is reported about pairs: agreement with the labels, and an interval that respects prompts shared by several pairs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from polyref.errors import ConfigError, DataError

_DRAWS_AT_ONCE = 1 << 22


class Interval(NamedTuple):
    """A mean and its confidence interval, in the units of the values."""

    mean: float
    low: float
    high: float


def preference_accuracy(h: Tensor, *, chosen_probability: Tensor | float | None = None) -> Tensor:
    """The probability that the label of a pair agrees with the sign of h: one value in [0, 1] per pair, h (...) to (...).

    1 where h > 0, 0 where h < 0, 1/2 where h = 0 (a policy that is its anchor scores chance, not 0), NaN where h is NaN; at a
    soft label p these are p, 1-p and 1/2, so that the best attainable value of a pair is max(p, 1-p).
    """
    p = torch.as_tensor(1.0 if chosen_probability is None else chosen_probability, dtype=h.dtype, device=h.device)
    return torch.where(h.isnan(), h, 0.5 + (p - 0.5) * h.sign())


def mean_interval(
    values: ArrayLike,
    clusters: Sequence[Hashable] | NDArray[np.generic] | None = None,
    *,
    level: float = 0.95,
    seed: int,
    resamples: int = 4000,
) -> Interval:
    """The mean of `values` (N,) and its percentile bootstrap interval, resampling whole clusters.

    `clusters` (N,) names the cluster of each value, usually its prompt: pairs of one prompt are not independent, and resampling
    them one by one gives intervals that are too short. None: every value is its own cluster. A resample draws C of the C
    clusters with replacement and takes the mean over all their values. One cluster alone tells nothing of the spread: its low
    and high are NaN. Equal values give a width of zero, which is no certainty. The same seed gives the same interval. Raises
    DataError for values that are empty or not finite, or clusters of another length, ConfigError for `level` outside (0, 1).
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise DataError(f"values of shape {array.shape} are empty, not a vector, or not finite", where="mean_interval")
    if not 0 < level < 1:
        raise ConfigError(f"level is {level}", where="mean_interval", fix="give a value between 0 and 1, such as 0.95")
    sums, sizes = _cluster_totals(array, clusters)
    mean = float(array.mean())
    if sums.size == 1:
        return Interval(mean, float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // sums.size)
    means = []
    for start in range(0, resamples, rows):
        draws = generator.integers(sums.size, size=(min(rows, resamples - start), sums.size))
        means.append(sums[draws].sum(1) / sizes[draws].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def _cluster_totals(
    values: NDArray[np.float64], clusters: Sequence[Hashable] | NDArray[np.generic] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The sum and the number of values in each cluster, clusters in order of appearance."""
    if clusters is None:
        return values, np.ones_like(values)
    if len(clusters) != values.size:
        raise DataError(f"{len(clusters)} cluster names for {values.size} values", where="mean_interval")
    numbers: dict[Hashable, int] = {}
    member = np.array([numbers.setdefault(name, len(numbers)) for name in clusters])
    return np.bincount(member, weights=values).astype(np.float64), np.bincount(member).astype(np.float64)
