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
from torch import Tensor

from polyref.errors import ConfigError, ReferenceSetError
from polyref.references.compose import SIMPLEX_TOLERANCE, Composition, arithmetic, check_weights, geometric


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
        object.__setattr__(self, "weights", check_weights(torch.as_tensor(self.weights, dtype=torch.float64)))
        check_beta(self.beta)
        self._check_shapes()
        self._check_members()
        supported = check_actions(self.mixture)
        check_rewards(self.rewards, supported)
        if not supported.all():
            object.__setattr__(self, "rewards", self.rewards.masked_fill(~supported, 0.0))
        rho = self.contexts
        if not ((rho >= 0).all() and ((rho.sum(-1) - 1).abs() <= SIMPLEX_TOLERANCE).all()):
            raise ConfigError(
                f"contexts of shape {tuple(rho.shape)} are not on the simplex", fix="give rho >= 0 that sums to 1"
            )

    @classmethod
    def tabular(
        cls,
        rewards: Tensor,
        logps: Tensor,
        weights: Tensor | Sequence[float] | None = None,
        *,
        beta: float,
        contexts: Tensor | None = None,
        features: Tensor | None = None,
        theta: Tensor | None = None,
    ) -> FiniteBandit:
        """From rewards (..., X, Y) and references (..., X, Y, K); weights and contexts are uniform where left out."""
        members = logps.shape[-1] if logps.dim() else 0
        a = torch.full((members,), 1 / max(1, members)) if weights is None else torch.as_tensor(weights)
        rho = torch.empty(0) if contexts is None else contexts
        return cls(rewards, logps, a.to(torch.float64), beta, rho, features, theta)

    @classmethod
    def linear(
        cls,
        features: Tensor,
        theta: Tensor,
        logps: Tensor,
        weights: Tensor | Sequence[float] | None = None,
        *,
        beta: float,
        contexts: Tensor | None = None,
    ) -> FiniteBandit:
        """Rewards <theta, phi(x, y)> of features (..., X, Y, d) and theta (..., d)."""
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
        own = self.weights.shape[:-2] if self.weights.dim() > 1 else ()
        shapes = [self.rewards.shape[:-2], self.logps.shape[:-3], own, self.contexts.shape[:-1]]
        shapes += [] if self.features is None else [self.features.shape[:-3]]
        shapes += [] if self.theta is None else [self.theta.shape[:-1]]
        return torch.broadcast_shapes(*shapes)

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
        refused = product.isneginf() & ~self.mixture.isneginf()
        if refused.any():
            row = tuple(refused.nonzero()[0].tolist())
            kept = (_aligned(self.weights) > 0).expand(*refused.shape, self.size[-1])
            empty = self.logps.isneginf().expand_as(kept)[row] & kept[row]
            raise ReferenceSetError(
                f"reference {int(empty.nonzero()[0])} has no mass there, and another reference has some",
                where=f"context and action {_shown(row)} of log-probabilities {tuple(self.logps.shape)}",
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

    def _check_shapes(self) -> None:
        r, p = self.rewards.shape, self.logps.shape
        x_y = tuple(r[-2:])
        fits = len(r) > 1 and len(p) > 2 and tuple(p[-3:-1]) == x_y and self.contexts.shape[-1:] == r[-2:-1]
        fits = fits and self.weights.shape[-1] == p[-1] and self.weights.shape[-2:-1] in ((), r[-2:-1])
        if self.features is not None:
            fits = fits and self.features.dim() > 2 and tuple(self.features.shape[-3:-1]) == x_y
        try:
            fits = fits and self.replicates is not None
        except RuntimeError:
            fits = False
        if not fits:
            named = ("rewards", "logps", "weights", "contexts") + (() if self.features is None else ("features",))
            shown = ", ".join(f"{name} {tuple(getattr(self, name).shape)}" for name in named)
            raise ConfigError(
                f"the shapes do not fit: {shown}",
                fix="give rewards (..., X, Y), logps (..., X, Y, K), weights (K,) or (..., X, K), contexts (..., X), "
                "features (..., X, Y, d), with leading axes that broadcast",
            )
        if 0 in r[-2:]:
            raise ConfigError(f"rewards of shape {tuple(r)} hold no action", fix="give at least one context and one action")

    def _check_members(self) -> None:
        shape = torch.broadcast_shapes(self.logps.shape, _aligned(self.weights).shape)
        kept = (_aligned(self.weights) > 0).expand(shape)
        mass = self.logps.expand(shape).masked_fill(~kept, -math.inf).exp().sum(-2)
        wrong = ~((mass - 1).abs() <= SIMPLEX_TOLERANCE) & kept[..., 0, :] & (mass != 0)
        if wrong.any():
            row = tuple(wrong.nonzero()[0].tolist())
            raise ReferenceSetError(
                f"the probabilities sum to {float(mass[row]):.6g} over the actions",
                where=f"context and reference {_shown(row)} of log-probabilities {tuple(self.logps.shape)}",
                fix="give log-probabilities that are normalised over the actions",
            )
        empty = (mass == 0) & kept[..., 0, :]
        if empty.any():
            row = tuple(empty.nonzero()[0].tolist())
            raise ConfigError(
                "the action set is empty: every log-probability is -inf",
                where=f"context and reference {_shown(row)} of log-probabilities {tuple(self.logps.shape)}",
                fix="give that reference mass on some action, or weight 0 in this context",
            )


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
    density ratio to M_a on that action, and to G_a up to F_a, grows as 1/mass.
    """
    if not 0 < mass < 1:
        raise ConfigError(f"coverage is {mass}", fix="give a probability strictly between 0 and 1")
    best = bandit.rewards.masked_fill(bandit.mixture.isneginf(), -math.inf).argmax(-1, keepdim=True)
    chosen = torch.zeros(best.shape[:-1] + bandit.size[1:2], dtype=torch.bool).scatter(-1, best, True)[..., None]
    others = bandit.logps.masked_fill(chosen, -math.inf).logsumexp(-2, keepdim=True)
    rest = bandit.logps - others + math.log1p(-mass)
    return replace(bandit, logps=torch.where(chosen, math.log(mass), rest))


def composed(compose: Composition, logps: Tensor, weights: Tensor) -> Tensor:
    """The composition of logps (..., X, Y, K) by weights (K,) or (..., X, K), replicates broadcast: (..., X, Y)."""
    weights = _aligned(weights)
    if weights.dim() == 1:
        return compose(logps, weights)
    shape = torch.broadcast_shapes(logps.shape, weights.shape)
    return compose(logps.expand(shape), weights.expand(*shape[:-2], 1, shape[-1]))


def check_beta(beta: float) -> float:
    """`beta` where it is a finite number above 0; else ConfigError."""
    if isinstance(beta, (int, float)) and 0 < beta < math.inf:
        return float(beta)
    raise ConfigError(f"beta is {beta}", fix="give a finite number above 0")


def check_actions(anchor_log: Tensor) -> Tensor:
    """Where `anchor_log` (..., X, Y) has mass, boolean; ConfigError where a context has none, or where it holds NaN or +inf."""
    if broken := _first(anchor_log.isnan() | anchor_log.isposinf()):
        raise ConfigError(
            f"context and action {broken[0]} of log-probabilities {tuple(anchor_log.shape)} is not a log-probability",
            fix="give -inf or finite numbers",
        )
    supported = ~anchor_log.isneginf()
    if empty := _first(~supported.any(-1)):
        raise ConfigError(
            f"the action set of context {empty[0]} is empty in log-probabilities {tuple(anchor_log.shape)}",
            fix="give every context at least one action with mass",
        )
    return supported


def check_rewards(rewards: Tensor, supported: Tensor) -> None:
    """ConfigError naming the first reward (..., X, Y) that is not finite although its action is supported."""
    if row := _first(~rewards.isfinite() & supported):
        raise ConfigError(
            f"rewards of shape {tuple(rewards.shape)} are not finite at context and action {row[0]}",
            fix="give finite rewards wherever a reference has mass",
        )


def _first(flags: Tensor) -> list[str]:
    """The first index at which `flags` holds, shown, or nothing."""
    return [_shown(flags.nonzero()[0].tolist())] if flags.any() else []


def _shown(row: Sequence[int]) -> str:
    return f"({', '.join(map(str, row))})"


def _aligned(weights: Tensor) -> Tensor:
    """(K,), or (..., X, K) with an axis for the actions: (..., X, 1, K)."""
    return weights if weights.dim() == 1 else weights.unsqueeze(-2)
