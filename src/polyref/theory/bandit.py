"""The finite KL-regularised bandit: contexts x ~ rho, actions y, rewards r(x, y), K references with weights a, a strength beta.

Everything is exact, in torch float64 and in nats. Leading axes "..." are replicates: any number, broadcast between the fields.
X contexts, Y actions, K references (last, as in `polyref.references.compose`), d features. Members of weight 0 are removed:
whatever they hold, NaN included, reaches nothing. An action set is where the mixture M_a has mass; elsewhere every policy has
none, and rewards are ignored (and held as 0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from polyref.errors import ConfigError, ReferenceSetError
from polyref.references.compose import Composition, arithmetic, check_weights, geometric
from polyref.theory.checks import (
    check_actions,
    check_beta,
    check_contexts,
    check_members,
    check_rewards,
    check_shapes,
    first,
    shown,
)

TensorLike = Tensor | ArrayLike
"""A tensor, or what `torch.as_tensor` makes one of."""


@dataclass(frozen=True, eq=False)
class FiniteBandit:
    """One problem, or a batch of replicates of it, checked on construction and held in float64.

    ConfigError for rewards that are not finite on the action set, an empty action set, contexts off the simplex, beta <= 0 and
    shapes that do not match; ReferenceSetError for weights off the simplex and references that are no distributions. A
    reference without mass where another has some is refused by `geometric`, where it matters; the mixture allows it.
    """

    rewards: Tensor
    """(..., X, Y)."""
    logps: Tensor
    """(..., X, Y, K): log pi_i(y|x), each reference of positive weight summing to 1 over Y; -inf is no mass."""
    weights: Tensor
    """(K,), or one row a context (..., X, K), on the simplex."""
    beta: float
    """Strength of the KL, in reward units per nat, > 0."""
    contexts: Tensor = field(default_factory=lambda: torch.empty(0))
    """(..., X): rho, on the simplex. Left out (or empty): uniform."""
    features: Tensor | None = None
    """(..., X, Y, d), or none."""
    theta: Tensor | None = None
    """(..., d): the parameter of linear rewards, kept for comparison; or none."""

    def __post_init__(self) -> None:
        for name in ("rewards", "logps", "contexts", "features", "theta"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, torch.as_tensor(value, dtype=torch.float64))
        if self.contexts.numel() == 0 and self.rewards.dim() > 1:
            uniform = self.rewards.new_full((self.rewards.shape[-2],), 1 / max(1, self.rewards.shape[-2]))
            object.__setattr__(self, "contexts", uniform)
        weights = check_weights(torch.as_tensor(self.weights, dtype=torch.float64))
        object.__setattr__(self, "weights", weights / weights.sum(-1, keepdim=True))
        object.__setattr__(self, "beta", check_beta(self.beta))
        check_shapes(self._tensors())
        check_contexts(self.contexts)
        check_members(self.logps, _aligned(self.weights))
        supported = check_actions(self.mixture)
        check_rewards(self.rewards, supported)
        if not supported.all():
            object.__setattr__(self, "rewards", self.rewards.masked_fill(~supported, 0.0))

    @classmethod
    def tabular(
        cls,
        rewards: TensorLike,
        logps: TensorLike,
        weights: TensorLike | None = None,
        *,
        beta: float,
        contexts: TensorLike | None = None,
        features: TensorLike | None = None,
        theta: TensorLike | None = None,
    ) -> FiniteBandit:
        """From rewards (..., X, Y) and references (..., X, Y, K); weights and contexts are uniform where left out."""
        r, members = _doubles(rewards), _doubles(logps)
        number = max(1, members.shape[-1] if members.dim() else 0)
        a = torch.full((number,), 1 / number, dtype=torch.float64) if weights is None else _doubles(weights)
        rho = torch.empty(0) if contexts is None else _doubles(contexts)
        phi, parameter = (None if value is None else _doubles(value) for value in (features, theta))
        return cls(r, members, a, beta, rho, phi, parameter)

    @classmethod
    def linear(
        cls,
        features: TensorLike,
        theta: TensorLike,
        logps: TensorLike,
        weights: TensorLike | None = None,
        *,
        beta: float,
        contexts: TensorLike | None = None,
    ) -> FiniteBandit:
        """Rewards <theta, phi(x, y)> of features (..., X, Y, d) and theta (..., d)."""
        features, theta = _doubles(features), _doubles(theta)
        if features.dim() < 3 or theta.dim() < 1 or features.shape[-1] != theta.shape[-1]:
            raise ConfigError(
                f"features of shape {tuple(features.shape)} do not fit theta of shape {tuple(theta.shape)}",
                fix="give features (..., X, Y, d) and theta (..., d)",
            )
        rewards = (features * theta[..., None, None, :]).sum(-1)
        return cls.tabular(rewards, logps, weights, beta=beta, contexts=contexts, features=features, theta=theta)

    @property
    def size(self) -> tuple[int, int, int]:
        """(X, Y, K)."""
        contexts, actions, members = self.logps.shape[-3:]
        return contexts, actions, members

    @property
    def replicates(self) -> torch.Size:
        """The leading axes "...", broadcast over all fields."""
        return check_shapes(self._tensors())

    def _tensors(self) -> dict[str, Tensor | None]:
        names = ("rewards", "logps", "weights", "contexts", "features", "theta")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def mixture(self) -> Tensor:
        """log M_a = log sum_i a_i pi_i, (..., X, Y)."""
        return composed(arithmetic, self.logps, self.weights)

    @cached_property
    def log_product(self) -> Tensor:
        """sum_i a_i log pi_i, (..., X, Y): log G_a + log F_a.

        ReferenceSetError where one reference has no mass on an action that another one supports.
        """
        product = composed(geometric, self.logps, self.weights)
        if (row := first(product.isneginf() & ~self.mixture.isneginf())) is not None:
            empty = (self.logps.isneginf() & (_aligned(self.weights) > 0)).expand(*product.shape, self.size[-1])[row]
            raise ReferenceSetError(
                f"reference {int(empty.nonzero()[0])} has no mass there, and another reference has some",
                where=f"context and action {shown(row)} of log-probabilities {tuple(self.logps.shape)}",
                fix="compose arithmetically, give that reference weight 0 in this context, or drop the action",
            )
        return product

    @cached_property
    def log_f(self) -> Tensor:
        """log F_a(x) = log sum_y prod_i pi_i^{a_i} <= 0, (..., X)."""
        return self.log_product.logsumexp(-1)

    @cached_property
    def geometric(self) -> Tensor:
        """log G_a, normalised, (..., X, Y)."""
        return self.log_product - self.log_f[..., None]

    def mean(self, values: Tensor) -> Tensor:
        """E_x of values (..., X): (...)."""
        return (self.contexts * values).sum(-1)


def random_bandit(
    generator: torch.Generator,
    *,
    contexts: int,
    actions: int,
    references: int,
    beta: float,
    replicates: Sequence[int] = (),
    features: int | None = None,
    weights: Tensor | Sequence[float] | None = None,
    reward_range: float = 1.0,
    spread: float = 1.0,
    coverage: float | None = None,
) -> FiniteBandit:
    """A random problem: references softmax(spread * normal), weights uniform where left out, contexts uniform.

    `features` None: rewards uniform on [0, reward_range]. `features` d: rewards <theta, phi>, phi uniform in the unit ball and
    theta on the sphere of radius `reward_range`. `coverage`: see `with_coverage`.
    """
    shape = (*replicates, contexts, actions)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    logps = (spread * normal(*shape, references)).log_softmax(-2)
    if features is None:
        rewards = reward_range * torch.rand(shape, generator=generator, dtype=torch.float64)
        bandit = FiniteBandit.tabular(rewards, logps, weights, beta=beta)
    else:
        radius = torch.rand((*shape, 1), generator=generator, dtype=torch.float64) ** (1 / features)
        phi = radius * torch.nn.functional.normalize(normal(*shape, features), dim=-1)
        theta = reward_range * torch.nn.functional.normalize(normal(*replicates, features), dim=-1)
        bandit = FiniteBandit.linear(phi, theta, logps, weights, beta=beta)
    return bandit if coverage is None else with_coverage(bandit, coverage)


def with_coverage(bandit: FiniteBandit, mass: float) -> FiniteBandit:
    """The same problem with every reference given probability exactly `mass` in (0, 1) on the best action of each context.

    The other actions keep their proportions. As mass falls, data drawn from the references covers the optimum worse: its
    density ratio to M_a on that action, and to G_a up to F_a, grows as 1/mass. ConfigError where a reference of positive weight
    has no other action to give the rest to.
    """
    if not 0 < mass < 1:
        raise ConfigError(f"coverage is {mass}", fix="give a probability strictly between 0 and 1")
    best = bandit.rewards.masked_fill(bandit.mixture.isneginf(), -math.inf).argmax(-1, keepdim=True)
    chosen = torch.zeros(best.shape[:-1] + bandit.size[1:2], dtype=torch.bool).scatter(-1, best, True)[..., None]
    others = bandit.logps.masked_fill(chosen, -math.inf).logsumexp(-2, keepdim=True)
    if (row := first((others.isneginf() & (_aligned(bandit.weights) > 0))[..., 0, :])) is not None:
        raise ConfigError(
            f"context and reference {shown(row)} have no mass beside the best action, of {bandit.size[1]}",
            where=f"coverage {mass}",
            fix="give every reference mass on at least two actions",
        )
    rest = bandit.logps - others + math.log1p(-mass)
    return replace(bandit, logps=torch.where(chosen, math.log(mass), rest))


def _doubles(values: TensorLike) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def composed(compose: Composition, logps: Tensor, weights: Tensor) -> Tensor:
    """The composition of logps (..., X, Y, K) by weights (K,) or (..., X, K), replicates broadcast: (..., X, Y)."""
    weights = _aligned(weights)
    if weights.dim() == 1:
        return compose(logps, weights)
    shape = torch.broadcast_shapes(logps.shape, weights.shape)
    return compose(logps.expand(shape), weights.expand(*shape[:-2], 1, shape[-1]))


def _aligned(weights: Tensor) -> Tensor:
    """(K,), or (..., X, K) with an axis for the actions: (..., X, 1, K)."""
    return weights if weights.dim() == 1 else weights.unsqueeze(-2)
