"""K references become one anchor, and an anchor becomes an implied reward difference: pure functions of tensors.

Everything is at the SEQUENCE level: `logps` holds log pi_i(y|x) summed over the tokens of a completion, in nats, with the K
references on the last axis. Averaging per-token logits and renormalising each token is a different distribution, whose
normalisers depend on the prefix and do not cancel between two completions. Sources: [MR] arXiv 2502.01203, [DPO] 2305.18290.

The functions that compute check shapes only, so that they stay differentiable, traceable and free of device syncs; values are
checked once, where they enter, by `check_weights` and `check_support`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol

import torch
from torch import Tensor

from polyref.errors import ConfigError, ReferenceSetError
from polyref.types import SIMPLEX_TOLERANCE

Composition = Callable[[Tensor, "Tensor | Sequence[float]"], Tensor]
"""(logps (..., K), weights (K,) or (..., K)) -> log anchor (...)."""

FORWARD_BOUND: Final = 5.0
"""Log-ratio beyond which `forward_difference` is linear: exact at the optimum while the reward range is below 147 beta."""


class ImpliedDifference(Protocol):
    """h = r(y_w) - r(y_l), in reward units, from log-probabilities (...) in nats; beta > 0 in reward units per nat."""

    def __call__(
        self, policy_chosen: Tensor, policy_rejected: Tensor, anchor_chosen: Tensor, anchor_rejected: Tensor, beta: float
    ) -> Tensor: ...


def geometric(logps: Tensor, weights: Tensor | Sequence[float]) -> Tensor:
    """log prod_i pi_i(y|x)^{a_i} = sum_i a_i log pi_i(y|x): the anchor of reverse KL to every reference [MR].

    It is log G_a(y|x) up to log F_a(x), which depends on the prompt alone and cancels between its completions.
    `logps` (..., K) in nats and `weights` (K,) or (..., K) give (...). Members of weight 0 are removed: whatever they hold,
    -inf and NaN included, reaches neither the value nor a gradient. ReferenceSetError where the shapes do not match.
    """
    weights = _aligned(logps, weights)
    return (weights * logps.masked_fill(weights == 0, 0.0)).sum(-1)


def arithmetic(logps: Tensor, weights: Tensor | Sequence[float]) -> Tensor:
    """log M_a(y|x) = logsumexp_i(log a_i + log pi_i(y|x)): the anchor of forward KL to every reference [MR].

    Shapes, units, removed members and errors as for `geometric`. M_a is normalised.
    """
    weights = _aligned(logps, weights)
    removed = weights == 0
    return torch.logsumexp(weights.masked_fill(removed, 1.0).log() + logps.masked_fill(removed, -math.inf), dim=-1)


def reverse_difference(
    policy_chosen: Tensor, policy_rejected: Tensor, anchor_chosen: Tensor, anchor_rejected: Tensor, beta: float
) -> Tensor:
    """h = beta [(log pi - log anchor)(y_w) - (log pi - log anchor)(y_l)], the reward difference under reverse KL.

    All log-probabilities (...) in nats; h (...) in reward units; exactly 0 where the policy is the anchor. The anchor may be
    geometric, and need not be normalised over completions, or arithmetic. Sources: [DPO] eq. 5; [MR], reverse KL.
    """
    return beta * ((policy_chosen - anchor_chosen) - (policy_rejected - anchor_rejected))


def forward_difference(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    anchor_chosen: Tensor,
    anchor_rejected: Tensor,
    beta: float,
    bound: float = FORWARD_BOUND,
) -> Tensor:
    """h = beta [M_a/pi (y_l) - M_a/pi (y_w)], the reward difference under forward KL [MR]; the anchor is arithmetic.

    From pi = beta M_a/(lambda - r) follows r = lambda - beta M_a/pi. The ratio is exp(u) of the log-ratio u = log M_a - log pi
    up to `bound`, and beyond it the tangent exp(bound) (1 + u - bound): continuous with its first derivative and finite for any
    finite u, with a gradient that a clamp would kill. At the optimum M_a/pi <= 1 + R/beta, R the range of the reward, so the
    extension changes nothing there when bound >= log(1 + R/beta). Shapes and units as for `reverse_difference`.
    """
    ratio_chosen = _extended_exp(anchor_chosen - policy_chosen, bound)
    ratio_rejected = _extended_exp(anchor_rejected - policy_rejected, bound)
    return beta * (ratio_rejected - ratio_chosen)


COMPOSITIONS: Final[Mapping[str, Composition]] = MappingProxyType({"geometric": geometric, "arithmetic": arithmetic})
"""The composition axis by name."""

_DIFFERENCES: Final[Mapping[tuple[str, str], ImpliedDifference]] = MappingProxyType(
    {
        ("geometric", "reverse"): reverse_difference,
        ("arithmetic", "forward"): forward_difference,
        ("arithmetic", "reverse"): reverse_difference,
    }
)


def implied_difference(composition: str, divergence: str) -> ImpliedDifference:
    """The reward difference implied by a policy whose anchor is COMPOSITIONS[composition], under "reverse" or "forward" KL.

    Three pairs name an objective: (geometric, reverse) and (arithmetic, forward), whose KL goes to every reference, and
    (arithmetic, reverse), reverse KL to the mixture. Raises ConfigError for (geometric, forward) and for unknown names.
    """
    if difference := _DIFFERENCES.get((composition, divergence)):
        return difference
    if (composition, divergence) == ("geometric", "forward"):
        raise ConfigError(
            "forward KL to every reference composes them arithmetically, so it has no geometric anchor",
            where="composition='geometric', divergence='forward'",
            fix="take composition='arithmetic', or divergence='reverse'",
        )
    known = ", ".join(f"({c}, {d})" for c, d in _DIFFERENCES)
    raise ConfigError(f"unknown composition {composition!r} or divergence {divergence!r}", fix=f"take one of {known}")


def check_weights(weights: Tensor | Sequence[float], *, members: int | None = None) -> Tensor:
    """`weights` (K,) or (..., K) as a floating tensor, each row on the simplex: >= 0 and of sum 1 within SIMPLEX_TOLERANCE.

    Integers and sequences become float64. `members`, where given, is the K that the last axis must have. Raises
    ReferenceSetError naming the first offending row.
    """
    try:
        given = weights if isinstance(weights, Tensor) else torch.tensor(weights, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ReferenceSetError("reference weights are not all numbers", fix="give one number a reference") from error
    values = given if given.is_floating_point() else given.to(torch.float64)
    if values.dim() == 0 or values.shape[-1] == 0:
        raise ReferenceSetError("no reference weights", fix="give one weight a reference, at least one")
    if members is not None and values.shape[-1] != members:
        raise ReferenceSetError(f"{values.shape[-1]} weights for {members} references", fix="give one weight a reference")
    exact = values.detach().to(torch.float64)
    on_simplex = ((exact >= 0).all(-1) & ((exact.sum(-1) - 1).abs() <= SIMPLEX_TOLERANCE)).cpu()
    if not on_simplex.all():
        row = tuple((~on_simplex).nonzero()[0].tolist())
        shown = ", ".join(f"{w:.6g}" for w in exact[row].tolist())
        where = f"reference weights, row {_index(row)}" if row else "reference weights"
        raise ReferenceSetError(f"[{shown}] is not on the simplex", where=where, fix="give weights >= 0 that sum to 1")
    return values


def check_support(
    logps: Tensor,
    weights: Tensor | Sequence[float],
    compose: Composition = geometric,
    *,
    places: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Refuse completions to which the composition gives no log-probability, with ReferenceSetError naming the first one.

    `logps` (..., K), `weights` (K,) or (..., K), on the simplex. A geometric anchor is -inf where ANY member of positive weight
    gives probability 0, an arithmetic one where ALL do; NaN and +inf are refused in members of positive weight. `places` says
    where each entry of the first axis comes from, `names` what the K members are called; else both go by number.
    """
    kept = (_aligned(logps, check_weights(weights)) > 0).expand_as(logps)
    refused = ~compose(logps, weights).isfinite()
    if not refused.any():
        return
    row = tuple(refused.nonzero()[0].tolist())
    culprits = kept[row] & ~logps[row].isfinite()
    broken = culprits & ~logps[row].isneginf()
    member = int((broken if broken.any() else culprits).nonzero()[0])
    value = float(logps[row][member])
    if value == -math.inf:
        what, fix = "has probability 0", "set that reference's weight to 0 for this prompt, or drop the completion"
    else:
        what, fix = f"has log-probability {value}", "score it again: the model or its numerical type is broken"
    where = places[row[0]] if places and row else f"completion {_index(row)}" if row else "completion"
    who = names[member] if names else member
    raise ReferenceSetError(f"{what} under reference {who}, whose weight is positive", where=where, fix=fix)


def _aligned(logps: Tensor, weights: Tensor | Sequence[float]) -> Tensor:
    """Weights in the type and on the device of `logps`; only (K,), or as many axes as `logps`, so that no axis is guessed."""
    weights = torch.as_tensor(weights, dtype=logps.dtype, device=logps.device)
    same_rank = weights.dim() in (1, logps.dim()) and logps.dim() > 0
    if not (same_rank and weights.shape[-1] == logps.shape[-1] and _expands(weights.shape[:-1], logps.shape[:-1])):
        raise ReferenceSetError(
            f"weights of shape {tuple(weights.shape)} do not fit log-probabilities of shape {tuple(logps.shape)}",
            fix="give weights (K,), or one row a prompt with as many axes as the log-probabilities",
        )
    return weights


def _expands(shape: Sequence[int], to: Sequence[int]) -> bool:
    return all(mine in (1, theirs) for mine, theirs in zip(shape, to, strict=False))


def _extended_exp(u: Tensor, bound: float) -> Tensor:
    """exp(u) up to `bound`, its tangent beyond."""
    return u.clamp(max=bound).exp() * (1 + torch.relu(u - bound))


def _index(row: Sequence[int]) -> str:
    return str(row[0]) if len(row) == 1 else str(tuple(row))
