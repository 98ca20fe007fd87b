"""The doubly robust estimate of how often a policy pi beats the law mu of the data: one value per pair. No reduction, no model.

A pair (x, y1, y2), y1 and y2 independent from mu(.|x), carries the label z = P(y1 preferred); g is an antisymmetric auxiliary
model of it; w_i = pi(y_i|x)/mu(y_i|x). Symmetrised over the two completions,

    1/2 E_{y~pi}[g(y, y1) + g(y, y2)] + 1/2 (w1 - w2) (z - g(y1, y2))

has the mean E_{y~pi} P(y beats mu) if g is right (whatever mu is taken to be in w) or mu is right (whatever g is): consistent
if either is. The policy that maximises that mean - beta KL(pi || anchor) is anchor exp(P(y beats mu)/beta)/Z, the optimum of
`ipo` and not that of the regularised reward. Clipping the ratios bounds the variance and gives up the half that rests on mu:
log the share clipped. Source: [DR] arXiv 2506.01183.

The expectation over pi takes draws. Made before training, they are pairs (a1, a2) of independent completions from a KNOWN law
q, with g(a1, a2): by exact weights pi/q, `direct_value` has the mean E_{y~pi} g(y beats q), and `kl_penalty` that of the KL.
With q for mu in all weights, the estimate of the win rate over q is consistent if g is right, whatever law the data pairs had,
or if they were drawn from q, whatever g. The gradient of all three parts vanishes where a pair's completions are equal, so
leaving such pairs out, of the data as of the draws, multiplies the gradient at a prompt x by 1/(1 - sum_y q(y|x)^2), and what
the value differs from 1/2 by; the value of the KL and the mean weight are biased otherwise. All else here is of draws with
equals among them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from polyref.errors import ConfigError


class ImportanceDiagnostics(NamedTuple):
    """How far to trust importance weights, each (...) without gradient."""

    clip_share: Tensor
    """Share of the weights above the clip, in [0, 1]; 0 without a clip."""
    effective_sample_size: Tensor
    """(sum w)^2 / sum w^2 of the weights as used, between 1 and their number; 0 where all are 0."""


def doubly_robust_value(
    z: Tensor | float,
    g: Tensor,
    direct: Tensor,
    log_ratio_first: Tensor,
    log_ratio_second: Tensor,
    *,
    clip: float | None = None,
) -> Tensor:
    """direct + 1/2 (w1 - w2) (z - g), a win rate per pair: (...), to be MAXIMISED; single values may leave [0, 1].

    `z` one number or (...); `g`, the log-ratios log pi - log mu in nats and `direct` (...), where direct is
    1/2 E_{y~pi}[g(y, y1) + g(y, y2)], exact or its mean over draws from pi, with whatever gradient in pi the caller gave it.
    w = min(exp(log-ratio), `clip`), without a gradient beyond the clip; without a clip it overflows where exp does. No gradient
    reaches g. With w = 0 it is the direct method, with g = 1/2 importance weighting. ConfigError for other shapes or clip <= 0.
    """
    shape = log_ratio_first.shape
    given = {"z": z, "g": g, "direct": direct, "log_ratio_second": log_ratio_second}
    for name, value in given.items():
        if isinstance(value, Tensor) and value.shape != shape and not (name == "z" and value.dim() == 0):
            raise ConfigError(f"{name} has shape {tuple(value.shape)} for pairs of shape {tuple(shape)}", fix="give one a pair")
    residual = torch.as_tensor(z, dtype=g.dtype, device=g.device) - g.detach()
    return direct + 0.5 * (_ratio(log_ratio_first, clip) - _ratio(log_ratio_second, clip)) * residual


def direct_value(g: Tensor, log_ratio_first: Tensor, log_ratio_second: Tensor, *, clip: float | None = None) -> Tensor:
    """1/2 + 1/2 (w1 - w2) (g - 1/2), of mean E_{y~pi} g(y beats q): (...), with gradient in the weights alone.

    The pair is drawn independently from q, g (...) is the auxiliary model's P(first preferred), antisymmetric, and the
    log-ratios (...) are log pi - log q in nats, clipped as in `doubly_robust_value`, which is how it is computed: with the
    model's word as the label and no other model.
    """
    half = torch.full_like(log_ratio_first, 0.5)
    return doubly_robust_value(g.detach(), half, half, log_ratio_first, log_ratio_second, clip=clip)


def kl_penalty(
    to_anchor_first: Tensor,
    to_anchor_second: Tensor,
    log_ratio_first: Tensor,
    log_ratio_second: Tensor,
    *,
    clip: float | None = None,
) -> Tensor:
    """KL(pi || anchor) from a pair drawn independently from q: (...), nats; unbiased in value and in gradient, unclipped.

    `to_anchor` (...) is log pi - log anchor, the others log pi - log q. The value is the mean over the pair of w r - w + 1, r
    the log-ratio to the anchor. The gradient is that of 1/2 (w1 - w2) (r1 - r2) with r held fixed: each completion is the
    other's baseline, so an anchor known up to a factor of the prompt (a geometric one) adds no noise, and it is 0 where the
    policy is its anchor. (With such an anchor the value is the KL less log of the factor.) Beyond the clip a weight counts as
    the clip, and its gradient as the clip times that of log pi: unlike the win rate, the penalty goes on pulling.
    """
    first, second = (_ratio(log_ratio.detach(), clip) for log_ratio in (log_ratio_first, log_ratio_second))
    r1, r2 = to_anchor_first.detach(), to_anchor_second.detach()
    slope = 0.5 * (first * log_ratio_first - second * log_ratio_second) * (r1 - r2)
    value = 0.5 * (first * (r1 - 1) + second * (r2 - 1)) + 1
    return value + (slope - slope.detach())


def importance_diagnostics(log_ratios: Tensor, clip: float | None = None) -> ImportanceDiagnostics:
    """Clip share and effective sample size of the weights w = min(exp(log_ratios), clip): (..., N) in nats to (...)."""
    log_ratios = log_ratios.detach()
    if log_ratios.dim() == 0 or log_ratios.shape[-1] == 0:
        raise ConfigError(f"log_ratios has shape {tuple(log_ratios.shape)}", fix="give at least one weight, on the last axis")
    limit = _log_clip(clip)
    used = log_ratios.clamp(max=limit)
    relative = (used - used.amax(-1, keepdim=True)).exp()
    size = relative.sum(-1) ** 2 / (relative**2).sum(-1)
    share = (log_ratios > limit).to(log_ratios.dtype).mean(-1)
    return ImportanceDiagnostics(share, size.masked_fill(used.isneginf().all(-1), 0.0))


def _ratio(log_ratio: Tensor, clip: float | None) -> Tensor:
    return log_ratio.clamp(max=_log_clip(clip)).exp()


def _log_clip(clip: float | None) -> float:
    if clip is None:
        return math.inf
    if not clip > 0:
        raise ConfigError(f"clip is {clip}", fix="give a ratio above 0, or None")
    return math.log(clip)
