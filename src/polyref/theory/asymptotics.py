"""What the tabular Bradley-Terry fit estimates where Bradley-Terry is wrong, and how precisely, plain or variance-reduced.

The fit tends to the pseudo-true rewards r+, which minimise the population loss under the law of the pairs. With s = s(h+),
d = e_i - e_j and pairs (x, i, j) of law L, sqrt(n) (r^ - r+) tends to a normal law of covariance, context by context,

    H^+ V H^+,   H = sum_ij L s (1-s) d d^T,
    V = sum_ij L [P(1-P) + (P-s)^2] d d^T                                                              (plain)
    V = sum_ij L [P(1-P) + ((P-s) - c(g-s))^2] d d^T - c^2 q q^T / rho + c^2/M (sum_ij L (g-s)^2 d d^T - q q^T / rho)    (VR)

with q = sum_ij L (g-s) d, for an auxiliary model g, M auxiliary pairs of the same prompt, of the law of the data pair and
independent of it, and control c: the sandwich of the score (z - s) d - c (g - s) d + c mean_m (g_m - s_m) d_m, whose mean
given x is 0 at r+. Where P = s, so that Bradley-Terry is right, g = P changes nothing for any M. Shapes as in
`polyref.theory.bandit`.
Source: [VR] arXiv 2504.03784; M-estimation in the usual way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyref.errors import ConfigError
from polyref.theory.estimators import fit_tabular

_SCALE = 1e6  # pairs that the population stands for: the ridge of the fit is then nothing beside it


def pseudo_true(law: Tensor, preference: Tensor, *, radius: float | None = None) -> Tensor:
    """r+ (..., X, Y), of sum 0 in each context, from the law of pairs and P(i beats j), both (..., X, Y, Y).

    Under a law that connects all actions it is unique; it depends on the law of the pairs unless Bradley-Terry is right.
    """
    return fit_tabular(_SCALE * (law + law.mT) * preference, radius=radius)


def error_covariance(
    law: Tensor,
    preference: Tensor,
    rewards: Tensor,
    *,
    g: Tensor | None = None,
    auxiliary_pairs: float = math.inf,
    control: float = 1.0,
) -> Tensor:
    """The covariance (..., X, Y, Y) of sqrt(n) (r^ - r+), of the formulas above; plain where `g` (..., X, Y, Y) is None.

    `rewards` r+ (..., X, Y) from `pseudo_true`; `auxiliary_pairs` M >= 1, infinite for the exact law. Over all contexts the
    blocks are independent to first order. ConfigError for M < 1.
    """
    if not auxiliary_pairs >= 1:
        raise ConfigError(f"auxiliary_pairs is {auxiliary_pairs}", fix="give at least 1, or infinity for their exact law")
    pairs = (law + law.mT) / 2
    s = torch.sigmoid(rewards[..., :, None] - rewards[..., None, :])
    noise, misfit = preference * (1 - preference), preference - s
    if g is None:
        spread = _laplacian(pairs * (noise + misfit**2))
    else:
        guess = g - s
        mass = pairs.sum((-2, -1), keepdim=True)
        mean = 2 * (pairs * guess).sum(-1)
        outer = mean[..., :, None] * mean[..., None, :] / mass.masked_fill(mass == 0, 1.0)
        own = _laplacian(pairs * (noise + (misfit - control * guess) ** 2)) - control**2 * outer
        spread = own + control**2 / auxiliary_pairs * (_laplacian(pairs * guess**2) - outer)
    inverse = torch.linalg.pinv(_laplacian(pairs * s * (1 - s)), hermitian=True)
    return inverse @ spread @ inverse


def _laplacian(table: Tensor) -> Tensor:
    """sum_ij table_ij (e_i - e_j)(e_i - e_j)^T of a symmetric table (..., Y, Y)."""
    table = 2 * table
    return torch.diag_embed(table.sum(-1)) - table
