"""What a finite bandit refuses: shapes, members, action sets, rewards and beta, told in one line with shape and indices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from polyref.errors import ConfigError, ReferenceSetError
from polyref.references.compose import SIMPLEX_TOLERANCE


def check_beta(beta: float) -> float:
    """`beta` where it is a finite number above 0; else ConfigError."""
    if isinstance(beta, (int, float)) and 0 < beta < math.inf:
        return float(beta)
    raise ConfigError(f"beta is {beta}", fix="give a finite number above 0")


def check_actions(anchor_log: Tensor) -> Tensor:
    """Where `anchor_log` (..., X, Y) has mass, boolean; ConfigError where a context has none, or where it holds NaN or +inf."""
    if (broken := first(anchor_log.isnan() | anchor_log.isposinf())) is not None:
        raise ConfigError(
            f"context and action {shown(broken)} of log-probabilities {tuple(anchor_log.shape)} is not a log-probability",
            fix="give -inf or finite numbers",
        )
    supported = ~anchor_log.isneginf()
    if (empty := first(~supported.any(-1))) is not None:
        raise ConfigError(
            f"the action set of context {shown(empty)} is empty in log-probabilities {tuple(anchor_log.shape)}",
            fix="give every context at least one action with mass",
        )
    return supported


def check_rewards(rewards: Tensor, supported: Tensor) -> None:
    """ConfigError naming the first reward (..., X, Y) that is not finite although its action is supported."""
    if (row := first(~rewards.isfinite() & supported)) is not None:
        raise ConfigError(
            f"rewards of shape {tuple(rewards.shape)} are not finite at context and action {shown(row)}",
            fix="give finite rewards wherever a reference has mass",
        )


def check_contexts(contexts: Tensor) -> None:
    """ConfigError unless every row of rho (..., X) is on the simplex."""
    if not ((contexts >= 0).all() and ((contexts.sum(-1) - 1).abs() <= SIMPLEX_TOLERANCE).all()):
        raise ConfigError(f"contexts {tuple(contexts.shape)} are not on the simplex", fix="give rho >= 0 that sums to 1")


def check_shapes(named: Mapping[str, Tensor | None]) -> torch.Size:
    """The replicates of rewards, logps, weights, contexts, features and theta, by name; ConfigError where shapes do not fit."""
    shapes = {name: value.shape for name, value in named.items() if value is not None}
    rewards, weights, logps = shapes["rewards"], shapes["weights"], shapes["logps"]
    x, y, k = tuple(rewards[-2:-1]), tuple(rewards[-1:]), tuple(logps[-1:])
    d = tuple(shapes.get("features", shapes.get("theta", ()))[-1:])
    ends = {"rewards": x + y, "logps": x + y + k, "contexts": x, "features": x + y + d, "theta": d}
    ends["weights"] = k if len(weights) == 1 else x + k
    fits = len(rewards) > 1 and len(logps) > 2
    fits = fits and all(tuple(shape[len(shape) - len(ends[name]) :]) == ends[name] for name, shape in shapes.items())
    try:
        replicates = torch.broadcast_shapes(*(shape[: max(0, len(shape) - len(ends[name]))] for name, shape in shapes.items()))
    except RuntimeError:
        fits = False
    if not fits:
        raise ConfigError(
            f"the shapes do not fit: {', '.join(f'{name} {tuple(shape)}' for name, shape in shapes.items())}",
            fix="give rewards (..., X, Y), logps (..., X, Y, K), weights (K,) or (..., X, K), contexts (..., X), "
            "features (..., X, Y, d), theta (..., d), with leading axes that broadcast",
        )
    if 0 in rewards[-2:]:
        raise ConfigError(
            f"rewards of shape {tuple(rewards)} leave an empty action set", fix="give at least one context and one action"
        )
    return replicates


def check_members(logps: Tensor, weights: Tensor) -> None:
    """Every reference of logps (..., X, Y, K) whose weight (K,) or (..., X, 1, K) is positive is a distribution over Y."""
    shape = torch.broadcast_shapes(logps.shape, weights.shape)
    kept = (weights > 0).expand(shape)
    mass = logps.expand(shape).masked_fill(~kept, -math.inf).exp().sum(-2)
    if (row := first(((mass - 1).abs() <= SIMPLEX_TOLERANCE).logical_not() & kept[..., 0, :])) is not None:
        total = float(mass[row])
        raise ReferenceSetError(
            f"the probabilities sum to {total:.6g} over the actions" if total else "the action set is empty: all are -inf",
            where=f"context and reference {shown(row)} of log-probabilities {tuple(logps.shape)}",
            fix="give log-probabilities normalised over the actions, or that reference weight 0 in this context",
        )


def check_preference(preference: Tensor, name: str) -> Tensor:
    """P(i beats j) (..., X, Y, Y) in float64, P + P^T = 1 within rounding: within 1e-6 as given, for float32, then symmetrised.

    ConfigError naming it for another shape, and for what is not complementary in [0, 1].
    """
    if preference.dim() < 3 or preference.shape[-1] != preference.shape[-2]:
        raise ConfigError("is not (..., X, Y, Y)", where=f"{name} {tuple(preference.shape)}")
    p = preference.to(torch.float64)
    if not ((p >= 0) & ((p + p.mT - 1).abs() <= SIMPLEX_TOLERANCE)).all():
        raise ConfigError(
            "does not satisfy P + P^T = 1 with P >= 0",
            where=f"{name} {tuple(preference.shape)}",
            fix="symmetrise it: (P + 1 - P^T)/2",
        )
    return ((p + (1 - p.mT)) / 2).clamp(0.0, 1.0)


def cholesky(matrix: Tensor, name: str) -> Tensor:
    """L of `matrix` = L L^T (..., d, d); ConfigError where it is not square, or not positive definite."""
    if matrix.dim() > 1 and matrix.shape[-1] == matrix.shape[-2]:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed.any() and factor.isfinite().all():
            return factor
    raise ConfigError(f"{name} of shape {tuple(matrix.shape)} is not positive definite (..., d, d)", fix="add a ridge to it")


def first(flags: Tensor) -> tuple[int, ...] | None:
    """The first index at which `flags` holds, or None."""
    return tuple(flags.nonzero()[0].tolist()) if flags.any() else None


def shown(row: Sequence[int]) -> str:
    """An index as it is read: (0, 2), or 0."""
    return str(row[0]) if len(row) == 1 else str(tuple(row))
