"""A reward less k times its own uncertainty, usable wherever a reward is: nothing is gained where the data was thin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from polyref.errors import ConfigError
from polyref.rewards.functions import NamedReward
from polyref.types import Text


class Moments(NamedTuple):
    """What is expected of N rewards and how unsure that is, both (N,) float64 on the CPU."""

    mean: Tensor
    std: Tensor


class UncertainReward(Protocol):
    """A reward that says how unsure it is: `RewardEnsemble` and `FeatureUncertainty` are two."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str | None: ...

    def moments(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Moments: ...


def pessimistic(reward: UncertainReward, k: float) -> NamedReward:
    """The reward mean - k std, in the units of `reward`. ConfigError unless k is a finite number of at least 0.

    Of an ensemble, std is the members' standard deviation; of last-layer features it is |phi - nu|_{S^-1}, and k is the c of
    [IT] arXiv 2312.11456. At k = 0 it is the mean.
    """
    if not 0 <= k < math.inf:
        raise ConfigError(f"k is {k}", where="pessimistic", fix="give a finite number of at least 0")

    def values(prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        mean, std = reward.moments(prompts, completions)
        return mean - k * std

    fingerprint = reward.fingerprint and f"pessimistic 1 by {float(k)!r} of {reward.fingerprint}"
    return NamedReward(f"{reward.name} - {k:g} std", values, fingerprint)
