"""Steps of multi-step rejection sampling: from the references to beta by way of larger betas [IT], arXiv 2312.11456.

Step k ends at beta_k: it proposes from the policy fitted to the tilt at beta_{k-1} (the anchor at first, 1/beta_0 = 0) and
accepts on r (1/beta_k - 1/beta_{k-1}). Betas fall, and the last is the one wanted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.optimize import brentq
from torch import Tensor

from polyref.errors import ConfigError, DataError


def equal_steps(beta: float, steps: int) -> tuple[float, ...]:
    """beta_k = beta N/k for k = 1..N: equal steps in 1/beta. Every step's `step_beta` is N beta."""
    if steps < 1:
        raise ConfigError(f"steps is {steps}", where="multi-step schedule", fix="give at least 1")
    return tuple(_positive(beta) * (steps / k) for k in range(1, steps + 1))


def step_beta(previous: float | None, following: float) -> float:
    """1/(1/following - 1/previous): the beta of the tilt that turns the one at `previous` into the one at `following`.

    `previous` None is the anchor itself. ConfigError unless 0 < following < previous.
    """
    if previous is None:
        return _positive(following)
    if not _positive(following) < _positive(previous):
        raise ConfigError(f"beta goes from {previous:g} to {following:g}", fix="let beta fall from step to step")
    return following / (1 - following / previous)


def adapted_beta(
    rewards: Sequence[Tensor],
    previous: float | None,
    beta: float,
    acceptance: float,
    *,
    r_max: Sequence[float] | None = None,
) -> float:
    """The next beta, >= `beta`: the least at which a proposal is accepted with probability `acceptance`, on average.

    `rewards` are those of proposals from the policy at `previous`, (N_x,) a prompt; the average of exp((r - r_max)/step_beta)
    is over each prompt's proposals and then over prompts, with r_max the largest of a prompt's rewards where it is not given
    or below that. Rewards with a range of at most R leave at most R/(beta log(1/acceptance)) steps, rounded up. DataError for
    rewards that are none or not finite; ConfigError for acceptance outside (0, 1), or unless previous > beta > 0.
    """
    if not 0 < acceptance < 1:
        raise ConfigError(f"acceptance is {acceptance}", fix="give a target between 0 and 1, such as 0.2")
    longest = 1 / step_beta(previous, beta)
    if not rewards or (r_max is not None and len(r_max) != len(rewards)):
        raise DataError(f"rewards of {len(rewards)} prompts", where="adapted_beta", fix="give rewards, and r_max, a prompt")
    gaps = [_gaps(row, number, r_max) for number, row in enumerate(rewards)]

    def excess(log_step: float) -> float:
        means = [float((-gap * math.exp(log_step)).exp().mean()) for gap in gaps]
        return sum(means) / len(means) - acceptance

    if excess(math.log(longest)) >= 0:
        return beta
    largest = max(float(gap.max()) for gap in gaps)
    least = math.log(-math.log(acceptance) / largest) - 1e-9  # no reward falls further, so that all are accepted as often
    step = math.exp(brentq(excess, least, math.log(longest), xtol=1e-12))
    return max(beta, 1 / (step + (0.0 if previous is None else 1 / previous)))


def _gaps(rewards: Tensor, number: int, r_max: Sequence[float] | None) -> Tensor:
    """r_max - r >= 0, (N,) float64, of prompt `number`."""
    if rewards.dim() != 1 or not len(rewards) or not rewards.isfinite().all():
        fix = "give a finite number for each of at least one proposal"
        raise DataError(f"rewards {tuple(rewards.shape)} are none or not finite", where=f"prompt {number + 1}", fix=fix)
    rewards = rewards.detach().to(torch.float64)
    best = float(rewards.max())
    return (best if r_max is None else max(best, r_max[number])) - rewards


def _positive(beta: float) -> float:
    if 0 < beta < math.inf:
        return beta
    raise ConfigError(f"beta is {beta}", fix="give a finite number above 0")
