"""How far a reward difference h can be read as a probability: s(h) that the first completion is preferred.

A model ranks well and is still over-confident when its rewards are too far apart. One temperature T mends that without changing
a single ranking: s(h/T). Source: Guo et al., arXiv 1706.04599.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import brentq
from torch import Tensor

from polyref.errors import ConfigError, DataError
from polyref.objectives.metrics import Interval, mean_interval, preference_accuracy
from polyref.objectives.pairwise import sigmoid


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Pairs of which the model is about equally sure.

    `confidence`: mean of max(s(h), 1 - s(h)), in [1/2, 1]; `accuracy`: share of them ranked as labelled, with its interval;
    `count`: how many pairs.
    """

    confidence: float
    accuracy: Interval
    count: int


def fit_temperature(h: Tensor, chosen_probability: Tensor) -> float | None:
    """The T > 0 of the least mean -p log s(h/T) - (1-p) log s(-h/T): h (N,) in reward units, p (N,) in [0, 1].

    The mean is convex in 1/T, so its derivative has at most one root. None where it has none: at T = infinity for an h that
    ranks no better than chance, at T = 0 for one that ranks every pair as its label says with certainty; and where T is nearer
    to either than a float can be. DataError for no pairs or numbers that are not finite.
    """
    h, p = _checked(h, chosen_probability)
    unit = float(h.abs().max())  # in this unit neither h nor the sums below overflow or vanish
    h = h / unit if unit else h

    def slope(inverse: float) -> float:
        x = inverse * h
        return float((h * ((1 - p) * torch.sigmoid(x) - p * torch.sigmoid(-x))).mean())

    if slope(0.0) >= 0 or not (h * (p - (h > 0).to(h))).abs().max() > 0:
        return None
    high = 1.0
    while slope(high) < 0:
        high *= 2
        if not math.isfinite(high):
            return None
    while slope(high / 2) >= 0:
        high /= 2
    temperature = unit / brentq(slope, high / 2, high, xtol=1e-14 * high)
    return temperature if 0 < temperature < math.inf else None


def negative_log_likelihood(h: Tensor, chosen_probability: Tensor) -> float:
    """Mean -p log s(h) - (1-p) log s(-h), in nats; log 2 for an h of zeros."""
    h, p = _checked(h, chosen_probability)
    return float(sigmoid(h, chosen_probability=p).mean())


def reliability(
    h: Tensor, chosen_probability: Tensor, clusters: Sequence[Hashable] | None = None, *, bins: int = 10, seed: int
) -> list[ReliabilityBin]:
    """Accuracy against confidence in `bins` equal parts of [1/2, 1], empty ones left out: h, p (N,).

    A pair in its other order says nothing new, so that confidence is folded onto [1/2, 1]. At a soft label p a pair counts as
    ranked right with probability p. Intervals (95%) are from a bootstrap over `clusters` (N,), usually prompts; NaN in a bin of
    one cluster.
    """
    if bins < 1:
        raise ConfigError(f"bins is {bins}", fix="give at least 1")
    h, p = _checked(h, chosen_probability)
    confidence = torch.sigmoid(h.abs())
    number = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    correct = preference_accuracy(h, chosen_probability=p)
    found = []
    for each in range(bins):
        rows = (number == each).nonzero()[:, 0].tolist()
        if rows:
            names = None if clusters is None else [clusters[row] for row in rows]
            interval = mean_interval(correct[rows].numpy(), names, seed=seed)
            found.append(ReliabilityBin(float(confidence[rows].mean()), interval, len(rows)))
    return found


def calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Expected calibration error: mean over pairs of |accuracy - confidence| of their bin, in [0, 1]."""
    pairs = sum(each.count for each in bins)
    return sum(each.count * abs(each.accuracy.mean - each.confidence) for each in bins) / pairs


def _checked(h: Tensor, chosen_probability: Tensor) -> tuple[Tensor, Tensor]:
    h, p = h.detach().cpu().double(), chosen_probability.detach().cpu().double()
    if h.dim() != 1 or h.shape != p.shape or not len(h) or not bool(h.isfinite().all()):
        what = f"reward differences of shape {tuple(h.shape)} for labels of shape {tuple(p.shape)}"
        raise DataError(f"{what} are empty, unequal or not finite", where="calibration")
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise DataError("a label is outside 0 to 1", where="calibration")
    return h, p
