"""How far a completion's features lie outside the pairs a reward was fitted to: |phi - nu|_{S^-1}.

For a reward <theta, phi> fitted to pairs, S = lambda I + sum (phi1 - phi2)(phi1 - phi2)^T holds what the pairs say about each
direction of phi, and <theta, phi - nu> is known to within c |phi - nu|_{S^-1}; nu is a reference feature, as the mean under the
anchor. Here phi is what a reward model's score head reads. The features themselves count as fixed: what fine-tuning them leaves
unsure is not in it. Source: [IT] arXiv 2312.11456.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from polyref.errors import ConfigError, ModelError
from polyref.rewards.pessimism import Moments
from polyref.rewards.protocols import Reward, check_rewards, check_rows
from polyref.rewards.reward_model import RewardModel
from polyref.types import Text


class FeatureReward(Reward, Protocol):
    """A reward that also gives its features, as `RewardModel` does."""

    def features(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        """N prompts and a completion of each -> (N, d) float64 on the CPU."""
        ...


def pair_covariance(first: Tensor, second: Tensor, ridge: float = 1.0) -> Tensor:
    """S = ridge I + sum over pairs of (phi1 - phi2)(phi1 - phi2)^T: features (N, d) of both sides to (d, d) float64.

    ConfigError for other shapes, or unless ridge > 0, which has the units of a squared feature.
    """
    if first.shape != second.shape or first.dim() != 2:
        what = f"features have shapes {tuple(first.shape)} and {tuple(second.shape)}"
        raise ConfigError(what, where="pair_covariance", fix="give (N, d) of both completions of N pairs")
    if not 0 < ridge < math.inf:
        fix = "give a finite value above 0, so that S has an inverse"
        raise ConfigError(f"ridge is {ridge}", where="pair_covariance", fix=fix)
    differences = first.to(torch.float64) - second.to(torch.float64)
    return ridge * torch.eye(first.shape[1], dtype=torch.float64) + differences.T @ differences


def inverse_norm(features: Tensor, nu: Tensor, matrix: Tensor) -> Tensor:
    """|phi - nu|_{S^-1}: features (N, d), nu (d,), S (d, d) to (N,) float64. ConfigError where S is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix.to(torch.float64))
    if failed:
        raise ConfigError("S is not positive definite", where="inverse_norm", fix="raise the ridge")
    centred = features.to(torch.float64) - nu.to(torch.float64)
    return torch.linalg.vector_norm(torch.linalg.solve_triangular(factor, centred.T, upper=False), dim=0)


@dataclass(frozen=True, eq=False)
class FeatureUncertainty:
    """`reward` with the uncertainty of its features: `nu` (d,) and `matrix` S (d, d), both float64, as `fit` makes them.

    Called, it is the reward itself; `pessimistic(this, c)` is r - c |phi - nu|_{S^-1}.
    """

    reward: FeatureReward
    nu: Tensor
    matrix: Tensor

    @classmethod
    def fit(
        cls,
        reward: FeatureReward,
        prompts: Sequence[Text],
        first: Sequence[Text],
        second: Sequence[Text],
        *,
        ridge: float = 1.0,
        nu: Tensor | None = None,
    ) -> FeatureUncertainty:
        """S from the pairs that `reward` was fitted to, and `nu`: by default the mean feature of their completions.

        Give `nu` as `reward.features(...).mean(0)` over completions drawn from the anchor where that is another law.
        ConfigError for a ridge not above 0, a nu of another shape, or no pairs and no nu; ModelError for features that are not
        finite.
        """
        check_rows(reward.name, prompts, first, second)
        phi = checked_features(reward, [*prompts, *prompts], [*first, *second])
        one, two = phi.tensor_split(2)
        nu = phi.mean(0) if nu is None else nu.detach().cpu().to(torch.float64)
        if nu.shape != phi.shape[1:] or not nu.isfinite().all():
            what = f"nu, of shape {tuple(nu.shape)}, is no finite feature of {phi.shape[1]} numbers"
            raise ConfigError(what, where=reward.name, fix="give pairs, or a mean of features")
        return cls(reward, nu, pair_covariance(one, two, ridge))

    @property
    def name(self) -> str:
        return self.reward.name

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        """The reward, (N,) float64."""
        return check_rewards(self.reward(prompts, completions), len(prompts), self.name)

    def uncertainty(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        """|phi - nu|_{S^-1} of N completions: (N,) float64, in reward units once multiplied by c."""
        return inverse_norm(checked_features(self.reward, prompts, completions), self.nu, self.matrix)

    def moments(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Moments:
        """The reward and its uncertainty; the model runs once for both where the reward is a `RewardModel`."""
        if not isinstance(self.reward, RewardModel):
            return Moments(self(prompts, completions), self.uncertainty(prompts, completions))
        rewards, phi = self.reward.with_features(prompts, completions)
        return Moments(rewards, inverse_norm(_checked(phi, len(rewards), self.name), self.nu, self.matrix))

    @functools.cached_property
    def fingerprint(self) -> str | None:
        """What `cached` keeps values of it under; None where the reward has none."""
        import xxhash

        known = getattr(self.reward, "fingerprint", None)
        numbers = torch.cat([self.nu.flatten(), self.matrix.flatten()]).numpy().tobytes()
        return known and f"features 1 {xxhash.xxh3_128_hexdigest(numbers)} of {known}"


def checked_features(reward: FeatureReward, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
    """The features of N completions, (N, D) float64 on the CPU. ModelError for another number of rows, or one not finite."""
    rows = check_rows(reward.name, prompts, completions)
    return _checked(reward.features(prompts, completions), rows, reward.name)


def _checked(features: Tensor, rows: int, who: str) -> Tensor:
    phi = features.detach().cpu().to(torch.float64)
    if phi.dim() != 2 or len(phi) != rows:
        raise ModelError(f"gave features of shape {tuple(phi.shape)} for {rows} rows", where=who, fix="give one row each")
    bad = (~phi.isfinite().all(-1)).nonzero()
    if len(bad):
        fix = "score in float32 or check the model's weights"
        raise ModelError("gave a feature that is not finite", where=f"{who}, row {int(bad[0]) + 1}", fix=fix)
    return phi
