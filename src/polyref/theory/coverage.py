"""Coverage constants: how well the law that made the data covers a target policy. Shapes as in `polyref.theory.bandit`."""

from __future__ import annotations

import torch
from torch import Tensor

from polyref.theory.checks import cholesky


def density_coverage(target_log: Tensor, sampling_log: Tensor) -> Tensor:
    """max_{x, y} pi/mu from log-probabilities (..., X, Y): (...), at least 1, infinite where mu misses mass of pi."""
    return (target_log - sampling_log).masked_fill(target_log.isneginf(), -torch.inf).amax((-2, -1)).exp()


def chi_square_coverage(target_log: Tensor, sampling_log: Tensor, contexts: Tensor | None = None) -> Tensor:
    """E_x E_pi[pi/mu] = 1 + E_x chi^2(pi || mu), (...). `contexts` (..., X) is rho; left out, uniform."""
    ratio = (target_log + (target_log - sampling_log)).masked_fill(target_log.isneginf(), -torch.inf)
    return _mean(ratio.exp().sum(-1), contexts)


def feature_coverage(
    features: Tensor, target_log: Tensor, covariance: Tensor, reference_feature: Tensor, contexts: Tensor | None = None
) -> Tensor:
    """|E_x E_pi phi - nu|_{S^-1}, (...): the uncertainty left in the value of pi after data of covariance S.

    `features` (..., X, Y, d), `target_log` (..., X, Y), `covariance` S (..., d, d) positive definite, `reference_feature` nu
    (..., d), `contexts` (..., X), uniform where left out. Source: [IT] arXiv 2312.11456.
    """
    expected = (target_log.exp()[..., None] * features).sum(-2)
    residual = _mean(expected.mT, None if contexts is None else contexts[..., None, :]) - reference_feature
    solved = torch.linalg.solve_triangular(cholesky(covariance, "covariance"), residual[..., None], upper=False)
    return solved.squeeze(-1).norm(dim=-1)


def _mean(values: Tensor, contexts: Tensor | None) -> Tensor:
    return values.mean(-1) if contexts is None else (contexts * values).sum(-1)
