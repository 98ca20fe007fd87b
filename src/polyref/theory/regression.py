"""Rates from replicates: statistics with bootstrap intervals, and weighted straight lines through log-log points.

`values` (P, R) holds R replicates at each of P sizes. Replicates are SHARED when column r is one run seen at every size (one
problem, growing data), so that whole columns are resampled; INDEPENDENT when every entry is a run of its own. Quantities that
may be negative (differences of unregularised values) have no logarithm: fit their `rms` or a `quantile` of their size, and
show the mean; a mean whose interval holds zero gets a slope of NaN and a note. All arrays are numpy float64; tensors are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from polyref.errors import ConfigError

Array = NDArray[np.float64]
Numbers = Sequence[float] | NDArray[Any] | Tensor

RESAMPLES = 400
LEVEL = 0.95
_AT_ONCE = 4_000_000  # resampled numbers held in memory at once


@dataclass(frozen=True, slots=True)
class Statistic:
    """What is made of the replicates at one size: `function` takes values (..., R) to (...); `name` is how it is shown."""

    name: str
    function: Callable[[Array], Array]


mean = Statistic("mean", lambda values: values.mean(-1))
rms = Statistic("rms", lambda values: np.sqrt((values**2).mean(-1)))


def quantile(level: float) -> Statistic:
    """The `level` quantile, as in quantile(0.9). ConfigError unless 0 < level < 1."""
    if not 0 < level < 1:
        raise ConfigError(f"quantile level is {level}", fix="give a value between 0 and 1, as in 0.9")
    return Statistic(f"q{100 * level:g}", lambda values: np.quantile(values, level, axis=-1))


@dataclass(frozen=True, slots=True)
class Estimates:
    """A statistic at each of P sizes with the ends of its interval; every field (P,)."""

    value: Array
    low: Array
    high: Array


@dataclass(frozen=True, slots=True)
class SlopeFit:
    """log(statistic) = intercept + slope log(x) over the points `used`, `low` and `high` the 95% interval of the slope.

    `claimed` is the slope that a paper states, where one does. `used` holds the x of the points that the fit saw. `note` says
    what a reader has to know: points dropped, a sign turned, why there is no slope (which is then NaN).
    """

    name: str
    statistic: str
    slope: float
    low: float
    high: float
    intercept: float
    used: tuple[float, ...]
    claimed: float | None = None
    note: str = ""


def estimates(
    values: Numbers, statistic: Statistic = mean, *, shared: bool = True, resamples: int = RESAMPLES, seed: int = 0
) -> Estimates:
    """`statistic` over the replicates of `values` (P, R) or (R,), with percentile bootstrap intervals at 95%: fields (P,)."""
    array = _checked(values)
    low, high = _percentiles(_resampled(array, statistic, shared, resamples, seed))
    return Estimates(statistic.function(array), low, high)


def ratio(
    numerator: Numbers,
    denominator: Numbers,
    statistic: Statistic = mean,
    *,
    paired: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimates:
    """statistic(numerator) / statistic(denominator) at each size, both (P, R) or (R,): fields (P,), intervals at 95%.

    `paired` replicates (one run measured both) are resampled together; others, which may differ in number, apart.
    """
    above, below = _checked(numerator), _checked(denominator)
    if above.shape[0] != below.shape[0] or (paired and above.shape != below.shape):
        raise ConfigError(f"replicates of shapes {above.shape} and {below.shape} have no ratio", fix="give one row a size")
    drawn = _resampled(above, statistic, True, resamples, seed)
    drawn = drawn / _resampled(below, statistic, True, resamples, seed if paired else seed + 1)
    low, high = _percentiles(drawn)
    return Estimates(statistic.function(above) / statistic.function(below), low, high)


def fit_slope(
    x: Numbers,
    values: Numbers,
    statistic: Statistic = mean,
    *,
    name: str = "",
    claimed: float | None = None,
    drop: int | None = 0,
    shared: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> SlopeFit:
    """Weighted least squares of log(statistic) on log(x), x (P,) > 0, `values` (P, R), with a 95% bootstrap interval.

    Each point weighs the inverse of the bootstrap variance of its logarithm; the interval is of percentiles over `resamples`
    refits with those weights. `drop` leaves out so many of the first points, those before the asymptotic knee; None chooses:
    the first point goes, as long as three remain, while it lies significantly off the line of those after it. Each refit
    chooses anew, so that the interval counts the choice (and no bend that is too small to be seen). A statistic that
    is negative at every size is fitted by its size, with a note. Raises ConfigError for sizes that are not positive or do not
    match, fewer than two points or replicates, and values that are not finite.
    """
    sizes, array = np.asarray(x, dtype=np.float64), _checked(values)
    if sizes.shape != array.shape[:1] or not (np.isfinite(sizes) & (sizes > 0)).all() or len(np.unique(sizes)) < len(sizes):
        raise ConfigError(f"sizes {sizes.tolist()} for values {array.shape}", fix="give one positive, distinct size a row")
    points = statistic.function(array)
    drawn = _resampled(array, statistic, shared, resamples, seed)
    first = 0 if drop is None else drop
    if not 0 <= first <= len(sizes) - 2:
        raise ConfigError(f"drop is {drop} of {len(sizes)} points", fix="leave at least two points to a line")
    sizes, points, drawn = sizes[first:], points[first:], drawn[first:]
    sign, trouble = _sign(points, *_percentiles(drawn))
    if trouble:
        return SlopeFit(name, statistic.name, np.nan, np.nan, np.nan, np.nan, tuple(sizes.tolist()), claimed, trouble)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs, log_drawn = np.log(sign * points), np.log(sign * drawn)
    log_drawn[~np.isfinite(log_drawn)] = np.nan
    weights = _weights(np.nanvar(log_drawn, axis=1))
    knee, knees = _knees(np.log(sizes), logs, log_drawn, weights, 0 if drop is not None else max(len(sizes) - 3, 0))
    slopes = np.empty(len(knees))
    for start in {knee, *knees.tolist()}:
        slopes[knees == start] = (_least_squares(np.log(sizes[start:]), weights[start:]) @ log_drawn[start:, knees == start])[1]
    intercept, slope = _least_squares(np.log(sizes[knee:]), weights[knee:]) @ logs[knee:]
    low, high = np.nanquantile(slopes, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    dropped = first + knee
    notes = [f"first {dropped} left out"] * bool(dropped) + ["of minus the statistic"] * (sign < 0)
    used = tuple(sizes[knee:].tolist())
    return SlopeFit(
        name, statistic.name, float(slope), float(low), float(high), float(intercept), used, claimed, "; ".join(notes)
    )


def _checked(values: Numbers) -> Array:
    """`values` as (P, R), finite, of at least two replicates."""
    array = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if array.ndim != 2 or array.shape[1] < 2:
        raise ConfigError(f"replicates of shape {array.shape}", fix="give (sizes, replicates) with at least two replicates")
    if not np.isfinite(array).all():
        row, column = np.argwhere(~np.isfinite(array))[0]
        raise ConfigError(f"value {array[row, column]} of replicate {column} at size {row}", fix="give finite values")
    return array


def _resampled(values: Array, statistic: Statistic, shared: bool, resamples: int, seed: int) -> Array:
    """`statistic` of `resamples` draws of the replicates with replacement: (P, resamples)."""
    generator = np.random.default_rng(seed)
    size = values.shape[1]
    parts = []
    for some in _chunks(resamples, max(1, _AT_ONCE // values.size)):
        if shared:
            drawn = values[:, generator.integers(size, size=(some, size))]
        else:
            drawn = np.stack([row[generator.integers(size, size=(some, size))] for row in values])
        parts.append(statistic.function(drawn))
    return np.concatenate(parts, axis=1)


def _chunks(total: int, at_once: int) -> Iterator[int]:
    for start in range(0, total, at_once):
        yield min(at_once, total - start)


def _percentiles(drawn: Array) -> tuple[Array, Array]:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    return low, high


def _sign(points: Array, low: Array, high: Array) -> tuple[int, str]:
    """The one sign that all points have beyond doubt, or why there is none."""
    if (low > 0).all() or ((points > 0) & (low >= 0)).all():
        return 1, ""
    if (high < 0).all():
        return -1, ""
    if ((low <= 0) & (high >= 0)).any():
        return 0, "no slope: an interval holds zero"
    return 0, "no slope: the sign changes with the size"


def _weights(variances: Array) -> Array:
    """Inverse variances; a point without spread weighs as much as the surest of the others."""
    positive = variances[variances > 0]
    return 1 / np.maximum(variances, positive.min() if len(positive) else 1.0)


def _least_squares(x: Array, weights: Array) -> Array:
    """The matrix (2, P) that takes values to intercept and slope of their weighted line in x."""
    powers = np.stack([np.ones_like(x), x], axis=1)
    weighted = powers * weights[:, None]
    return np.asarray(np.linalg.solve(weighted.T @ powers, weighted.T))


def _knees(x: Array, logs: Array, log_drawn: Array, weights: Array, most: int) -> tuple[int, NDArray[np.intp]]:
    """How many first points to leave out, at most `most`: until the first lies on the line of the others (95% interval).

    And the same (B,) in each resample, whose own interval is that of the data moved by as much as its point is.
    """
    chosen, each = most, np.full(log_drawn.shape[1], most)
    for first in reversed(range(most)):
        others = slice(first + 1, None)
        line = _least_squares(x[others], weights[others])
        here, drawn = (points[first] - np.array([1.0, x[first]]) @ line @ points[others] for points in (logs, log_drawn))
        low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        chosen = first if low <= 0 <= high else chosen
        each[(low <= here - drawn) & (here - drawn <= high)] = first
    return chosen, each
