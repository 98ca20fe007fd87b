"""How often a policy's completions beat a baseline's, with an interval that respects prompts answered several times.

The gold, a reward or a preference model, is held for evaluation: whatever trained the policy or chose among its checkpoints is
biased towards it. Nothing is generated here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from polyref.data.sources import prompt_key
from polyref.errors import ConfigError, DataError
from polyref.objectives.metrics import Interval, mean_interval
from polyref.rewards.protocols import PreferenceModel, Reward, check_probabilities, check_rewards, check_rows
from polyref.types import Text


class WinRate(NamedTuple):
    """The mean outcome with its interval, and what it was taken over: comparisons won, tied and lost, and distinct prompts."""

    rate: Interval
    wins: int
    ties: int
    losses: int
    prompts: int


def reward_outcomes(policy: Tensor, baseline: Tensor, *, tie_within: float = 0.0) -> Tensor:
    """1 where the policy's reward is above the baseline's, 0 where below, 1/2 where they differ by at most `tie_within`.

    Rewards (N,) in the same units, to (N,) float64. ConfigError for unequal shapes or a negative `tie_within`; DataError for a
    reward that is not finite, which would pass for a tie.
    """
    if policy.shape != baseline.shape:
        shapes = f"{tuple(policy.shape)} and {tuple(baseline.shape)}"
        raise ConfigError(f"rewards of shapes {shapes} cannot be compared", fix="give one of each a comparison")
    if not tie_within >= 0:
        raise ConfigError(f"tie_within is {tie_within}", fix="give a difference of rewards, at least 0")
    for name, rewards in (("policy", policy), ("baseline", baseline)):
        _refuse(~rewards.isfinite(), rewards, f"reward_outcomes, {name} reward", "a reward is a finite number")
    difference = policy.to(torch.float64) - baseline.to(torch.float64)
    return (torch.where(difference.abs() <= tie_within, 0.0, difference).sign() + 1) / 2


def crossed_outcomes(policy: Tensor, baseline: Tensor) -> Tensor:
    """(P,) float64: the share of comparisons of rewards (P, n) that the policy wins on each prompt, a tie being half a win.

    Each of its n draws is compared with all of the baseline's but that of the same number. Draws of one number may share their
    randomness (common random numbers): means do not mind, but how often one is above the other is another number then. Of one
    draw there is no other. Errors: those of `reward_outcomes`.
    """
    outcomes = reward_outcomes(policy, baseline)
    draws = policy.shape[1]
    if draws == 1:
        return outcomes[:, 0]
    every = reward_outcomes(*torch.broadcast_tensors(policy[:, :, None], baseline[:, None, :]))
    return (every.sum((1, 2)) - outcomes.sum(1)) / (draws * (draws - 1))


def majority_outcomes(probabilities: Tensor) -> Tensor:
    """1 where P(policy preferred) is above 1/2, 0 where below, 1/2 at 1/2: (N,) to (N,) float64.

    DataError for one outside [0, 1] or NaN, which is what a judge gives of a pair that it refuses.
    """
    outside = ~((probabilities >= 0) & (probabilities <= 1))
    _refuse(outside, probabilities, "majority_outcomes, probability", "leave out what was not judged; the others are in [0, 1]")
    return reward_outcomes(probabilities, torch.full_like(probabilities, 0.5))


def _refuse(bad: Tensor, values: Tensor, where: str, fix: str) -> None:
    """DataError for the first of `values` that is `bad`, (N,) both."""
    if found := bad.flatten().nonzero().flatten().tolist():
        raise DataError(f"is {values.flatten()[found[0]].item()}", where=f"{where} {found[0] + 1}", fix=fix)


def win_rate(outcomes: ArrayLike, prompts: Sequence[Text], *, seed: int, level: float = 0.95, resamples: int = 4000) -> WinRate:
    """The mean of `outcomes` (N,) in [0, 1], bootstrapped over `prompts` (N,): comparisons on one prompt are not independent.

    Outcomes are 1, 1/2 and 0, or probabilities that the policy is preferred, whose mean is the expected win rate; those above
    1/2 count as wins, those at 1/2 as ties. 0.5 says that neither is better. The same seed gives the same interval; one prompt
    alone gives none (NaN). DataError for no outcome, one outside [0, 1] or not a number, or another number of prompts.
    """
    values = np.asarray(outcomes, dtype=np.float64)
    if values.shape != (len(prompts),) or not len(prompts):
        fix = "give one outcome and its prompt a comparison, and at least one"
        raise DataError(f"outcomes of shape {values.shape} for {len(prompts)} prompts", where="win_rate", fix=fix)
    if bad := np.flatnonzero(~((values >= 0) & (values <= 1))).tolist():
        raise DataError(f"is {values[bad[0]]}", where=f"win_rate, outcome {bad[0] + 1}", fix="an outcome is in [0, 1]")
    clusters = [prompt_key(prompt) for prompt in prompts]
    rate = mean_interval(values, clusters, level=level, seed=seed, resamples=resamples)
    wins, losses = int((values > 0.5).sum()), int((values < 0.5).sum())
    return WinRate(rate, wins, len(values) - wins - losses, losses, len(set(clusters)))


def win_rate_by_reward(
    gold: Reward,
    prompts: Sequence[Text],
    policy: Sequence[Text],
    baseline: Sequence[Text],
    *,
    seed: int,
    tie_within: float = 0.0,
    level: float = 0.95,
) -> WinRate:
    """The share of N prompts (some may repeat) on which `gold` puts the policy's completion above the baseline's; ties 1/2.

    `tie_within` is in units of `gold`. Errors: those of `win_rate`, InputError for lists of unequal length, and ModelError
    where `gold` gives no finite number.
    """
    rows = check_rows("win_rate_by_reward", prompts, policy, baseline)
    both = check_rewards(gold([*prompts, *prompts], [*policy, *baseline]), 2 * rows, gold.name)
    return win_rate(reward_outcomes(both[:rows], both[rows:], tie_within=tie_within), prompts, seed=seed, level=level)


def win_rate_by_preference(
    gold: PreferenceModel,
    prompts: Sequence[Text],
    policy: Sequence[Text],
    baseline: Sequence[Text],
    *,
    seed: int,
    level: float = 0.95,
) -> WinRate:
    """As `win_rate_by_reward`, a comparison being won where `gold` prefers the policy's completion with more than 1/2.

    For the expected win rate give the probabilities themselves to `win_rate`.
    """
    rows = check_rows("win_rate_by_preference", prompts, policy, baseline)
    probabilities = check_probabilities(gold(prompts, policy, baseline), rows, gold.name)
    return win_rate(majority_outcomes(probabilities), prompts, seed=seed, level=level)
