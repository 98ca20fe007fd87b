"""Who prefers what: laws P(y1 beats y2 | x) on finite action sets, Bradley-Terry or not, and the law of the pairs compared.

A preference is a tensor (..., X, Y, Y) with P + P^T = 1: entry [x, i, j] is the probability that i beats j in context x, 1/2 on
the diagonal. Rewards (..., X, Y) are finite, in the units of a log-odds. Every law but `bradley_terry` is misspecified for the
Bradley-Terry likelihood: what that likelihood then estimates is the pseudo-true reward, which depends on the pairs compared.
Sources: [VR] arXiv 2504.03784, section on misspecification; [IT] 2312.11456.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from polyref.errors import ConfigError

Misspecification = Callable[[Tensor, torch.Generator], Tensor]
"""(rewards (..., X, Y), generator) -> preference (..., X, Y, Y)."""


def bradley_terry(rewards: Tensor) -> Tensor:
    """P(i beats j) = s(r_i - r_j), s the logistic function: rewards (..., X, Y) to (..., X, Y, Y)."""
    return torch.sigmoid(_differences(_finite(rewards)))


def intransitive(rewards: Tensor, strength: float, skew: Tensor | torch.Generator) -> Tensor:
    """P(i beats j) = s(r_i - r_j + strength S_ij), S skew-symmetric: no reward explains it.

    `skew` is S (..., X, Y, Y), or a generator, which seats the actions of each context around a circle in random order:
    S_ij = sin(2 pi (seat_j - seat_i)/Y), so an action beats those that sit within half a turn ahead. A strength of a few reward
    ranges then makes cycles i > j > k > i. ConfigError for fewer than 3 actions, or S + S^T != 0.
    """
    rewards, actions = _finite(rewards), rewards.shape[-1]
    if actions < 3:
        raise ConfigError(f"no cycle among {actions} actions", where="intransitive", fix="give at least 3 actions a context")
    if isinstance(skew, torch.Generator):
        seats = torch.rand(rewards.shape, generator=skew, dtype=torch.float64).argsort(-1).to(torch.float64)
        skew = torch.sin(-2 * math.pi / actions * _differences(seats))
    elif skew.shape[-2:] != (actions, actions) or not torch.allclose(skew, -skew.mT):
        raise ConfigError(
            f"skew {tuple(skew.shape)} is not skew-symmetric (..., X, {actions}, {actions})", where="intransitive"
        )
    return torch.sigmoid(_differences(rewards) + strength * (skew - skew.mT) / 2)


def heteroscedastic(rewards: Tensor, scales: Tensor) -> Tensor:
    """P(i beats j) = s((r_i - r_j)/sqrt((c_i^2 + c_j^2)/2)): actions with a large scale c (..., X, Y) > 0 are hard to judge.

    Scales of 1 are Bradley-Terry.
    """
    rewards = _finite(rewards)
    scales = scales.to(torch.float64)
    if not (scales.isfinite() & (scales > 0)).all():
        raise ConfigError("scales are not all finite and above 0", where=f"scales {tuple(scales.shape)}")
    squares = scales**2
    return torch.sigmoid(_differences(rewards) * ((squares[..., :, None] + squares[..., None, :]) / 2).rsqrt())


def lapses(preference: Tensor, rate: float) -> Tensor:
    """(1 - rate) P + rate/2: with probability `rate` in [0, 1] the annotator answers at random."""
    if not 0 <= rate <= 1:
        raise ConfigError(f"lapse rate is {rate}", fix="give a rate between 0 and 1")
    return (1 - rate) * preference + rate / 2


def group_mixture(rewards: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """sum_g share_g s(r_g(i) - r_g(j)): each annotator belongs to one of the groups, each of which is Bradley-Terry."""
    if len(rewards) != len(shares) or not rewards:
        raise ConfigError(f"{len(rewards)} reward tables for {len(shares)} shares", fix="give one share a group, at least one")
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(f"shares {list(shares)} are not on the simplex", fix="give shares >= 0 that sum to 1")
    mixed = [share * bradley_terry(table) for share, table in zip(shares, rewards, strict=True)]
    return torch.stack(torch.broadcast_tensors(*mixed)).sum(0)


def pair_law(contexts: Tensor, log_mu1: Tensor, log_mu2: Tensor | None = None, *, distinct: bool = True) -> Tensor:
    """The joint law of (x, y1, y2): rho(x) mu1(y1|x) mu2(y2|x), mu2 = mu1 unless given; (..., X, Y, Y), of sum 1.

    `contexts` rho (..., X); log mu (..., X, Y) in nats, normalised over actions, -inf where there is no mass. `distinct` draws
    again until y1 != y2, which changes the law of the actions but not that of the contexts; independent pairs, as ipo and the
    doubly robust value need, take distinct=False. ConfigError for a context whose pairs could never be distinct.
    """
    mu1, mu2 = log_mu1.exp(), (log_mu1 if log_mu2 is None else log_mu2).exp()
    for name, mu in (("log_mu1", mu1), ("log_mu2", mu2)):
        if not ((mu.sum(-1) - 1).abs() <= 1e-6).all():
            raise ConfigError("does not hold a normalised log-probability", where=f"{name} {tuple(mu.shape)}")
    joint = mu1[..., :, None] * mu2[..., None, :]
    if distinct:
        joint = joint.masked_fill(torch.eye(joint.shape[-1], dtype=torch.bool), 0.0)
        mass = joint.sum((-2, -1), keepdim=True)
        if not (mass > 0).all():
            context = (mass[..., 0, 0] <= 0).nonzero()[0].tolist()
            raise ConfigError("a single action holds all the mass", where=f"context {context}", fix="take distinct=False")
        joint = joint / mass
    return contexts[..., None, None] * joint


def _intransitive(rewards: Tensor, generator: torch.Generator) -> Tensor:
    return intransitive(rewards, 2.0, generator)


def _heteroscedastic(rewards: Tensor, generator: torch.Generator) -> Tensor:
    return heteroscedastic(rewards, (2 * torch.rand(rewards.shape, generator=generator, dtype=torch.float64) - 1).mul(2).exp2())


def _groups(rewards: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.rand(rewards.shape, generator=generator, dtype=torch.float64).argsort(-1)
    return group_mixture([3 * rewards, 3 * rewards.gather(-1, order)], [0.65, 0.35])


MISSPECIFICATIONS: Final[Mapping[str, Misspecification]] = MappingProxyType(
    {
        "bradley_terry": lambda rewards, generator: bradley_terry(rewards),
        "intransitive": _intransitive,
        "heteroscedastic": _heteroscedastic,
        "lapses": lambda rewards, generator: lapses(bradley_terry(rewards), 0.2),
        "groups": _groups,
    }
)
"""Laws by name. bradley_terry is the well-specified one; intransitive: strength 2 around random circles; heteroscedastic:
scales log-uniform in [1/4, 4]; lapses: one answer in five is random; groups: 65% follow 3 r, 35% the same values on permuted
actions, so the crowd is divided but each group is sure of itself."""


def _finite(rewards: Tensor) -> Tensor:
    if rewards.dim() < 2 or not rewards.isfinite().all():
        raise ConfigError("are not finite numbers (..., X, Y)", where=f"rewards {tuple(rewards.shape)}")
    return rewards.to(torch.float64)


def _differences(values: Tensor) -> Tensor:
    return values[..., :, None] - values[..., None, :]
