"""Policies fitted directly on pairs, by minimising the very functions of `polyref.objectives` over free tabular policies.

The policy holds one logit an action. Its implied reward difference is `polyref.references.compose.implied_difference`, so that
what is fitted here is what a language model is trained with, less the language model. Contexts are separate problems, and all
replicates are fitted at once. A tabular policy can imply any reward, so with `sigmoid` the one-stage fit is the tilt of the
Bradley-Terry maximum likelihood, in both directions of the KL (while no ball is active and no log-ratio passes FORWARD_BOUND).

R replicates, X contexts, Y actions, n pairs, M auxiliary pairs; float64. Every fit starts at its anchor and ends with a
gradient of at most `tolerance` a context, in units of its mean loss per nat, or raises PolyrefError. Sources: those of the
objectives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from polyref.errors import ConfigError
from polyref.objectives import PairLoss, doubly_robust_value, variance_reduced
from polyref.references.compose import implied_difference
from polyref.theory.bandit import FiniteBandit
from polyref.theory.checks import check_preference, first, shown
from polyref.theory.descent import TOLERANCE, PolicyObjective, minimise_policies
from polyref.theory.sampling import Pairs


def fit_policy(
    bandit: FiniteBandit,
    wins: Tensor,
    loss: PairLoss,
    composition: str = "geometric",
    divergence: str = "reverse",
    *,
    ridge: float = 0.0,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """argmin_pi sum_ij wins_ij loss(h_ij) + ridge/2 |r|^2, h and r the reward that pi implies: (..., X, Y), log-probabilities.

    `wins` (..., X, Y, Y) >= 0: counts of i preferred to j, or their law. r is centred over the action set, in reward units; a
    ridge > 0 bounds the fit of separable counts (an action that always won) and of `robust`. The loss is smooth: hinge does not
    settle. ConfigError for shapes that do not fit, wins of actions outside the action set, or a negative ridge.
    """
    anchor = _anchor(bandit, composition)
    contexts, actions, _ = bandit.size
    if wins.shape[-3:] != (contexts, actions, actions) or not (wins.isfinite() & (wins >= 0)).all():
        raise ConfigError(f"wins {tuple(wins.shape)} are not counts (..., {contexts}, {actions}, {actions})")
    one, other = torch.triu_indices(actions, actions, offset=1)
    won, lost = wins.to(torch.float64)[..., one, other], wins.to(torch.float64)[..., other, one]
    count = won + lost
    supported = ~anchor.isneginf()
    if (count.gt(0) & ~(supported[..., one] & supported[..., other])).any():
        raise ConfigError(
            "wins of actions that no reference supports", where=f"wins {tuple(wins.shape)}", fix="drop those pairs"
        )
    label = torch.where(count > 0, won / count.clamp(min=math.ulp(0.0)), 0.5)
    total = _total(count.sum(-1))
    implied, penalty = _implied(bandit, composition, divergence), _penalty(bandit, composition, divergence, ridge)

    def objective(log_policy: Tensor) -> Tensor:
        h = implied(log_policy[..., one], log_policy[..., other], _held(anchor)[..., one], _held(anchor)[..., other])
        losses = loss(h, chosen_probability=label.expand(h.shape))
        return ((count * losses).sum(-1) + penalty(log_policy)) / total

    shape = torch.broadcast_shapes(anchor.shape, (*wins.shape[:-2], actions))
    return minimise_policies(objective, anchor.expand(shape), tolerance=tolerance)


def fit_variance_reduced(
    bandit: FiniteBandit,
    pairs: Pairs,
    g: Tensor,
    auxiliary_first: Tensor,
    auxiliary_second: Tensor,
    loss: PairLoss,
    composition: str = "geometric",
    divergence: str = "reverse",
    *,
    control: float = 1.0,
    shares: Tensor | None = None,
    ridge: float = 0.0,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """As `fit_policy`, by `variance_reduced` on pairs (R, n) with an auxiliary model: (R, X, Y), log-probabilities.

    `g` (X, Y, Y) or (R, X, Y, Y) is the model's P(i beats j); auxiliary_first and auxiliary_second (R, n, M) are the actions of
    the auxiliary pairs, in the context of their pair. `shares` (R, n) >= 0 weigh the rows (1 each where left out), so that a
    population can be enumerated. Unbounded below where g disagrees with the data: give a ridge. ConfigError for shapes,
    indices, labels or shares that do not fit, and for pairs of actions outside the action set.
    """
    if auxiliary_first.shape != auxiliary_second.shape or auxiliary_first.shape[:-1] != pairs.z.shape:
        raise ConfigError(
            f"auxiliary actions {tuple(auxiliary_first.shape)} and {tuple(auxiliary_second.shape)} "
            f"do not fit pairs {tuple(pairs.z.shape)}",
            fix="give (R, n, M) of each",
        )
    anchor, weight = _checked(bandit, composition, pairs, shares, auxiliary_first, auxiliary_second)
    g, rows = _checked_model(g, bandit, len(pairs.z)), pairs.contexts
    total = _total(_by_context(weight, rows, bandit))
    drawn = (rows[..., None].expand_as(auxiliary_first), auxiliary_first, auxiliary_second)
    g_pair, g_drawn = _pair_values(g, rows, pairs.first, pairs.second), _pair_values(g, *drawn)
    implied, penalty = _implied(bandit, composition, divergence), _penalty(bandit, composition, divergence, ridge)

    def h(log_policy: Tensor, contexts: Tensor, first: Tensor, second: Tensor) -> Tensor:
        tables = (log_policy, _held(anchor))
        policy_first, anchor_first = (_values(table, contexts, first) for table in tables)
        policy_second, anchor_second = (_values(table, contexts, second) for table in tables)
        return implied(policy_first, policy_second, anchor_first, anchor_second)

    def objective(log_policy: Tensor) -> Tensor:
        h_pair, h_drawn = h(log_policy, rows, pairs.first, pairs.second), h(log_policy, *drawn)
        losses = variance_reduced(h_pair, pairs.z, g_pair, h_drawn, g_drawn, loss, control=control).loss
        return (_by_context(weight * losses, rows, bandit) + penalty(log_policy)) / total

    return minimise_policies(objective, anchor, tolerance=tolerance)


def fit_doubly_robust(
    bandit: FiniteBandit,
    pairs: Pairs,
    g: Tensor,
    log_mu: Tensor,
    composition: str = "geometric",
    *,
    shares: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """argmax_pi mean `doubly_robust_value` - beta KL(pi || anchor), context by context: (R, X, Y), log-probabilities.

    Completions of `pairs` (R, n) are independent draws from mu, `log_mu` (X, Y) or (R, X, Y) is what mu is taken to be, `g` and
    `shares` are as for `fit_variance_reduced`. The direct term is exact, the ratios are not clipped. A context without pairs
    keeps its anchor. Where g or mu is right it tends to anchor exp(P(y beats mu)/beta)/Z. ConfigError as for
    `fit_variance_reduced`, and for a log_mu that gives no mass to an action of a pair.
    """
    anchor, weight = _checked(bandit, composition, pairs, shares)
    g, rows = _checked_model(g, bandit, len(pairs.z)), pairs.contexts
    total = _total(_by_context(weight, rows, bandit))
    g_pair = _pair_values(g, rows, pairs.first, pairs.second)
    columns = [_columns(g, rows, actions) for actions in (pairs.first, pairs.second)]
    against = 0.5 * (columns[0] + columns[1])
    mu_first, mu_second = (_checked_mu(log_mu, pairs, anchor, weight, actions) for actions in (pairs.first, pairs.second))

    def objective(log_policy: Tensor) -> Tensor:
        policy = log_policy.exp()
        direct = (_rows_of(policy, rows) * against).sum(-1)
        ratios = (_values(log_policy, rows, pairs.first) - mu_first, _values(log_policy, rows, pairs.second) - mu_second)
        value = _by_context(weight * doubly_robust_value(pairs.z, g_pair, direct, *ratios), rows, bandit) / total
        supported = ~anchor.isneginf()
        return bandit.beta * (policy * (log_policy - _held(anchor)) * supported).sum(-1) - value

    return minimise_policies(objective, anchor, tolerance=tolerance)


def _anchor(bandit: FiniteBandit, composition: str) -> Tensor:
    """log anchor (..., X, Y), up to a constant of the context."""
    implied_difference(composition, "reverse")  # refuses unknown names
    return bandit.log_product if composition == "geometric" else bandit.mixture


def _implied(bandit: FiniteBandit, composition: str, divergence: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The implied reward difference, with beta bound."""
    return partial(implied_difference(composition, divergence), beta=bandit.beta)


def _penalty(bandit: FiniteBandit, composition: str, divergence: str, ridge: float) -> PolicyObjective:
    """ridge/2 |r|^2 of the implied rewards, centred over the action set: (..., X, Y) to (..., X)."""
    if not 0 <= ridge < math.inf:
        raise ConfigError(f"ridge is {ridge}", fix="give a finite number of at least 0")
    implied, anchor = _implied(bandit, composition, divergence), _anchor(bandit, composition)
    supported = ~anchor.isneginf()
    held, other = _held(anchor), supported.to(torch.float64)[..., None, :]

    def penalty(log_policy: Tensor) -> Tensor:
        if ridge == 0:
            return log_policy.new_zeros(log_policy.shape[:-1])
        h = implied(log_policy[..., :, None], log_policy[..., None, :], held[..., :, None], held[..., None, :])
        rewards = (h * other).sum(-1) / other.sum(-1)
        return ridge / 2 * (rewards**2 * supported).sum(-1)

    return penalty


def _checked(
    bandit: FiniteBandit, composition: str, pairs: Pairs, shares: Tensor | None, *auxiliary: Tensor
) -> tuple[Tensor, Tensor]:
    """log anchor (R, X, Y) and the shares (R, n) in float64; ConfigError unless the pairs, (R, n) each, fit the bandit.

    The actions of pairs and of `auxiliary` pairs (R, n, M) are indices, and supported wherever the share of their pair is > 0.
    """
    anchor, shape = _anchor(bandit, composition), pairs.z.shape
    weight = (torch.ones_like(pairs.z) if shares is None else shares).to(torch.float64)
    fits = len(shape) == 2 and all(part.shape == shape for part in (*pairs, weight))
    if not fits or anchor.shape[:-2] not in ((), (1,), shape[:1]):
        raise ConfigError(
            f"pairs {', '.join(str(tuple(part.shape)) for part in pairs)} and shares {tuple(weight.shape)} do not fit each "
            f"other, or an anchor {tuple(anchor.shape)}",
            fix="give (R, n) of each, R the replicates of the bandit where it has any",
        )
    if not ((pairs.z >= 0) & (pairs.z <= 1)).all() or not ((weight >= 0) & weight.isfinite()).all():
        raise ConfigError("labels z are not in [0, 1], or shares are negative or not finite", where=f"pairs {tuple(shape)}")
    contexts, actions, _ = bandit.size
    named = (("first", pairs.first), ("second", pairs.second), *(("auxiliary", one) for one in auxiliary))
    for name, index, size in (("contexts", pairs.contexts, contexts), *((*one, actions) for one in named)):
        if index.is_floating_point() or not ((index >= 0) & (index < size)).all():
            raise ConfigError(f"holds what is no index below {size}", where=f"{name} {tuple(index.shape)} of the pairs")
    anchor = anchor.expand(*shape[:1], *bandit.size[:2])
    for name, index in named:
        rows, used = (part.view(*shape, *[1] * (index.dim() - 2)).expand(index.shape) for part in (pairs.contexts, weight > 0))
        if (row := first(_values(anchor, rows, index).isneginf() & used)) is not None:
            raise ConfigError(
                f"pair {shown(row)} has an action that no reference supports",
                where=f"{name} {tuple(index.shape)} of the pairs",
                fix="drop those pairs",
            )
    return anchor, weight


def _checked_model(g: Tensor, bandit: FiniteBandit, replicates: int) -> Tensor:
    """g in float64; ConfigError unless it is antisymmetric, (X, Y, Y) or one of those a replicate, in [0, 1]."""
    contexts, actions, _ = bandit.size
    if g.shape[-3:] != (contexts, actions, actions) or g.shape[:-3] not in ((), (1,), (replicates,)):
        raise ConfigError(f"g {tuple(g.shape)} is not ({contexts}, {actions}, {actions}), or one of those a replicate")
    return check_preference(g, "g")


def _checked_mu(log_mu: Tensor, pairs: Pairs, anchor: Tensor, weight: Tensor, actions: Tensor) -> Tensor:
    """log mu (R, n) of `actions`, 0 where the share is; ConfigError for shapes, and where mu gives an action no mass."""
    if log_mu.shape[-2:] != anchor.shape[-2:] or log_mu.shape[:-2] not in ((), (1,), anchor.shape[:1]):
        raise ConfigError(f"log_mu {tuple(log_mu.shape)} is not {tuple(anchor.shape[1:])}, or one of those a replicate")
    found = _values(log_mu.to(torch.float64).expand(anchor.shape), pairs.contexts, actions).masked_fill(weight == 0, 0.0)
    if (row := first(~found.isfinite())) is not None:
        raise ConfigError(
            f"pair {shown(row)} has an action of log-probability {float(found[row])}",
            where=f"log_mu {tuple(log_mu.shape)}",
            fix="give the law that the pairs were drawn from, or an estimate with mass on all of them",
        )
    return found


def _held(anchor: Tensor) -> Tensor:
    """0 for -inf, as `minimise_policies` does with the policy, so that no NaN arises where there is no mass."""
    return anchor.masked_fill(anchor.isneginf(), 0.0)


def _total(weight: Tensor) -> Tensor:
    """A context without pairs divides by 1."""
    return weight.masked_fill(weight == 0, 1.0)


def _values(table: Tensor, contexts: Tensor, actions: Tensor) -> Tensor:
    """table (R, X, Y) at contexts and actions (R, ...): (R, ...)."""
    return table.flatten(1).gather(1, (contexts * table.shape[-1] + actions).flatten(1)).view(actions.shape)


def _pair_values(g: Tensor, contexts: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """g (X, Y, Y) or (R, X, Y, Y) at pairs (R, ...): (R, ...)."""
    size = g.shape[-1]
    return _values(g.expand(len(first), *g.shape[-3:]).flatten(2), contexts, first * size + second)


def _columns(g: Tensor, contexts: Tensor, second: Tensor) -> Tensor:
    """g(y, second) for every y: (R, n, Y)."""
    size = g.shape[-1]
    every = torch.arange(size).expand(*second.shape, size)
    return _pair_values(g, contexts[..., None].expand_as(every), every, second[..., None].expand_as(every))


def _rows_of(table: Tensor, contexts: Tensor) -> Tensor:
    """table (R, X, Y) at contexts (R, n): (R, n, Y)."""
    return table.gather(1, contexts[..., None].expand(*contexts.shape, table.shape[-1]))


def _by_context(values: Tensor, contexts: Tensor, bandit: FiniteBandit) -> Tensor:
    """Sums of values (R, n) over the pairs of each context: (R, X)."""
    return values.new_zeros(len(values), bandit.size[0]).scatter_add(1, contexts, values)
