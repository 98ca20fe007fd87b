"""Newton's method for many small logistic problems at once, each held in a ball.

Problem p minimises, over u in R^d with |u| <= radius,

    f(u) = sum_n c_n log(2 cosh(<a_n, u>/2)) - <b, u> + ridge/2 |u|^2,

convex for counts c >= 0: a Bradley-Terry likelihood, as -log s(h) = log(2 cosh(h/2)) - h/2. Each step minimises the quadratic
model over the ball exactly (More and Sorensen: (H + m I) u = H u0 - gradient with m >= 0 from Newton on 1/|u|, which is concave
in m and so never passes the root from the left), then backtracks on f along the segment, which stays in the ball.

Problems lie on the LAST axis, so that a Cholesky factorisation is d sweeps over long contiguous rows: for d near 10 several
times faster than a library call a matrix. They are taken in blocks that stay in cache, and leave the block once converged.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from polyref.errors import PolyrefError

MAX_STEPS: Final = 200
_BLOCK_ELEMENTS: Final = 1 << 18
_SLACK: Final = 1e-13
_ROUNDING: Final = 1e-15


class _Problems(NamedTuple):
    """A block of P problems."""

    counts: Tensor  # c (N, P)
    design: Tensor  # a (N, d), shared, or (N, d, P)
    linear: Tensor  # b (d, P)
    scale: Tensor  # size of f (P,), for what rounding may do to it

    def keep(self, kept: Tensor) -> _Problems:
        design = self.design if self.design.dim() == 2 else _pick(self.design, kept)
        return _Problems(_pick(self.counts, kept), design, _pick(self.linear, kept), self.scale[kept])


def minimise(
    counts: Tensor, design: Tensor, linear: Tensor, *, radius: float | None, ridge: float, tolerance: float = 1e-10
) -> Tensor:
    """u (d, P), float64, for counts (N, P) >= 0, design (N, d) or (N, d, P), linear (d, P), ridge > 0, radius None: no ball.

    A problem ends with a full step shorter than sqrt(tolerance)/100 (relative to 1 + |u|): convergence is quadratic, so what
    is left is below `tolerance`. It also ends where the gradient is down to rounding, as in directions that only a tiny ridge
    holds. PolyrefError where some do neither within MAX_STEPS. Arguments are checked by the callers.
    """
    size = counts.shape[1]
    most = max(64, _BLOCK_ELEMENTS // max(design.shape[1] ** 2, design.shape[0]))
    block = math.ceil(size / math.ceil(size / most))
    solved = torch.empty_like(linear)
    for start in range(0, size, block):
        part = slice(start, min(start + block, size))
        design_part = design if design.dim() == 2 else design[..., part]
        scale = 1 + counts[:, part].sum(0) + linear[:, part].abs().sum(0)
        problems = _Problems(counts[:, part], design_part, linear[:, part], scale)
        solved[:, part] = _minimise_block(problems, math.inf if radius is None else float(radius), ridge, tolerance)
    return solved


def _minimise_block(problems: _Problems, radius: float, ridge: float, tolerance: float) -> Tensor:
    solved = torch.empty_like(problems.linear)
    left = torch.arange(solved.shape[1])
    u, multiplier = torch.zeros_like(solved), torch.zeros_like(solved[0])
    margins = torch.zeros_like(problems.counts)
    value = _value(problems, u, margins, ridge)
    for _ in range(MAX_STEPS):
        gradient, hessian = _derivatives(problems, u, margins, ridge)
        target, multiplier, exact = _ball_step(hessian, u, gradient, radius, multiplier)
        move = target - u
        length = _norm(move)
        settled = _residual(u, gradient, radius) <= _ROUNDING * problems.scale
        u, margins, value, full = _search(problems, u, margins, value, move, (gradient * move).sum(0), ridge)
        ended = full & exact & (settled | (length <= 1e-2 * math.sqrt(tolerance) * (1 + _norm(u))))
        if ended.any():
            solved[:, left[ended]] = u[:, ended]
            kept = (~ended).nonzero().squeeze(1)
            if not len(kept):
                return solved
            left, problems = left[kept], problems.keep(kept)
            u, margins, value, multiplier = _pick(u, kept), _pick(margins, kept), value[kept], multiplier[kept]
    raise PolyrefError(f"{len(left)} of {solved.shape[1]} ball-constrained fits did not converge in {MAX_STEPS} steps")


def _residual(u: Tensor, gradient: Tensor, radius: float) -> Tensor:
    """|gradient| (P,), less its part along -u, which the sphere takes up where u is on it."""
    if radius == math.inf:
        return _norm(gradient)
    on_sphere = _norm(u) >= radius * (1 - 1e-9)
    pressure = (-(gradient * u).sum(0) / radius**2).clamp(min=0.0)
    return _norm(gradient + torch.where(on_sphere, pressure, 0.0) * u)


def _value(problems: _Problems, u: Tensor, margins: Tensor, ridge: float) -> Tensor:
    """f (P,)."""
    size = margins.abs()
    entropy = torch.log1p(torch.exp(-size)).add_(size, alpha=0.5).mul_(problems.counts).sum(0)
    return entropy - (problems.linear * u).sum(0) + ridge / 2 * (u * u).sum(0)


def _derivatives(problems: _Problems, u: Tensor, margins: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The gradient (d, P), and the Hessian (d, d, P), of f."""
    slope = torch.tanh(margins / 2).mul_(0.5)
    curvature = (0.25 - slope * slope).mul_(problems.counts)
    slope.mul_(problems.counts)
    design, d = problems.design, problems.linear.shape[0]
    if design.dim() == 2:
        gradient = design.T @ slope
        first, second = torch.triu_indices(d, d)
        upper = (design[:, first] * design[:, second]).T @ curvature
        place = torch.empty(d, d, dtype=torch.long)
        place[first, second] = place[second, first] = torch.arange(len(first))
        hessian = upper.index_select(0, place.flatten()).view(d, d, -1)
    else:
        gradient = (design * slope[:, None]).sum(0)
        rows = design.permute(2, 1, 0)
        hessian = (rows * curvature.T[:, None] @ rows.mT).permute(1, 2, 0).contiguous()
    hessian.view(d * d, -1)[:: d + 1] += ridge
    return gradient.sub_(problems.linear).add_(u, alpha=ridge), hessian


def _margins(design: Tensor, u: Tensor) -> Tensor:
    return design @ u if design.dim() == 2 else (design * u).sum(1)


def _ball_step(
    hessian: Tensor, u: Tensor, gradient: Tensor, radius: float, multiplier: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The minimiser (d, P) over the ball of the quadratic model at u, its multiplier (P,), and where it is exact (P,).

    `multiplier` is a guess: wherever Newton on 1/|u| starts, it is left of the root after one step. A few steps are enough,
    as the guess improves from call to call; a step that ends outside is scaled back onto the sphere.
    """
    right = (hessian * u).sum(1) - gradient
    if radius == math.inf:
        return _solve(hessian, right, multiplier)[0], multiplier, torch.ones_like(multiplier, dtype=torch.bool)
    result, exact = torch.empty_like(u), torch.zeros_like(multiplier, dtype=torch.bool)
    found = multiplier.clone()
    open_, m = torch.arange(u.shape[1]), multiplier
    for _ in range(4):
        step, whitened = _solve(hessian, right, m)
        norm = _norm(step)
        inside = (m == 0) & (norm <= radius)
        touching = (norm - radius).abs() <= 1e-11 * radius
        scale = torch.where(inside, 1.0, radius / norm)
        result[:, open_], found[open_], exact[open_] = step * scale, m, inside | touching
        open_again = (~(inside | touching)).nonzero().squeeze(1)
        if not len(open_again):
            break
        rise = (norm / radius - 1) * (norm * norm) / (whitened * whitened).sum(0)
        m = (m + rise).clamp(min=0.0)[open_again]
        open_, hessian, right = open_[open_again], _pick(hessian, open_again), _pick(right, open_again)
        found[open_] = m
    return result, found, exact


def _solve(hessian: Tensor, right: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """s = (H + m I)^{-1} b and L^{-1} s, L the Cholesky factor: (d, d, P), (d, P), (P,) to (d, P) twice."""
    d = right.shape[0]
    work = torch.cat([hessian, right[None]])  # b rides along as a last row, and ends as L^{-1} b
    work.view((d + 1) * d, -1)[: d * d : d + 1] += multiplier
    for j in range(d):
        column = work[j:, j]
        column.mul_(column[0].rsqrt())
        if j + 1 < d:
            work[j + 1 :, j + 1 :].addcmul_(column[1:, None], column[None, 1 : d - j], value=-1)
    step = work[d].clone()
    for j in reversed(range(d)):
        step[j].div_(work[j, j])
        if j:
            step[:j].addcmul_(work[j, :j], step[j], value=-1)
    whitened = step.clone()
    for j in range(d):
        whitened[j].div_(work[j, j])
        if j + 1 < d:
            whitened[j + 1 :].addcmul_(work[j + 1 : d, j], whitened[j], value=-1)
    return step, whitened


def _search(
    problems: _Problems, u: Tensor, margins: Tensor, value: Tensor, move: Tensor, slope: Tensor, ridge: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u + t move, its margins and its value, t the first of 1, 1/2, 1/4... to bring enough descent; and where t is 1."""
    change = _margins(problems.design, move)
    step = torch.ones_like(slope)
    for _ in range(60):
        trial, trial_margins = u + step * move, margins + step * change
        after = _value(problems, trial, trial_margins, ridge)
        enough = after <= value + 1e-4 * step * slope + _SLACK * problems.scale
        if enough.all():
            break
        step = torch.where(enough, step, step / 2)
    return trial, trial_margins, after, step == 1


def _norm(vectors: Tensor) -> Tensor:
    """|.| over the first axis; several times faster there than torch's norm."""
    return (vectors * vectors).sum(0).sqrt_()


def _pick(values: Tensor, kept: Tensor) -> Tensor:
    return values.index_select(-1, kept)
