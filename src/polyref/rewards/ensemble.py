"""Several rewards of one thing, fitted from different seeds or on different folds: their mean, and how far they disagree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polyref.errors import ConfigError
from polyref.rewards.pessimism import Moments
from polyref.rewards.protocols import Reward, check_rewards, check_rows
from polyref.stages import content_digest
from polyref.types import Text


@dataclass(frozen=True, slots=True)
class RewardEnsemble:
    """M >= 2 rewards in one unit. Called, it is their mean, a `Reward`; `moments` adds their standard deviation.

    The members are asked in turn, so each may be `cached`. A reward fitted to pairs is known up to a shift, and shifts that
    differ between members count as disagreement: train them with centring, or see `centred_on`.
    `offsets` (M,) are subtracted from the members' values.
    """

    members: tuple[Reward, ...]
    name: str = "ensemble"
    offsets: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(self.members))
        if len(self.members) < 2:
            fix = "give at least 2 rewards, of different seeds or folds"
            raise ConfigError(f"{len(self.members)} members tell no uncertainty", where=self.name, fix=fix)
        if self.offsets is not None and len(self.offsets) != len(self.members):
            what = f"{len(self.offsets)} offsets for {len(self.members)} members"
            raise ConfigError(what, where=self.name, fix="give one a member")

    def values(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        """Every member's reward, (N, M) float64. InputError for lists of unequal length, ModelError for a bad value."""
        rows = check_rows(self.name, prompts, completions)
        each = [check_rewards(member(prompts, completions), rows, member.name) for member in self.members]
        return torch.stack(each, -1) - torch.tensor(self.offsets or 0.0, dtype=torch.float64)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        """The members' mean, (N,) float64."""
        return self.values(prompts, completions).mean(-1)

    def moments(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Moments:
        """Mean and standard deviation over the members, divided by M - 1: that of one more member."""
        values = self.values(prompts, completions)
        mean = values.mean(-1)
        spread = torch.linalg.vector_norm(values - mean.unsqueeze(-1), dim=-1)  # Tensor.std warns of no rows
        return Moments(mean, spread / math.sqrt(len(self.members) - 1))

    def centred_on(self, prompts: Sequence[Text], completions: Sequence[Text]) -> RewardEnsemble:
        """This ensemble with every member shifted to mean 0 on these completions. ConfigError for none."""
        if not len(prompts):
            raise ConfigError("no completions to centre on", where=self.name, fix="give at least one")
        uncentred = replace(self, offsets=None).values(prompts, completions)
        return replace(self, offsets=tuple(uncentred.mean(0).tolist()))

    @property
    def fingerprint(self) -> str | None:
        """What `cached` keeps its values under; None where a member has none."""
        known = [getattr(member, "fingerprint", None) for member in self.members]
        return None if None in known else f"ensemble 1 {content_digest([known, self.offsets])}"
