"""When a loop ends before its last round: the KL budget is spent, lengths drift, or the proxy is over-optimised.

Pure functions of the rows that tell of the start and of each round, whose estimates are [mean, low, high].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyref.errors import ConfigError

Row = Mapping[str, Any]

Change = Callable[[str, int, int], Sequence[float | None]]
"""The mean change, with its interval, of the `reward` or the `gold` one from a round to another: [mean, low, high]."""

LEAST_PROMPTS = 8
"""Judged prompts below which an interval is none: nothing may have changed, and one change in four lies below 0 of 2 prompts'
95% intervals, one in ten of 4 prompts', one in twenty of 8 (one in forty, if they were exact). Simulated, of normal changes."""


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


def stopped(rows: Sequence[Row], limits: Limits, change: Change, prompts: int) -> Stop | None:
    """The first rail that the last of `rows`, the start first, breaks; None where it breaks none.

    Of fewer than `LEAST_PROMPTS` different `prompts` no interval is believed, and over-optimisation is not looked for.
    """
    optimised = over_optimised(rows, limits, change) if prompts >= LEAST_PROMPTS else None
    return over_kl_budget(rows, limits) or optimised or drifted(rows, limits)


def told_before(start: Row, limits: Limits, prompts: int) -> list[str]:
    """What is to be said of the rails before round 1, of a start that was judged on so many different `prompts`."""
    lines, kl = [], start["kl_anchor"]
    if limits.kl is not None and kl is not None and kl[0] > limits.kl:
        over = f"the start's KL to the anchor is {kl[0]:.3g} nats, above the budget of {limits.kl:g} already"
        lines.append(f"{over}: unless round 1 comes below it, the run ends there with the start; raise kl_budget")
    if limits.patience is not None and start["gold"] is not None and prompts < LEAST_PROMPTS:
        few = f"{prompts} judged prompts are too few for intervals"
        lines.append(f"{few}: over-optimisation does not end this run; hold out {LEAST_PROMPTS} or more")
    return lines


def over_kl_budget(rows: Sequence[Row], limits: Limits) -> Stop | None:
    """The mean KL to the anchor is above its budget."""
    at, kl = len(rows) - 1, rows[-1]["kl_anchor"]
    if limits.kl is None or not at or kl is None or not kl[0] > limits.kl:
        return None
    return Stop("KL budget", at, at - 1, f"the KL to the anchor is {kl[0]:.3g} nats, above the budget of {limits.kl:g}")


def over_optimised(rows: Sequence[Row], limits: Limits, change: Change) -> Stop | None:
    """In each of the last `patience` rounds the gold reward is below, and the proxy above, that of an earlier round.

    Below and above: the interval of the `change` does not reach 0. The earlier round is the one of the largest gold reward
    among those before the last `patience`.
    """
    at, patience = len(rows) - 1, limits.patience
    if patience is None or at < patience or rows[-1]["gold"] is None:
        return None
    first = at + 1 - patience
    since = max(range(first), key=lambda i: rows[i]["gold"][0])
    best = rows[since]
    if not all(_fell(change("gold", since, i)) and _rose(change("reward", since, i)) for i in range(first, at + 1)):
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


def _fell(change: Sequence[float | None]) -> bool:
    """Whether the interval lies below 0; one without ends never does."""
    return change[2] is not None and change[2] < 0


def _rose(change: Sequence[float | None]) -> bool:
    return change[1] is not None and change[1] > 0
