"""When a loop ends before its last round: the KL budget is spent, lengths drift, or the proxy is over-optimised.

Pure functions of the rows that tell of the start and of each round, whose estimates are [mean, low, high].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyref.errors import ConfigError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Limits:
    """`kl` in nats to the anchor; `patience` in rounds of over-optimisation; `length` the largest ratio of mean lengths to the
    start's, above it or below. None of each is no limit. ConfigError for a limit that every run, or none, would break.
    """

    kl: float | None = None
    patience: int | None = 2
    length: float | None = None

    def __post_init__(self) -> None:
        if self.kl is not None and not 0 < self.kl < math.inf:
            raise ConfigError(f"kl_budget is {self.kl}", fix="give nats above 0, or leave it out")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"patience is {self.patience}", fix="give a number of rounds of at least 1, or none")
        if self.length is not None and not 1 < self.length < math.inf:
            raise ConfigError(f"length_drift is {self.length}", fix="give a ratio above 1, such as 2, or leave it out")


@dataclass(frozen=True)
class Stop:
    """The loop ends after round `at` for `rail`, told by `why`; the policy of round `keep` is the last before it."""

    rail: str
    at: int
    keep: int
    why: str


def stopped(rows: Sequence[Row], limits: Limits) -> Stop | None:
    """The first rail that the last of `rows`, the start first, breaks; None where it breaks none."""
    for rail in (over_kl_budget, over_optimised, drifted):
        if (stop := rail(rows, limits)) is not None:
            return stop
    return None


def over_kl_budget(rows: Sequence[Row], limits: Limits) -> Stop | None:
    """The mean KL to the anchor is above its budget."""
    at, kl = len(rows) - 1, rows[-1]["kl_anchor"]
    if limits.kl is None or not at or kl is None or not kl[0] > limits.kl:
        return None
    return Stop("KL budget", at, at - 1, f"the KL to the anchor is {kl[0]:.3g} nats, above the budget of {limits.kl:g}")


def over_optimised(rows: Sequence[Row], limits: Limits) -> Stop | None:
    """Over each of the last `patience` rounds the gold reward lies below, and the proxy above, that of an earlier round.

    Below and above are beyond both 95% intervals. The earlier round is the one of the largest gold reward among those before
    the last `patience`.
    """
    at, patience = len(rows) - 1, limits.patience
    if patience is None or at < patience or rows[-1]["gold"] is None:
        return None
    best = max(rows[: at + 1 - patience], key=lambda row: row["gold"][0])
    late = rows[at + 1 - patience :]
    if not all(_below(row["gold"], best["gold"]) and _below(best["reward"], row["reward"]) for row in late):
        return None
    why = (
        f"over-optimisation: since round {best['round']} the gold reward fell from {best['gold'][0]:.3g} to "
        f"{rows[-1]['gold'][0]:.3g} while the proxy rose from {best['reward'][0]:.3g} to {rows[-1]['reward'][0]:.3g}"
    )
    return Stop("over-optimisation", at, at - patience, why)


def drifted(rows: Sequence[Row], limits: Limits) -> Stop | None:
    """The mean length in tokens is more than `length` times the start's, or less than one part in so many of it."""
    at = len(rows) - 1
    if limits.length is None or not at:
        return None
    before, now = rows[0]["length"][0], rows[-1]["length"][0]
    if before / limits.length <= now <= before * limits.length:
        return None
    why = f"the mean length went from {before:.3g} to {now:.3g} tokens, beyond a factor of {limits.length:g}"
    return Stop("length drift", at, at - 1, why)


def _below(low: Sequence[float | None], high: Sequence[float | None]) -> bool:
    """Whether the first interval ends before the second begins; one without ends never does."""
    return low[2] is not None and high[1] is not None and low[2] < high[1]
