"""Objectives, values, gaps and divergences of policies on a `FiniteBandit`: exact, stable near the optimum, differentiable.

`log_policy` is (..., X, Y) in nats and normalised over the actions; its replicates broadcast against the bandit's. A gap is
computed from the identity that makes it a divergence, never as a difference of two objectives, which would cancel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from polyref.theory.bandit import FiniteBandit
from polyref.theory.solutions import below_best, forward_optimum, reverse_optimum


class KLDecomposition(NamedTuple):
    """sum_i a_i KL(pi || pi_i) = KL(pi || G_a) - log F_a, each (..., X), in nats."""

    to_members: Tensor
    to_geometric: Tensor
    minus_log_f: Tensor


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last axis, (..., Y) to (...), in nats: sum_y q - p - p log(q/p), every term >= 0.

    The terms q - p sum to 0; they make the result non-negative and free of cancellation where p is close to q.
    """
    return _excess(log_p, log_q, log_q - log_p)


def mean_reward(log_policy: Tensor, bandit: FiniteBandit) -> Tensor:
    """E_x E_pi r, (...)."""
    return bandit.mean((log_policy.exp() * bandit.rewards).sum(-1))


def kl_decomposition(log_policy: Tensor, bandit: FiniteBandit) -> KLDecomposition:
    """The three parts; the sum over members is of log pi - sum_i a_i log pi_i and uses neither of the other two."""
    log_ratio = (log_policy - bandit.log_product).masked_fill(log_policy.isneginf(), 0.0)
    to_members = (log_policy.exp() * log_ratio).sum(-1)
    return KLDecomposition(to_members, kl(log_policy, bandit.geometric), -bandit.log_f)


def reverse_objective(log_policy: Tensor, bandit: FiniteBandit) -> Tensor:
    """J(pi) = E_x [E_pi r - beta sum_i a_i KL(pi || pi_i)], (...)."""
    return mean_reward(log_policy, bandit) - bandit.beta * bandit.mean(kl_decomposition(log_policy, bandit).to_members)


def forward_objective(log_policy: Tensor, bandit: FiniteBandit) -> Tensor:
    """J~(pi) = E_x [E_pi r - beta sum_i a_i KL(pi_i || pi)], (...).

    The weighted sum is KL(M_a || pi) + sum_i a_i KL(pi_i || M_a), of which the policy moves only the first.
    """
    divergence = kl(bandit.mixture, log_policy) + disagreement(bandit)
    return mean_reward(log_policy, bandit) - bandit.beta * bandit.mean(divergence)


def disagreement(bandit: FiniteBandit) -> Tensor:
    """sum_i a_i KL(pi_i || M_a), (..., X), in nats: 0 where the references of positive weight agree."""
    weights = bandit.weights if bandit.weights.dim() == 1 else bandit.weights.unsqueeze(-2)
    logps, weights = torch.broadcast_tensors(bandit.logps, weights)
    members = logps.masked_fill(weights == 0, -math.inf)
    return (weights[..., 0, :] * kl(members.mT, bandit.mixture[..., None, :])).sum(-1)


def reverse_value(bandit: FiniteBandit) -> Tensor:
    """max J = E_x beta log sum_y prod_i pi_i^{a_i} exp(r/beta), (...)."""
    supported = ~bandit.log_product.isneginf()
    best = bandit.rewards.masked_fill(~supported, -math.inf).amax(-1)
    tilted = bandit.log_product - below_best(bandit.rewards, supported, bandit.beta)
    return bandit.mean(best + bandit.beta * tilted.logsumexp(-1))


def reverse_gap(log_policy: Tensor, bandit: FiniteBandit) -> Tensor:
    """J(pi*) - J(pi) = beta E_x KL(pi || pi*) >= 0, (...)."""
    return bandit.beta * bandit.mean(kl(log_policy, reverse_optimum(bandit)))


def forward_gap(log_policy: Tensor, bandit: FiniteBandit) -> Tensor:
    """J~(pi~) - J~(pi) = beta E_x E_M[u - 1 - log u] >= 0, u = pi/pi~, (...). Infinite where pi has no mass and M_a has."""
    log_ratio = (log_policy - forward_optimum(bandit)).masked_fill(bandit.mixture.isneginf(), 0.0)
    return bandit.beta * bandit.mean(_excess(bandit.mixture, bandit.mixture + log_ratio, log_ratio))


def unregularised_gap(log_policy: Tensor, bandit: FiniteBandit, optimum: Tensor | None = None) -> Tensor:
    """E_{pi*} r - E_pi r, (...), of either sign: pi* is the optimum of the REGULARISED objective.

    `optimum` (..., X, Y) is log pi*; left out, the reverse-KL one.
    """
    optimum = reverse_optimum(bandit) if optimum is None else optimum
    return bandit.mean(((optimum.exp() - log_policy.exp()) * bandit.rewards).sum(-1))


def _excess(log_w: Tensor, log_v: Tensor, log_ratio: Tensor) -> Tensor:
    """sum over the last axis of v - w - w log(v/w) >= 0; terms with w = 0 are v.

    `log_ratio` = log(v/w) is given apart from `log_v`, which may have lost its digits. Near 1 the ratio enters through expm1.
    """
    w = log_w.exp()
    log_ratio = log_ratio.masked_fill(w == 0, 0.0)
    near = (log_ratio.abs() < 1) & (w != 0)
    small = log_ratio.masked_fill(~near, 0.0)
    far = log_v.masked_fill(near, -math.inf).exp() - w - w * log_ratio
    return torch.where(near, w * (torch.expm1(small) - small), far).sum(-1)
