"""What the experiments say alike: cells of tables, numbers in sentences, and whether an interval bears a claim out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from torch import Tensor

from polyref.theory.regression import Estimates, SlopeFit, estimates, ratio
from polyref.theory.results import SLOPE_TOLERANCE, Agreement, Estimate

MARGIN: Final = 0.05
"""A gain below this (as a share of what is compared with, or in reward of range 1) counts as none."""


def cells(found: Estimates) -> list[Estimate]:
    """One cell of a table a size."""
    return [Estimate(*one) for one in zip(found.value, found.low, found.high, strict=True)]


def mean_cell(values: Tensor) -> Estimate:
    """The mean of `values` (R,) with its interval."""
    return cells(estimates(values))[0]


def ratio_cell(numerator: Tensor, denominator: Tensor) -> Estimate:
    """mean(numerator)/mean(denominator) of paired replicates (R,) with its interval."""
    return cells(ratio(numerator, denominator))[0]


def finding(claimed: str, measured: str, verdict: str) -> str:
    """The one sentence of an experiment: what was claimed, what was measured, and whether they agree."""
    return f"Claimed: {claimed}; measured {measured}; {verdict}."


def told(one: Estimate, form: str = ".2f") -> str:
    """A number with its interval in a sentence, as in 0.72 [0.65, 0.80]; `form` is a format of floats."""
    return f"{one.value:{form}} [{one.low:{form}}, {one.high:{form}}]"


def shown(fit: SlopeFit) -> str:
    """A fitted slope with its interval, as in -1.02 [-1.05, -0.99]; or why there is none."""
    return fit.note if fit.slope != fit.slope else told(Estimate(fit.slope, fit.low, fit.high))


def fitted(fit: SlopeFit, unit: str = "") -> str:
    """The same with the first size that it saw, as in -1.02 [-1.05, -0.99] from 1,000 pairs on."""
    return shown(fit) if fit.slope != fit.slope else f"{shown(fit)} from {fit.used[0]:,.0f}{unit and ' ' + unit} on"


def verdict(agreement: Agreement, *, beats: str = "faster than claimed", misses: str = "slower than claimed") -> str:
    """The agreement of a fitted slope with a claimed one, as the end of a sentence."""
    return {
        "agrees": f"as claimed (to {SLOPE_TOLERANCE:g})",
        "beats the claim": beats,
        "misses the claim": misses,
        "undecided": "which decides nothing",
        "no claim": "of which nothing is claimed",
    }[agreement]


def side(one: Estimate, level: float = 1.0) -> int:
    """Where an interval lies: -1 below `level`, +1 above it, 0 around it."""
    return -1 if one.high < level else int(one.low > level)


def lower(one: Estimate, level: float = 1.0) -> int:
    """Of the claim that a number is below `level`: -1 where its interval leaves no MARGIN, +1 where it is below, 0 undecided.

    A gain that is sure and surely below MARGIN is none, so that more replicates do not turn one verdict into the other.
    """
    return -1 if one.low > level - MARGIN else int(one.high < level)


def joint(signs: Iterable[int]) -> Agreement:
    """Of the parts of a claim, each borne out (+1), contradicted (-1) or left open (0): all are, one is not, or undecided."""
    given = set(signs)
    return "misses the claim" if -1 in given else "undecided" if 0 in given else "agrees"


def outcome(agreement: Agreement) -> str:
    """The agreement of a claim in parts, as the end of a sentence."""
    return {
        "agrees": "as claimed",
        "misses the claim": "not as claimed",
        "undecided": "the intervals do not settle it",
    }[agreement]
