"""The variance-reduced pair loss: an auxiliary preference model as control variate, for any pair loss. No reduction, no model.

A data pair (x, y1, y2) carries h = r(y1) - r(y2) and the label z = P(y1 preferred), hard or soft; the auxiliary model gives
g(x, y1, y2), its own P(y1 preferred), and so for M pairs drawn for the same prompt. Write l(h, p) = p l(h) + (1-p) l(-h):

    l_VR = l(h, z) - c l(h, g) + c mean_{m<=M} l(h*_m, g*_m).

- Unbiased for ANY g and any c when the auxiliary pairs have the data pair's joint law given x (the unordered law suffices: a
  pair kept as chosen, rejected counts as it is) and are drawn independently of z; g is fitted on other data (cross-fitted).
- g predicts the label AS RECORDED, lapses and flips included, also under `robust`; g(y2, y1) = 1 - g(y1, y2) by construction.
- If only g is right, the expectation at c = 1 is the loss under the law of the auxiliary pairs.
- With g right, lbar = l(h, g): the variance given x is E Var(l|y) + (1-c)^2 Var(lbar) + c^2 Var(lbar)/M, against
  E Var(l|y) + Var(lbar) for the plain loss. At c = 1 nothing is gained from M = 1; `optimal_control` is never worse than plain.
- When the model is Bradley-Terry and right, lbar has gradient 0 at the optimum: its gradient variance there is the plain one.
- The data part is unbounded below in h (z - g may have either sign): hold the policy by beta, early stopping or a ball.

Which c, where g is not right. With a_p = d l(h, p)/dh (`sigmoid`: s(h) - p, s the logistic function) a pair's gradient is

    a_z dh - c B,    B = a_g dh - mean_m a*_m dh*_m,    E B = 0,

of least variance at c = E <a_z dh, B> / E |B|^2. Auxiliary pairs are independent of the data pair and have its law, so where
the mean gradient is small beside that of one pair, and |dh|^2 does not go with a_z a_g or a_g^2, the variance is, in units of
|dh|^2 and up to a constant, the parabola E[a_z^2] - 2 c E[a_z a_g] + c^2 (1 + 1/M) E[a_g^2], least at

    c = E[a_z a_g] / ((1 + 1/M) E[a_g^2]).

- As E[a_z | pair] = a_P, P the true preference, this is M/(M+1) times the slope of a_P on a_g: M/(M+1) if g is right; 0 if how
  g differs from what h says tells nothing of how P does, as for every wrong g once h is right.
- No c between 0 and the least point is above plain, so neither is that c clipped to [0, 1]; nor at the plain optimum, where
  the mean gradient is 0, if |dh|^2 is alike for all pairs: of what was left out only |E a_g dh|^2 remains, which shrinks c.
- A c made of EARLIER pairs leaves the loss unbiased given the past, as one chosen beforehand does.

Source: [VR] arXiv 2504.03784; the control coefficient c is the textbook one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from polyref.errors import ConfigError
from polyref.objectives.pairwise import PairLoss


class VarianceReduced(NamedTuple):
    """One value per pair, all (...), differentiable: loss = data - c correction + c auxiliary."""

    loss: Tensor
    data: Tensor
    """l(h, z), the plain loss."""
    correction: Tensor
    """l(h, g): what the auxiliary model expects of the data pair."""
    auxiliary: Tensor
    """mean_m l(h*_m, g*_m) over the auxiliary pairs."""


def variance_reduced(
    h: Tensor,
    z: Tensor | float,
    g: Tensor,
    auxiliary_h: Tensor,
    auxiliary_g: Tensor,
    loss: PairLoss,
    *,
    control: float = 1.0,
) -> VarianceReduced:
    """The loss of the module's docstring, in the units of `loss`, which is affine in the label as all of LOSSES are.

    `h`, `g` (...), `z` one number or (...), `auxiliary_h` and `auxiliary_g` (..., M), M >= 1. No gradient reaches g or
    auxiliary_g. The label enters as (1-c) l(h, z) + c (z - g) (l(h) - l(-h)), the last difference in float64 (but on devices
    that have none), so that at c = 1 `sigmoid` gives -(z - g) h to the last digit of h. ConfigError for other shapes or a
    control that is not finite.
    """
    _check(h, z, g, auxiliary_h, auxiliary_g, control)
    z, g, auxiliary_g = (torch.as_tensor(p, dtype=h.dtype, device=h.device) for p in (z, g.detach(), auxiliary_g.detach()))
    data, correction = loss(h, chosen_probability=z), loss(h, chosen_probability=g)
    auxiliary = loss(auxiliary_h, chosen_probability=auxiliary_g).mean(-1)
    wide = h.to(torch.float64) if h.device.type != "mps" else h
    odd = ((z.to(wide) - g.to(wide)) * (loss(wide) - loss(-wide))).to(h.dtype)
    label_part = odd if control == 1 else (1 - control) * data + control * odd
    return VarianceReduced(label_part + control * auxiliary, data, correction, auxiliary)


def optimal_control(auxiliary_pairs: int) -> float:
    """c = M/(M+1), of least variance when g is right: E Var(l|y) + Var(lbar)/(M+1). ConfigError unless M >= 1."""
    if auxiliary_pairs < 1:
        raise ConfigError(f"{auxiliary_pairs} auxiliary pairs", where="optimal_control", fix="draw at least one a data pair")
    return auxiliary_pairs / (auxiliary_pairs + 1)


def control_moments(h: Tensor, z: Tensor | float, g: Tensor, loss: PairLoss) -> Tensor:
    """(sum a_z a_g, sum a_g^2) over all pairs, a_p = d l(h, p)/dh: (2,), float64 on the CPU, without gradient.

    `h` and `g` (...), `z` one number or (...), `loss` as in `variance_reduced`. At a kink of `hinge` a_p is a subgradient.
    """
    at = h.detach().cpu().double().requires_grad_()
    labels = (torch.as_tensor(p).detach().cpu().double() for p in (z, g))
    with torch.enable_grad():
        label, predicted = (torch.autograd.grad(loss(at, chosen_probability=p).sum(), at)[0] for p in labels)
    return torch.stack([(label * predicted).sum(), (predicted**2).sum()])


def estimated_control(moments: Tensor, auxiliary_pairs: int) -> float:
    """c = clip(sum a_z a_g / ((1 + 1/M) sum a_g^2), 0, 1) of `control_moments` (2,) summed over earlier pairs.

    `optimal_control` where they tell nothing (sum a_g^2 is 0: no pairs yet). ConfigError unless M >= 1.
    """
    largest, (product, square) = optimal_control(auxiliary_pairs), moments.tolist()
    return min(max(largest * product / square, 0.0), 1.0) if square > 0 else largest


def term_variances(terms: VarianceReduced) -> VarianceReduced:
    """The variance over all pairs of each term: float64 scalars without gradient, NaN for fewer than two pairs."""
    wide = [term.detach().to(torch.float64).flatten() for term in terms]
    return VarianceReduced(*(term.var() if len(term) > 1 else term.new_tensor(math.nan) for term in wide))


def realised_factor(terms: VarianceReduced) -> Tensor:
    """Var(plain loss)/Var(variance-reduced loss) over the pairs given, a scalar: above 1 is a gain, NaN below two pairs.

    Both variances hold that of the conditional mean over prompts, so pairs of many prompts understate the gain given x.
    """
    variances = term_variances(terms)
    return variances.data / variances.loss


def _check(h: Tensor, z: Tensor | float, g: Tensor, auxiliary_h: Tensor, auxiliary_g: Tensor, control: float) -> None:
    """Shapes only: a broadcast would mix pairs."""
    labels = z.shape if isinstance(z, Tensor) and z.dim() else h.shape
    if not g.shape == labels == h.shape:
        raise ConfigError(
            f"g has shape {tuple(g.shape)} and z {tuple(labels)} for pairs of shape {tuple(h.shape)}",
            fix="give one number a pair",
        )
    if auxiliary_h.shape != auxiliary_g.shape or auxiliary_h.shape[:-1] != h.shape or not auxiliary_h.shape[h.dim() :].numel():
        raise ConfigError(
            f"auxiliary_h has shape {tuple(auxiliary_h.shape)} and auxiliary_g {tuple(auxiliary_g.shape)} "
            f"for pairs of shape {tuple(h.shape)}",
            fix="give M >= 1 of each a pair, on the last axis",
        )
    if not math.isfinite(control):
        raise ConfigError(f"control is {control}", fix="give 1, or optimal_control(M)")
