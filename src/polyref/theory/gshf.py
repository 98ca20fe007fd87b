"""Linear rewards under a KL-regularised objective: data covariance, bonus, and three offline learners [IT].

r = <theta, phi>. Comparisons give theta_hat (`estimators.fit_linear`) and S = ridge I + sum (phi_1 - phi_2)(phi_1 - phi_2)^T.
A learner turns (theta_hat, S, bandit) into a policy: `offline_greedy` tilts the estimate; `offline_pointwise` tilts it minus
the bonus c |phi(x, y) - nu|_{S^-1} of each action; `offline_policy_level` charges the policy for its MEAN feature,
c |E phi - nu|_{S^-1}, which couples the prompts and is never more than the mean of the pointwise bonuses. nu is a reference
feature: the mean under the anchor G_a unless given, so that staying at the anchor costs nothing.

Shapes: replicates ..., contexts X, actions Y, features d. Actions outside the support of the anchor stay outside it, and
what their features hold is ignored. Source: [IT] arXiv 2312.11456, algorithm 1 (options I and II).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from polyref.errors import ConfigError, PolyrefError
from polyref.theory.bandit import FiniteBandit
from polyref.theory.bounds import least_slope
from polyref.theory.checks import cholesky
from polyref.theory.solutions import solve_reverse_kl

GAP_TOLERANCE = 1e-8
"""Largest certified duality gap of `solve_policy_level`, relative to 1 + the scale of the bonus."""

_NEWTON_STEPS, _SECULAR_STEPS, _HALVINGS = 100, 40, 40


class PolicyLevel(NamedTuple):
    """The policy-level pessimistic optimum: log_policy (..., X, Y), its objective value (...), and the certified gap (...)."""

    log_policy: Tensor
    value: Tensor
    gap: Tensor


def covariance(wins: Tensor, features: Tensor, ridge: float = 1.0) -> Tensor:
    """S = ridge I + sum over comparisons of (phi_1 - phi_2)(phi_1 - phi_2)^T: (..., d, d).

    `wins` (..., X, Y, Y): how often the first action beat the second; `features` (..., X, Y, d). ConfigError unless ridge > 0.
    """
    if not 0 < ridge < math.inf:
        raise ConfigError(f"ridge is {ridge}", where="covariance", fix="give a finite value above 0, so that S has an inverse")
    pairs = wins + wins.mT
    laplacian = torch.diag_embed(pairs.sum(-1)) - pairs
    spread = (laplacian @ features).flatten(-3, -2)
    identity = torch.eye(features.shape[-1], dtype=features.dtype)
    return ridge * identity + features.flatten(-3, -2).mT @ spread


def bonus_scale(dimension: int, radius: float, ridge: float, delta: float) -> float:
    """The theory's c = sqrt(d + log 1/delta)/g0 + sqrt(ridge) B, g0 = s'(2B), constants of order one left out [IT].

    For |phi| <= 1 and |theta| <= radius = B. Far larger than what works: g0 is the least slope of s over the range 2B.
    ConfigError for numbers out of range, and for a radius whose g0 underflows.
    """
    if not (dimension >= 1 and 0 <= radius < math.inf and 0 <= ridge < math.inf and 0 < delta < 1):
        raise ConfigError(
            f"dimension is {dimension}, radius {radius}, ridge {ridge}, delta {delta}",
            where="bonus_scale",
            fix="give a dimension of at least 1, finite radius and ridge of at least 0, and delta between 0 and 1",
        )
    slope = least_slope(2 * radius)
    scale = math.sqrt(dimension - math.log(delta)) / slope + math.sqrt(ridge) * radius if slope > 0 else math.inf
    if not scale < math.inf:
        raise ConfigError(f"the scale for radius {radius} is beyond float64", where="bonus_scale", fix="give a smaller radius")
    return scale


def linear_features(bandit: FiniteBandit) -> Tensor:
    """The features (..., X, Y, d), zero where the anchor has no mass. ConfigError for a tabular bandit."""
    if bandit.features is None:
        raise ConfigError("the bandit has no features", where="linear learner", fix="make it with FiniteBandit.linear")
    outside = bandit.geometric.isneginf().unsqueeze(-1)
    return bandit.features.masked_fill(outside, 0.0)


def mean_feature(features: Tensor, log_policy: Tensor, contexts: Tensor) -> Tensor:
    """E_{x ~ rho, y ~ pi} phi(x, y): (..., d)."""
    return torch.einsum("...xy,...xyd->...d", contexts.unsqueeze(-1) * log_policy.exp(), features)


def whiten(features: Tensor, nu: Tensor, matrix: Tensor) -> Tensor:
    """psi = L^-1 (phi - nu), S = L L^T, of Euclidean norm |phi - nu|_{S^-1}: (..., X, Y, d); nu (..., d), S (..., d, d).

    ConfigError where S is not positive definite.
    """
    centred = features - nu[..., None, None, :]
    factor = cholesky(matrix, "S")[..., None, :, :]
    return torch.linalg.solve_triangular(factor, centred.mT, upper=False).mT


def bonus(features: Tensor, nu: Tensor, matrix: Tensor, scale: float) -> Tensor:
    """scale |phi(x, y) - nu|_{S^-1}: (..., X, Y), in reward units. ConfigError for a scale below 0 or not finite."""
    return _scale(scale) * torch.linalg.vector_norm(whiten(features, nu, matrix), dim=-1)


def offline_greedy(theta: Tensor, matrix: Tensor, bandit: FiniteBandit) -> Tensor:
    """The tilt of the estimate, G_a exp(<theta, phi>/beta)/Z: log-policy (..., X, Y). `matrix` is not used."""
    return solve_reverse_kl(estimated(theta, bandit), bandit.geometric, bandit.beta)


def offline_pointwise(theta: Tensor, matrix: Tensor, bandit: FiniteBandit, *, scale: float, nu: Tensor | None = None) -> Tensor:
    """The tilt of the estimate minus the bonus of each action: log-policy (..., X, Y). [IT] algorithm 1, option II."""
    features = linear_features(bandit)
    charge = bonus(features, _reference(bandit, features) if nu is None else nu, matrix, scale)
    return solve_reverse_kl(estimated(theta, bandit) - charge, bandit.geometric, bandit.beta)


def offline_policy_level(
    theta: Tensor, matrix: Tensor, bandit: FiniteBandit, *, scale: float, nu: Tensor | None = None
) -> Tensor:
    """The maximiser of `pessimistic_value`: log-policy (..., X, Y). [IT] algorithm 1, option I."""
    return solve_policy_level(theta, matrix, bandit, scale=scale, nu=nu).log_policy


def pessimistic_value(
    log_policy: Tensor, theta: Tensor, matrix: Tensor, bandit: FiniteBandit, *, scale: float, nu: Tensor | None = None
) -> Tensor:
    """E r_hat - c |E_{x,pi} phi - nu|_{S^-1} - beta E_x KL(pi || G_a): (...,), what policy-level pessimism maximises."""
    features = linear_features(bandit)
    psi = whiten(features, _reference(bandit, features) if nu is None else nu, matrix)
    policy = log_policy.exp()
    outside = bandit.geometric.isneginf()
    log_ratio = (log_policy - bandit.geometric).masked_fill(outside | (policy == 0), 0.0)
    regularised = (policy * (estimated(theta, bandit) - bandit.beta * log_ratio)).sum(-1)
    charge = torch.linalg.vector_norm(mean_feature(psi, log_policy, bandit.contexts), dim=-1)
    return (bandit.contexts * regularised).sum(-1) - _scale(scale) * charge


def solve_policy_level(
    theta: Tensor, matrix: Tensor, bandit: FiniteBandit, *, scale: float, nu: Tensor | None = None
) -> PolicyLevel:
    """max_pi E r_hat - c |E phi - nu|_{S^-1} - beta KL, by its dual over a ball of d dimensions.

    As |w|_{S^-1} = max v.w over |v|_S <= 1, the optimum is the tilt of r_hat - c v.(phi - nu) at the v that minimises
    D(v) = beta E_x log sum_y G_a exp((r_hat - c v.(phi - nu))/beta), which is convex. In whitened coordinates the ball is
    |u| <= 1, m = E psi under the tilt, and gradient and Hessian of D are -c m and c^2/beta E_x Cov(psi): Newton with the model
    minimised over the ball exactly, then backtracking. D(u) minus the objective of its tilt is c (|m| - u.m) >= 0, an exact
    certificate: PolyrefError if it does not fall below GAP_TOLERANCE (1 + scale).
    """
    features = linear_features(bandit)
    psi = _scale(scale) * whiten(features, _reference(bandit, features) if nu is None else nu, matrix)
    rewards, anchor, beta = estimated(theta, bandit), bandit.geometric, bandit.beta

    def tilt(u: Tensor) -> tuple[Tensor, Tensor]:
        logits = anchor + (rewards - (psi @ u[..., None, :, None]).squeeze(-1)) / beta
        log_normaliser = logits.logsumexp(-1)
        return logits - log_normaliser.unsqueeze(-1), beta * (bandit.contexts * log_normaliser).sum(-1)

    u = torch.zeros_like(theta.expand(*torch.broadcast_shapes(theta.shape[:-1], psi.shape[:-3]), theta.shape[-1]))
    for _ in range(_NEWTON_STEPS):
        log_policy, dual = tilt(u)
        mean, hessian = _moments(psi, log_policy.exp(), bandit.contexts)
        gap = torch.linalg.vector_norm(mean, dim=-1) - (u * mean).sum(-1)
        if bool((gap <= 1e-3 * GAP_TOLERANCE * (1 + scale)).all()):
            break
        target = _ball_minimiser(hessian / beta, -mean, u)
        u = _backtrack(lambda v: tilt(v)[1], u, target, dual, slope=-(mean * (target - u)).sum(-1))
    if not bool((gap <= GAP_TOLERANCE * (1 + scale)).all()):
        raise PolyrefError(f"policy-level pessimism stopped at a duality gap of {float(gap.max()):.3g}")
    return PolicyLevel(log_policy, dual - gap, gap)


def estimated(theta: Tensor, bandit: FiniteBandit) -> Tensor:
    """<theta, phi>: (..., X, Y)."""
    return (linear_features(bandit) @ theta[..., None, :, None]).squeeze(-1)


def _scale(scale: float) -> float:
    if not 0 <= scale < math.inf:
        raise ConfigError(f"the scale of the bonus is {scale}", fix="give a finite value >= 0")
    return scale


def _reference(bandit: FiniteBandit, features: Tensor) -> Tensor:
    return mean_feature(features, bandit.geometric, bandit.contexts)


def _moments(psi: Tensor, policy: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor]:
    """E psi (..., d) and E_x Cov(psi | x) (..., d, d)."""
    within = torch.einsum("...xy,...xyd->...xd", policy, psi)
    weight = contexts.unsqueeze(-1) * policy
    second = torch.einsum("...xy,...xyd,...xye->...de", weight, psi, psi)
    return (contexts.unsqueeze(-1) * within).sum(-2), second - torch.einsum("...x,...xd,...xe->...de", contexts, within, within)


def _ball_minimiser(hessian: Tensor, gradient: Tensor, u: Tensor) -> Tensor:
    """The minimiser over |v| <= 1 of the quadratic model at u: (H + l I) v = H u - g, l by Newton on 1/|v|, concave in l."""
    values, vectors = torch.linalg.eigh(hessian)
    values = values.clamp(min=1e-14)
    b = (vectors.mT @ ((hessian @ u.unsqueeze(-1)).squeeze(-1) - gradient).unsqueeze(-1)).squeeze(-1)
    level = (torch.linalg.vector_norm(b, dim=-1, keepdim=True) - values[..., -1:]).clamp(min=0.0)
    for _ in range(_SECULAR_STEPS):
        v = b / (values + level)
        norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp(min=1e-300)
        slope = (v * v / (values + level)).sum(-1, keepdim=True).clamp(min=1e-300)
        level = (level + (norm - 1) * norm * norm / slope).clamp(min=0.0)
    v = b / (values + level)
    v = v / torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp(min=1.0)
    return (vectors @ v.unsqueeze(-1)).squeeze(-1)


def _backtrack(objective: Callable[[Tensor], Tensor], u: Tensor, target: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """A point between u and target, halving until the objective falls enough; rounding is forgiven. The ball is convex."""
    step = torch.ones_like(value)
    slack = 1e-14 * (1 + value.abs())
    for _ in range(_HALVINGS):
        moved = u + step.unsqueeze(-1) * (target - u)
        fails = objective(moved) > value + 1e-4 * step * slope + slack
        if not bool(fails.any()):
            break
        step = torch.where(fails, step / 2, step)
    return moved
