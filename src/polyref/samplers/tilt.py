"""From draws of a base law to draws of its tilt base(y) exp(r(y)/beta) / Z, one prompt at a time. Pure functions.

`proposals` are independent draws of the base, known here by their rewards (N,) alone; what comes out are indices into them.
To tilt by any other log-ratio s(y), as log target(y) - log proposal(y), pass it as rewards with beta 1. Sources: [RSO] arXiv
2309.06657, [MR] 2502.01203.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from polyref.errors import ConfigError, DataError
from polyref.objectives.metrics import Interval
from polyref.samplers.weights import acceptance_rate, check_log_weights, effective_size, log_mean, mean_one, systematic
from polyref.theory.solutions import solve_forward_kl


@dataclass(frozen=True, eq=False)
class Kept:
    """What is kept of N proposals of one prompt. `exact`: the kept are independent draws of exactly the law asked for.

    `note` says in one line which law that is or what is approximate about it.
    """

    indices: Tensor
    """(S,) int64, which proposals; one that was resampled twice comes twice."""
    log_weights: Tensor
    """(S,) float64, of mean weight 1: all 0 where the kept count alike."""
    acceptance: Interval | None
    """The probability that a proposal is accepted; None where none is rejected."""
    ess: float
    """How many independent draws the kept are worth."""
    log_z: Interval | None
    """log Z = log E_base exp(r/beta) in nats; None where the law kept is no tilt."""
    proposals: int
    exact: bool
    note: str


class ForwardWeights(NamedTuple):
    """Weights (..., N) of mean 1, and t = lambda - max_j r_j in (0, beta], (...), in reward units."""

    weights: Tensor
    normaliser: Tensor


def accepted(rewards: Tensor, uniforms: Tensor, beta: float, bound: Tensor) -> Tensor:
    """Where u < exp((r - bound)/beta): rewards and uniforms (..., N), bound (..., 1), to bool (..., N).

    One uniform a proposal serves every bound: raising the bound keeps each of the accepted with probability
    exp((old - new)/beta), independently, which is the re-thinning that a new maximum asks for.
    """
    return uniforms < ((rewards - bound) / beta).exp()


def reject(
    rewards: Tensor,
    uniforms: Tensor,
    beta: float,
    *,
    r_max: float | None = None,
    wanted: int | None = None,
    level: float = 0.95,
) -> Kept:
    """Rejection sampling of the tilt: each proposal is kept with probability exp((r - r_max)/beta) [RSO].

    Exact for an `r_max` that is an upper bound of r on the support. Without one the largest reward proposed takes its place, as
    if earlier accepts had been thinned again at every new maximum; so it does for an `r_max` that a proposal exceeds. Both are
    consistent as N grows, too kind to the best proposals at any N, and not `exact`.

    rewards (N,), uniforms (N,) independent in [0, 1). With `wanted`, the first that many of the kept. log Z comes with an exact
    interval for a known r_max (low = -inf where none is accepted), else with that of `log_mean`. Nothing accepted is an empty
    `Kept`. DataError for no rewards or one that is not finite; ConfigError for beta <= 0, wanted < 1, an r_max not finite, or
    other uniforms.
    """
    rewards = _checked(rewards, beta)
    if uniforms.shape != rewards.shape or not ((uniforms >= 0) & (uniforms < 1)).all():
        raise ConfigError(f"uniforms {tuple(uniforms.shape)} for {len(rewards)} rewards", fix="give one in [0, 1) a reward")
    if wanted is not None and wanted < 1:
        raise ConfigError(f"wanted is {wanted}", fix="ask for at least 1 sample")
    if r_max is not None and not math.isfinite(r_max / beta):
        raise ConfigError(f"r_max is {r_max}", fix="give a finite upper bound of the reward, or none")
    best = float(rewards.max())
    exact = r_max is not None and best <= r_max
    bound = r_max if r_max is not None and exact else best
    passed = accepted(rewards, uniforms, beta, rewards.new_tensor([bound])).nonzero()[:, 0]
    indices = passed[:wanted]
    if exact and len(indices) == wanted:  # later proposals may be there or not for any reason: left out
        rate = acceptance_rate(len(indices), int(indices[-1]) + 1, stopped=True, level=level)
    else:
        rate = acceptance_rate(len(passed), len(rewards), level=level)
    if exact:
        log_z = Interval(*(_log(end) + bound / beta for end in rate))
        note = f"exact if {bound:g} bounds the reward: none proposed is above"
    elif r_max is None:
        log_z, note = log_mean(rewards / beta, level), f"approximate: r_max is not known, {bound:g} is the largest reward seen"
    else:
        log_z = log_mean(rewards / beta, level)
        note = f"approximate: a reward of {best:g} is above the r_max of {r_max:g} that was claimed"
    weights = torch.zeros(len(indices), dtype=torch.float64)
    return Kept(indices, weights, rate, float(len(indices)), log_z, len(rewards), exact, note)


def importance(rewards: Tensor, beta: float, *, log_weights: Tensor | None = None, level: float = 0.95) -> Kept:
    """All proposals, weighted by exp(r/beta): self-normalised importance sampling of the tilt.

    Consistent, with a bias of O(1/N); at small ESS the tilt's best completions have not been proposed. `log_weights` (N,) are
    those that the proposals bring, so that their weighted law is the base; independent ones that are not normalised carry their
    mass into Z, and for dependent ones, as of sequential Monte Carlo, the interval of log Z does not hold. DataError and
    ConfigError as for `reject`, and for log-weights.
    """
    scores = _checked(rewards, beta) / beta
    if log_weights is not None:
        if log_weights.shape != scores.shape:
            raise ConfigError(f"log-weights {tuple(log_weights.shape)} for {len(scores)} rewards", fix="give one a reward")
        scores = scores + check_log_weights(log_weights)
    ess = float(effective_size(scores))
    note = f"approximate: weighted, worth {ess:.1f} of {len(scores)} proposals"
    return Kept(torch.arange(len(scores)), mean_one(scores), None, ess, log_mean(scores, level), len(scores), False, note)


def forward(rewards: Tensor, beta: float) -> Kept:
    """All of N draws of the mixture M_a, weighted by `forward_weights`: samples of the optimum under forward KL, M_a w [MR].

    Consistent, with a bias of O(1/N). It is no tilt by exp(r/beta), so there is no log Z. Errors as for `reject`.
    """
    log_weights = forward_weights(_checked(rewards, beta), beta).weights.log()
    ess = float(effective_size(log_weights))
    note = f"approximate: weighted for forward KL, worth {ess:.1f} of {len(log_weights)} draws"
    return Kept(torch.arange(len(log_weights)), log_weights, None, ess, None, len(log_weights), False, note)


def resample(kept: Kept, n: int, uniform: float) -> Kept:
    """`n` of the weighted `kept`, all of weight 1, by systematic resampling; no more independent draws than before."""
    chosen = systematic(kept.log_weights, n, uniform)
    note = f"{kept.note}; resampled to {n}"
    weights = torch.zeros(n, dtype=torch.float64)
    return replace(kept, indices=kept.indices[chosen], log_weights=weights, ess=min(kept.ess, n), exact=False, note=note)


def best_of_n(rewards: Tensor, n: int) -> Kept:
    """The best of each n consecutive proposals; of equals the first, which of independent draws any might have been.

    Exact draws of best-of-n's own law, whose KL to the base is at most `best_of_n_kl(n)`; it is no tilt. ConfigError unless n
    >= 1 divides N; DataError as for `reject`.
    """
    rewards = _checked(rewards, 1.0)
    if n < 1 or len(rewards) % n:
        raise ConfigError(f"best of {n} out of {len(rewards)} proposals", fix="give n >= 1 and a multiple of it in proposals")
    groups = rewards.view(-1, n)
    indices = groups.argmax(-1) + n * torch.arange(len(groups))
    note = f"exact draws of best of {n}, at most {best_of_n_kl(n):.4g} nats of KL from the base; no tilt"
    weights = torch.zeros(len(indices), dtype=torch.float64)
    return Kept(indices, weights, Interval(1 / n, 1 / n, 1 / n), float(len(indices)), None, len(rewards), True, note)


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1)/n nats: no base and no reward puts best-of-n further from its base in KL; reached without ties."""
    if n < 1:
        raise ConfigError(f"n is {n}", fix="give at least 1")
    return math.log(n) - (n - 1) / n


def forward_weights(rewards: Tensor, beta: float) -> ForwardWeights:
    """w_j = beta/(lambda - r_j) with lambda the root of mean_j beta/(lambda - r_j) = 1: what forward KL weights M_a by [MR].

    rewards (..., N) of N draws of the mixture for each prompt, solved apart. Consistent for pi~ = beta M_a/(lambda - r), with a
    bias of O(1/N). Weighted likelihood with these weights has pi~ as its optimum. The solver is that of the exact problem, on
    the law of the draws. Errors as for `reject`.
    """
    flat = _checked(rewards.reshape(-1), beta).view(rewards.shape)
    n = flat.shape[-1]
    solution = solve_forward_kl(flat, torch.full_like(flat, -math.log(n)), beta)
    return ForwardWeights((solution.log_policy + math.log(n)).exp(), solution.normaliser)


def _checked(rewards: Tensor, beta: float) -> Tensor:
    """Rewards in float64; DataError unless (N,) finite, N >= 1, ConfigError unless beta > 0 and r/beta is a float."""
    if not 0 < beta < math.inf:
        raise ConfigError(f"beta is {beta}", fix="give a finite number above 0")
    rewards = rewards.detach().to(torch.float64)
    if rewards.dim() != 1 or not len(rewards):
        raise DataError(f"rewards have shape {tuple(rewards.shape)}", fix="give those of at least one proposal")
    if bad := (~rewards.isfinite()).nonzero().flatten().tolist():
        raise DataError(f"is {rewards[bad[0]].item()}", where=f"reward {bad[0] + 1}", fix="a reward is a finite number")
    if not (rewards / beta).isfinite().all():
        raise ConfigError(f"a reward over beta {beta:g} is beyond float64", fix="give smaller rewards, or a larger beta")
    return rewards


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf
