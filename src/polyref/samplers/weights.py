"""Log-weights of samples: how many draws they are worth, the mean they estimate, and resampling. Pure functions."""

from __future__ import annotations

import math

import torch
from scipy.special import betaincinv, ndtri
from torch import Tensor

from polyref.errors import ConfigError, DataError
from polyref.objectives.metrics import Interval


def effective_size(log_weights: Tensor) -> Tensor:
    """ESS = (sum w)^2 / sum w^2, in [1, N]: log-weights (..., N) to (...). 0 where every weight is 0."""
    return (2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1)).exp().nan_to_num(nan=0.0)


def mean_one(log_weights: Tensor) -> Tensor:
    """Log-weights (..., N) shifted so that the weights have mean 1."""
    return log_weights.log_softmax(-1) + math.log(log_weights.shape[-1])


def log_mean(log_weights: Tensor, level: float = 0.95) -> Interval:
    """log of the mean of N independent weights (N,), with a normal interval of that log by the delta method.

    The standard error of the log is sqrt((N/ESS - 1)/(N - 1)). Where the ESS is a handful, the largest weights have probably
    not been seen: the estimate is then too low, and the interval too short. NaN ends for N = 1.
    """
    log_weights = check_log_weights(log_weights)
    n = log_weights.shape[-1]
    mean = float(log_weights.logsumexp(-1)) - math.log(n)
    if n == 1:
        return Interval(mean, math.nan, math.nan)
    error = math.sqrt(max(n / float(effective_size(log_weights)) - 1, 0.0) / (n - 1)) * float(ndtri((1 + _level(level)) / 2))
    return Interval(mean, mean - error, mean + error)


def acceptance_rate(accepted: int, proposals: int, *, stopped: bool = False, level: float = 0.95) -> Interval:
    """The probability that a proposal is accepted, estimated without bias, and its exact (Clopper-Pearson) interval.

    `accepted` / `proposals` at a number of proposals that was fixed; (k - 1)/(N - 1) where drawing `stopped` at the k-th
    acceptance. (At the first there is no useful unbiased one, and 1/N is given.)
    """
    k, n, tail = accepted, proposals, (1 - _level(level)) / 2
    if not 0 <= k <= n or n < 1 or (stopped and k < 1):
        raise ConfigError(f"{k} of {n} proposals accepted", fix="give counts, 0 <= accepted <= proposals, at least 1 proposal")
    estimate = (k - 1) / (n - 1) if stopped and k > 1 else k / n
    low = float(betaincinv(k, n - k + 1, tail)) if k else 0.0
    high = float(betaincinv(k if stopped else k + 1, n - k, 1 - tail)) if k < n else 1.0
    return Interval(estimate, low, high)


def systematic(log_weights: Tensor, n: int, uniform: float) -> Tensor:
    """Indices (n,) by systematic resampling: index j comes floor or ceil of n w_j times, n w_j on average (w of sum 1).

    `uniform` in [0, 1) is the one random number it takes. Indices ascend, and are not independent of each other. DataError
    where no weight is positive; ConfigError for n < 1 or another uniform.
    """
    if n < 1 or not 0 <= uniform < 1:
        raise ConfigError(f"n is {n}, uniform {uniform}", where="systematic", fix="give n >= 1 and a uniform in [0, 1)")
    cumulative = check_log_weights(log_weights).softmax(-1).cumsum(-1)
    points = (torch.arange(n, dtype=torch.float64, device=cumulative.device) + uniform) / n * cumulative[-1]
    last = int(log_weights.isfinite().nonzero()[-1])  # rounding must not step over the last weight that is positive
    return torch.searchsorted(cumulative, points, right=True).clamp(max=last)


def check_log_weights(log_weights: Tensor) -> Tensor:
    """`log_weights` (N,) in float64. DataError for none, for NaN or +inf, and where every weight is 0."""
    if log_weights.dim() != 1 or not len(log_weights):
        raise DataError(f"log-weights have shape {tuple(log_weights.shape)}", fix="give (N,), at least one")
    if bad := (log_weights.isnan() | log_weights.isposinf()).nonzero().flatten().tolist():
        raise DataError(f"is {log_weights[bad[0]].item()}", where=f"log-weight {bad[0] + 1}", fix="give -inf or finite numbers")
    if not log_weights.isfinite().any():
        raise DataError(f"all {len(log_weights)} weights are 0", fix="give at least one sample that the target allows")
    return log_weights.to(torch.float64)


def _level(level: float) -> float:
    if 0 < level < 1:
        return level
    raise ConfigError(f"level is {level}", fix="give a value between 0 and 1, such as 0.95")
