"""What a round trains on: its own pairs, those of the rounds before it, and offline pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polyref.errors import ConfigError
from polyref.types import PreferenceRecord

Pairs = Sequence[PreferenceRecord]
"""The pairs of a round, or offline ones."""


@dataclass(frozen=True)
class Replay:
    """`rounds` before the own one that are trained on again, None for all, and the share of offline pairs, None for all."""

    rounds: int | None = None
    offline_share: float | None = None

    def __post_init__(self) -> None:
        if self.rounds is not None and self.rounds < 0:
            raise ConfigError(f"replay is {self.rounds}", fix="give a number of rounds from 0, or leave it out for all")
        if self.offline_share is not None and not 0 < self.offline_share < 1:
            raise ConfigError(
                f"offline_share is {self.offline_share}", fix="give a share between 0 and 1, or leave it out for all"
            )


def mixed(rounds: Sequence[Pairs], offline: Pairs, how: Replay, *, seed: int) -> list[PreferenceRecord]:
    """The pairs that the last of `rounds` trains on: offline ones first, then rounds in their order.

    Of a share s of n online pairs, s n / (1 - s) offline pairs are drawn without replacement by `seed`, at most all.
    """
    first = 0 if how.rounds is None else max(0, len(rounds) - 1 - how.rounds)
    online = [record for one in rounds[first:] for record in one]
    chosen = list(offline)
    if how.offline_share is not None:
        wanted = math.floor(how.offline_share * len(online) / (1 - how.offline_share) + 0.5)
        places = np.random.default_rng(seed).permutation(len(chosen))[:wanted]
        chosen = [chosen[i] for i in sorted(places.tolist())]
    return [*chosen, *online]
