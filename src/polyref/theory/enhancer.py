"""The second agent of online learning: the policy that differs most from the main agent in the directions not yet known [IT].

Over the confidence set c |E phi(pi) - E phi(pi_1)|_{S^-1} >= beta E_x KL(pi || pi_1), maximise the left norm. Not convex, in
objective or in set. But |w| = max u.w over the unit sphere, so the problem is a maximum over DIRECTIONS u
(d dimensions, not X Y) of the linear problem: maximise u.w over c u.w >= beta KL, a CONVEX subset of the set. That one is
solved exactly by the tilt of the main agent by s u.psi, psi the whitened features, at the largest feasible s >= c/beta (the
slack c u.w - beta KL has derivative Var(u.psi) (c - beta s), so it has one root beyond c/beta). Heuristic: from each start,
u <- w/|w| of the tilt it led to. The current policy stays feasible in the next linear problem, so the exploration |w| never
falls and every iterate is inside the set; the best start wins. Starts are both signs of the eigenvectors of the main agent's
feature covariance, and the directions of any candidate policies, so the result explores at least as much as each candidate
inside the set. What is left to chance is a better local optimum elsewhere on the sphere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from polyref.theory.gshf import mean_feature, whiten

_BISECTIONS = 26
_SATURATION = 300.0


class Enhancer(NamedTuple):
    """log_policy (..., X, Y), exploration |E phi(pi_2) - E phi(pi_1)|_{S^-1} (...), and E_x KL(pi_2 || pi_1) (...)."""

    log_policy: Tensor
    exploration: Tensor
    kl: Tensor


def enhance(
    main: Tensor,
    features: Tensor,
    matrix: Tensor,
    contexts: Tensor,
    beta: float,
    *,
    scale: float,
    candidates: Tensor | None = None,
    iterations: int = 5,
) -> Enhancer:
    """The enhancer of the log-policy `main` (..., X, Y), for features (..., X, Y, d), S (..., d, d), contexts (..., X).

    `scale` is c in reward units; 0 gives the main agent back. `candidates` (..., J, X, Y) are log-policies to start from too.
    """
    psi = whiten(features, mean_feature(features, main, contexts), matrix)
    directions = _starts(main, psi, contexts, candidates)
    main, contexts = main.unsqueeze(-3), contexts.unsqueeze(-2)
    for iteration in range(iterations):
        tilted = _farthest(
            main, (psi.flatten(-3, -2) @ directions.mT).mT.unflatten(-1, psi.shape[-3:-1]), contexts, beta, scale
        )
        moved = mean_feature(psi.unsqueeze(-4), tilted, contexts)
        norm = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
        if iteration + 1 < iterations:
            directions = torch.where(norm > 0, moved / norm.clamp(min=1e-300), directions)
    best = norm.squeeze(-1).argmax(-1)
    chosen = torch.take_along_dim(tilted, best[..., None, None, None], dim=-3)
    log_ratio = (chosen - main).masked_fill(chosen.isneginf(), 0.0)
    kl = (contexts * (chosen.exp() * log_ratio).sum(-1)).sum(-1).squeeze(-1)
    return Enhancer(chosen.squeeze(-3), norm.squeeze(-1).amax(-1), kl)


def _starts(main: Tensor, psi: Tensor, contexts: Tensor, candidates: Tensor | None) -> Tensor:
    """Unit directions (..., J, d)."""
    policy = main.exp()
    centred = psi - torch.einsum("...xy,...xyd->...xd", policy, psi).unsqueeze(-2)
    spread = torch.einsum("...xy,...xyd,...xye->...de", contexts.unsqueeze(-1) * policy, centred, centred)
    axes = torch.linalg.eigh(spread).eigenvectors.mT
    starts = [axes, -axes]
    if candidates is not None:
        moved = mean_feature(psi.unsqueeze(-4), candidates, contexts.unsqueeze(-2))
        norm = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
        unit = moved / norm.clamp(min=1e-300)
        starts.append(torch.where(norm > 0, unit, axes[..., -1:, :]).expand(*axes.shape[:-2], *candidates.shape[-3:-2], -1))
    return torch.cat(starts, dim=-2)


def _farthest(main: Tensor, projection: Tensor, contexts: Tensor, beta: float, scale: float) -> Tensor:
    """The tilt of `main` by s u.psi at the largest s found with c u.w >= beta KL: log-policy (..., J, X, Y), by bisection."""
    supported = ~main.isneginf()
    projection = projection.masked_fill(~supported, 0.0)
    base = (contexts * (main.exp() * projection).sum(-1)).sum(-1)
    spread = (projection.amax((-2, -1)) - projection.amin((-2, -1))).clamp(min=1e-12)
    low = torch.full_like(base, scale / beta)
    high = low + _SATURATION / spread

    def feasible(s: Tensor) -> Tensor:
        logits = main + s[..., None, None] * projection
        log_normaliser = logits.logsumexp(-1)
        mean = (contexts * ((logits - log_normaliser.unsqueeze(-1)).exp() * projection).sum(-1)).sum(-1)
        kl = s * mean - (contexts * log_normaliser).sum(-1)
        return scale * (mean - base) >= beta * kl

    low = torch.where(feasible(high), high, low)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        inside = feasible(middle)
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    if scale == 0:
        low = torch.zeros_like(low)
    return torch.log_softmax(main + low[..., None, None] * projection, dim=-1)
