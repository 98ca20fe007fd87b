"""The exact optima of the KL-regularised bandit, in both directions of the KL. Source: [MR] arXiv 2502.01203.

Reverse KL: pi* = G_a exp(r/beta) / Z. Forward KL: pi~ = beta M_a / (lambda - r), lambda(x) the root of one convex, decreasing
equation. Everything is pointwise in the context, in log-space and float64; shapes as in `polyref.theory.bandit`.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from polyref.errors import ConfigError, PolyrefError
from polyref.theory.bandit import FiniteBandit
from polyref.theory.checks import check_actions, check_beta, check_rewards, first, shown

EPSILON: Final = torch.finfo(torch.float64).eps
MAX_STEPS: Final = 200


class ForwardSolution(NamedTuple):
    """The optimum under forward KL, and its normaliser lambda = r_max + t."""

    log_policy: Tensor
    """(..., X, Y)."""
    normaliser: Tensor
    """t = lambda - max_y r in (0, beta], (..., X), in reward units. 0 only where exp(log_normaliser) underflows."""
    log_normaliser: Tensor
    """log t, (..., X)."""


def solve_reverse_kl(rewards: Tensor, anchor_log: Tensor, beta: float) -> Tensor:
    """log pi* = log anchor + r/beta - log Z, (..., X, Y): what maximises E_pi r - beta KL(pi || anchor) [MR].

    `rewards` and `anchor_log` (..., X, Y), broadcast; the anchor need not be normalised, and may be geometric (for the weighted
    sum of KL terms) or the mixture (for the KL to it). Differentiable; rewards where the anchor is -inf are ignored.
    ConfigError for beta <= 0, an empty action set, rewards that are not finite, and a range of them beyond float64 times beta.
    """
    return (anchor_log - below_best(rewards, _checked(rewards, anchor_log, beta), beta)).log_softmax(-1)


def solve_forward_kl(rewards: Tensor, mixture_log: Tensor, beta: float) -> ForwardSolution:
    """pi~ = beta M_a / (lambda - r): what maximises E_pi r - beta sum_i a_i KL(pi_i || pi) on the support of M_a [MR].

    lambda solves sum_y beta M_a/(lambda - r) = 1 and lies in [max_y(r + beta M_a), max_y r + beta]. The unknown is
    log((lambda - r_max)/beta), as lambda itself would cancel against r_max; safeguarded Newton brings the sum to 1 within
    rounding. `rewards`, `mixture_log` (..., X, Y), broadcast, the mixture normalised (less mass is allowed: the same equation).
    Without gradient. Errors as for `solve_reverse_kl`.
    """
    supported = _checked(rewards, mixture_log, beta)
    rewards, mixture_log = torch.broadcast_tensors(rewards.detach().to(torch.float64), mixture_log.detach().to(torch.float64))
    gaps = below_best(rewards, supported, beta).masked_fill(~supported, 1.0)
    root = _log_root(mixture_log, gaps)
    log_policy = mixture_log - torch.logaddexp(root[..., None], gaps.log())
    return ForwardSolution(log_policy, beta * root.exp(), root + math.log(beta))


def below_best(rewards: Tensor, supported: Tensor, beta: float) -> Tensor:
    """(r_max - r)/beta >= 0, (..., X, Y), r_max over the actions that are `supported`; 0 at the others.

    What a tilt needs of r/beta, which alone may overflow. ConfigError where the range over beta does too. r_max has no
    gradient.
    """
    rewards = rewards.to(torch.float64)
    best = rewards.detach().masked_fill(~supported, -math.inf).amax(-1, keepdim=True)
    gaps = ((best - rewards) / beta).masked_fill(~supported, 0.0)
    if (row := first(~gaps.isfinite())) is not None:
        raise ConfigError(
            f"the best reward less that of context and action {shown(row)}, over beta {beta:g}, is beyond float64",
            fix="give rewards of a smaller range, or a larger beta",
        )
    return gaps


def reverse_optimum(bandit: FiniteBandit) -> Tensor:
    """log pi* of `bandit`, (..., X, Y), its KL taken to every reference. ReferenceSetError where supports differ."""
    return solve_reverse_kl(bandit.rewards, bandit.geometric, bandit.beta)


def forward_optimum(bandit: FiniteBandit) -> Tensor:
    """log pi~ of `bandit`, (..., X, Y)."""
    return solve_forward_kl(bandit.rewards, bandit.mixture, bandit.beta).log_policy


def _checked(rewards: Tensor, anchor_log: Tensor, beta: float) -> Tensor:
    check_beta(beta)
    supported = check_actions(anchor_log)
    check_rewards(rewards, supported)
    return supported


def _log_root(mixture_log: Tensor, gaps: Tensor) -> Tensor:
    """log s with F(s) = sum_y M/(s + gap) = 1, gap = (r_max - r)/beta >= 0: (..., Y) to (...).

    1/F is increasing and concave (a harmonic mean of linear functions), so a Newton step on it never passes the root from the
    left, lands left of it from the right, and is exact where one action dominates. Far from the root (steps beyond a factor e)
    it may only double s, so every second step then halves the bracket of log s. The mass at gap 0 enters in log-space, as it
    may underflow; elsewhere M/(s + gap) with an underflown M is nothing.
    """
    at_best = gaps == 0
    best_mass = mixture_log.masked_fill(~at_best, -math.inf).logsumexp(-1)
    mass, gaps = mixture_log.exp().masked_fill(at_best, 0.0), gaps.masked_fill(at_best, 1.0)
    high = mixture_log.logsumexp(-1)
    low = torch.maximum(best_mass, (mass - gaps).amax(-1).clamp(min=0.0).log()).minimum(high)
    z, done = low, torch.zeros_like(low, dtype=torch.bool)
    for step in range(MAX_STEPS):
        s = z.exp()[..., None]
        share, head = mass / (s + gaps), (best_mass - z).exp()
        total = head + share.sum(-1)
        slope = head + (share * (s / (s + gaps))).sum(-1)  # -s F'(s)
        low, high = torch.where(total > 1, z, low), torch.where(total < 1, z, high)
        move = torch.log1p(total * (total - 1) / slope)
        newton = torch.maximum(torch.minimum(z + move, high), low)
        settled = ((total - 1).abs() <= 16 * EPSILON) | (move.abs() <= 2 * EPSILON * (1 + z.abs()))
        halve = ~move.isfinite() | (z + move < low) | (z + move > high) | ((step % 2 == 1) & (move.abs() > 1))
        z = torch.where(done, z, torch.where(halve & ~settled, (low + high) / 2, newton))
        done = done | settled
        if done.all():
            return z
    raise PolyrefError(f"the forward-KL normaliser of {int((~done).sum())} contexts did not settle in {MAX_STEPS} steps")
