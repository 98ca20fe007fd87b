"""Bradley-Terry maximum likelihood from win counts, tabular and linear, with a ridge and inside a ball; all replicates at once.

    minimise  sum_ij wins_ij softplus(-(r_i - r_j)) - <linear, r> + ridge/2 |theta|^2   over |theta| <= radius

r = theta in the tabular fit, one problem a context, and r = <theta, phi> in the linear one. Without a ball, tables that
separate winners from losers have estimates as large as the ridge lets them be. `linear` and fractional wins make room for the
variance-reduced likelihood of `polyref.theory.auxiliary`. Source: [IT] arXiv 2312.11456, [VR] 2504.03784.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from polyref.errors import ConfigError
from polyref.theory.newton import minimise


def fit_tabular(
    wins: Tensor, *, linear: Tensor | None = None, radius: float | None = None, ridge: float = 1e-6, tolerance: float = 1e-10
) -> Tensor:
    """Rewards (..., X, Y), of sum 0 in each context, from wins (..., X, Y, Y) >= 0; |r(x, .)| <= `radius` (None: no ball).

    wins[x, i, j] counts how often i was preferred to j in context x, fractions welcome; the diagonal says nothing. `linear`
    (..., X, Y); its sum over a context says nothing about reward differences and is taken away. A context without data has
    rewards 0. Accurate to `tolerance` (relative to 1 + |r|). ConfigError for shapes, negative or non-finite wins, ridge <= 0,
    radius <= 0; PolyrefError if Newton does not converge.
    """
    _check(wins, linear, radius, ridge, tolerance)
    shape, actions = wins.shape[:-1], wins.shape[-1]
    counts, advantage = _pairwise(wins, linear)
    basis = _centred_basis(actions)
    coordinates = minimise(
        counts.reshape(-1, counts.shape[-1]).T.contiguous(),
        _incidence(actions) @ basis,
        basis.T @ advantage.reshape(-1, actions).T,
        radius=radius,
        ridge=ridge,
        tolerance=tolerance,
    )
    return (coordinates.T @ basis.T).reshape(shape)


def fit_linear(
    wins: Tensor,
    features: Tensor,
    *,
    linear: Tensor | None = None,
    radius: float | None = None,
    ridge: float = 1e-6,
    tolerance: float = 1e-10,
) -> Tensor:
    """theta (..., d) of rewards <theta, phi(x, y)>, from wins (..., X, Y, Y) and features (..., X, Y, d); |theta| <= `radius`.

    Features without leading axes are shared by the replicates, which is faster. `linear` (..., X, Y) multiplies the rewards, as
    in `fit_tabular`. Accuracy and errors as there.
    """
    _check(wins, linear, radius, ridge, tolerance)
    if features.dim() < 3 or features.shape[-3:-1] != wins.shape[-3:-1] or not features.isfinite().all():
        raise ConfigError(
            f"features {tuple(features.shape)} do not fit wins {tuple(wins.shape)}", fix="give finite (..., X, Y, d)"
        )
    features = features.to(torch.float64)
    counts, advantage = _pairwise(wins, linear)
    batch = torch.broadcast_shapes(counts.shape[:-2], features.shape[:-3])
    counts = counts.expand(*batch, *counts.shape[-2:]).reshape(-1, counts.shape[-2:].numel())
    advantage = advantage.expand(*batch, *advantage.shape[-2:])
    design = (_incidence(features.shape[-2]) @ features).flatten(-3, -2)
    if features.dim() == 3:
        right = advantage.reshape(-1, advantage.shape[-2:].numel()) @ features.flatten(0, 1)
    else:
        right = torch.einsum("...xy,...xyd->...d", advantage, features.expand(*batch, *features.shape[-3:]))
        design = design.expand(*batch, *design.shape[-2:]).reshape(-1, *design.shape[-2:]).permute(1, 2, 0).contiguous()
        right = right.reshape(-1, right.shape[-1])
    theta = minimise(counts.T.contiguous(), design, right.T.contiguous(), radius=radius, ridge=ridge, tolerance=tolerance)
    return theta.T.reshape(*batch, -1)


def _pairwise(wins: Tensor, linear: Tensor | None) -> tuple[Tensor, Tensor]:
    """Comparisons of each unordered pair (..., X, Y(Y-1)/2), and the linear term (..., X, Y) that the even part leaves."""
    wins = wins.to(torch.float64)
    first, second = _triangle(wins.shape[-1])
    flat = wins.flatten(-2)
    counts = flat[..., first * wins.shape[-1] + second] + flat[..., second * wins.shape[-1] + first]
    advantage = (wins.sum(-1) - wins.sum(-2)) / 2
    return counts, advantage if linear is None else advantage + linear


@cache
def _triangle(actions: int) -> tuple[Tensor, Tensor]:
    first, second = torch.triu_indices(actions, actions, 1)
    return first, second


@cache
def _incidence(actions: int) -> Tensor:
    """(Y(Y-1)/2, Y): +1 at the first action of each pair, -1 at the second."""
    first, second = _triangle(actions)
    identity = torch.eye(actions, dtype=torch.float64)
    return identity[first] - identity[second]


@cache
def _centred_basis(actions: int) -> Tensor:
    """(Y, Y-1): an orthonormal basis of the vectors of sum 0, in which norms, and so the ball and the ridge, are the same."""
    steps = torch.triu(torch.ones(actions, actions - 1, dtype=torch.float64))
    for j in range(actions - 1):
        steps[j + 1, j] = -(j + 1)
    return steps / steps.norm(dim=0)


def _check(wins: Tensor, linear: Tensor | None, radius: float | None, ridge: float, tolerance: float) -> None:
    if wins.dim() < 3 or wins.shape[-1] != wins.shape[-2] or 0 in wins.shape or wins.shape[-1] < 2:
        raise ConfigError("is not (..., X, Y, Y) with at least 2 actions", where=f"wins {tuple(wins.shape)}")
    if not ((wins >= 0) & wins.isfinite()).all():
        raise ConfigError("holds a count that is negative or not finite", where=f"wins {tuple(wins.shape)}")
    if linear is not None and (linear.shape != wins.shape[:-1] or not linear.isfinite().all()):
        raise ConfigError(f"is not finite numbers {tuple(wins.shape[:-1])}", where=f"linear {tuple(linear.shape)}")
    if radius is not None and not 0 < radius < math.inf:
        raise ConfigError(f"radius is {radius}", fix="give a finite number above 0, or None for no ball")
    if not 0 < ridge < math.inf:
        raise ConfigError(f"ridge is {ridge}", fix="give a number above 0: it keeps the minimiser unique")
    if not 0 < tolerance < 1:
        raise ConfigError(f"tolerance is {tolerance}", fix="give a number in (0, 1)")
