"""Newton's method for many small smooth problems at once, whatever the objective: separable over all axes but the last.

Written for tabular policies, whose problems are contexts (and replicates) of a few logits each. The Hessian comes from double
backward: since problems are separate, one backward pass a logit gives that row of every problem's Hessian.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from polyref.errors import PolyrefError

PolicyObjective = Callable[[Tensor], Tensor]
"""log_policy (..., X, Y) -> what to minimise, one value a context (..., X) that depends on that context's row alone."""

TOLERANCE: Final = 1e-8
MAX_STEPS: Final = 200
_HALVINGS: Final = 40
_NULL: Final = 1e-13
"""Share of a problem's largest curvature below which a direction counts as flat."""
_EPSILON: Final = torch.finfo(torch.float64).eps


def minimise_policies(
    objective: PolicyObjective, anchor: Tensor, *, tolerance: float = TOLERANCE, max_steps: int = MAX_STEPS
) -> Tensor:
    """log pi (..., X, Y) at a stationary point of `objective`, reached from pi = anchor (..., X, Y), normalised or not.

    Each context takes Newton steps through |Hessian| (by double backward), halved until its own value falls. It has settled
    when its gradient is at most `tolerance` and its step small. Actions where the anchor is -inf keep no mass; `objective` sees
    0 there. PolyrefError where a context does not settle, or runs off to infinity along a direction that goes flat.
    """
    supported = ~anchor.isneginf()
    logits = anchor.detach().masked_fill(~supported, 0.0).clone()
    first_rank: Tensor | None = None
    gradient = step = torch.full_like(logits, math.inf)
    for _ in range(max_steps):
        value, gradient, hessian = _derivatives(objective, logits, supported)
        step, rank = _newton_step(gradient, hessian)
        first_rank = rank if first_rank is None else first_rank
        settled = (gradient.abs().amax(-1) <= tolerance) & (step.abs().amax(-1) <= 1e-4)
        if settled.all():
            _refuse(rank < first_rank, "are unbounded below: a direction of their policy runs off to infinity")
            return _log_policy(logits, supported).masked_fill(~supported, -math.inf)
        logits = _descend(objective, logits, supported, value, step.masked_fill(settled[..., None], 0.0))
    largest = gradient.abs().max().item()
    _refuse(~settled, f"did not settle in {max_steps} Newton steps: the largest gradient is {largest:.2g}")
    raise AssertionError("unreachable: some context had not settled")


def _log_policy(logits: Tensor, supported: Tensor) -> Tensor:
    return logits.masked_fill(~supported, -math.inf).log_softmax(-1).masked_fill(~supported, 0.0)


def _derivatives(objective: PolicyObjective, logits: Tensor, supported: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value (..., X), gradient (..., X, Y) and Hessian (..., X, Y, Y): contexts are separate, so one row serves them all."""
    logits = logits.detach().requires_grad_()
    value = objective(_log_policy(logits, supported))
    (gradient,) = torch.autograd.grad(value.sum(), logits, create_graph=True)
    rows = [torch.autograd.grad(gradient[..., k].sum(), logits, retain_graph=True)[0] for k in range(logits.shape[-1])]
    hessian = torch.stack(rows, -2)
    return value.detach(), gradient.detach(), 0.5 * (hessian + hessian.mT)


def _newton_step(gradient: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """-|H|^+ gradient (..., X, Y), and the rank of H (..., X). Adding a constant to all logits is always a flat direction."""
    if not (gradient.isfinite().all() and hessian.isfinite().all()):
        raise PolyrefError("a direct fit met a gradient that is not finite: give a ridge, or check the probabilities")
    curvature, basis = torch.linalg.eigh(hessian)
    size = curvature.abs()
    live = (size > _NULL * size.amax(-1, keepdim=True)) & (size > 0)
    along = (basis.mT @ gradient[..., None])[..., 0] / size.masked_fill(~live, 1.0)
    return -(basis @ (along * live)[..., None])[..., 0], live.sum(-1)


def _descend(objective: PolicyObjective, logits: Tensor, supported: Tensor, value: Tensor, step: Tensor) -> Tensor:
    """Each context moves by the largest of step, step/2, step/4, ... that does not raise its value beyond rounding."""
    ceiling = value + 8 * _EPSILON * (1 + value.abs())
    scale = torch.ones_like(value)
    with torch.no_grad():
        for _ in range(_HALVINGS):
            moved = logits + scale[..., None] * step
            raised = ~(objective(_log_policy(moved, supported)) <= ceiling)
            if not raised.any():
                return moved
            scale = torch.where(raised, scale / 2, scale)
    return torch.where(raised[..., None], logits, moved)


def _refuse(wrong: Tensor, what: str) -> None:
    if wrong.any():
        raise PolyrefError(f"{int(wrong.sum())} contexts {what}; give a ridge, more pairs, or a smooth loss")
