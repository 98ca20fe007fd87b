"""Autoregressive references small enough to enumerate, in which composing sequences and composing tokens part.

Token 0 ends a completion; one that reaches `length` tokens without it is cut: an atom without the end factor. A state is an
open prefix, breadth first: 0 is the empty one, and token v > 0 leads from state s to 1 + s (V-1) + v - 1. X contexts, S states,
V tokens, K references, Y completions, in the order of `completions`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from polyref.errors import ConfigError
from polyref.references.compose import arithmetic, geometric
from polyref.theory.bandit import FiniteBandit, composed

END: Final = 0
MOST_COMPLETIONS: Final = 10_000


@dataclass(frozen=True, eq=False)
class ToyLanguageBandit:
    """K references by their next-token logits at every prefix; `bandit` makes the `FiniteBandit` over whole completions.

    ConfigError where the tables do not hold one row a state, a row has NaN or no token, or there is too much to enumerate.
    """

    logits: Tensor
    """(X, S, V, K), S = sum_{t < length} (V-1)^t; -inf forbids a token."""
    length: int
    """Tokens of the longest completion, the end included."""

    def __post_init__(self) -> None:
        logits = torch.as_tensor(self.logits, dtype=torch.float64)
        object.__setattr__(self, "logits", logits)
        shape = f"logits of shape {tuple(logits.shape)}"
        if logits.dim() != 4 or 0 in logits.shape or logits.shape[2] < 2 or self.length < 1:
            raise ConfigError(f"{shape}, length {self.length}", fix="give logits (X, S, V, K), V at least 2, length at least 1")
        vocabulary = logits.shape[2]
        states = count_states(vocabulary, self.length)
        if logits.shape[1] != states:
            raise ConfigError(f"{shape} hold {logits.shape[1]} states", fix=f"give {states} for length {self.length}")
        if not logits.isfinite().any(2).all() or (logits.isnan() | logits.isposinf()).any():
            raise ConfigError(f"{shape} hold NaN, +inf or a row without a token", fix="give finite logits, or -inf for some")

    @cached_property
    def completions(self) -> list[tuple[int, ...]]:
        """Every completion: the ended ones by length, then the cut ones."""
        open_prefixes: list[tuple[int, ...]] = [()]
        ended: list[tuple[int, ...]] = []
        for _ in range(self.length):
            ended += [prefix + (END,) for prefix in open_prefixes]
            open_prefixes = [prefix + (token,) for prefix in open_prefixes for token in range(1, self.logits.shape[2])]
        return ended + open_prefixes

    @cached_property
    def token_logps(self) -> Tensor:
        """log pi_i(token | x, prefix), (X, S, V, K)."""
        return self.logits.log_softmax(2)

    def sequence_logps(self) -> Tensor:
        """log pi_i(y|x), (X, Y, K): the sum over tokens, the end included."""
        return self._summed(self.token_logps.movedim(-1, 0)).movedim(0, -1)

    def bandit(
        self, rewards: Tensor, weights: Tensor | Sequence[float] | None = None, *, beta: float, contexts: Tensor | None = None
    ) -> FiniteBandit:
        """Whole completions as the actions; rewards (..., X, Y), weights (K,) or (..., X, K)."""
        return FiniteBandit.tabular(rewards, self.sequence_logps(), weights, beta=beta, contexts=contexts)

    def token_geometric(self, weights: Tensor) -> Tensor:
        """The WRONG composition: logits averaged by `weights` (K,) or (X, K) and renormalised at each token. Log-probs (X, Y).

        The normalisers depend on the prefix, so this is not G_a, for any prompt-wise factor.
        """
        return self._summed(
            composed(geometric, self.token_logps.flatten(1, 2), weights).view(self.logits.shape[:3]).log_softmax(-1)
        )

    def token_arithmetic(self, weights: Tensor) -> Tensor:
        """The WRONG mixture: at each token sum_i a_i pi_i(token | prefix), by weights that forget the prefix. (X, Y)."""
        return self._summed(composed(arithmetic, self.token_logps.flatten(1, 2), weights).view(self.logits.shape[:3]))

    def token_conditionals(self, log_policy: Tensor) -> Tensor:
        """The next-token log-probs (..., X, S, V) of any law of completions (..., X, Y); NaN after a prefix without mass.

        Of M_a they mix the references with weights proportional to a_i pi_i(prefix | x).
        """
        states, tokens = self._paths
        kept = tokens >= 0
        passes = torch.zeros(*self.logits.shape[1:3], len(tokens), dtype=torch.bool)
        passes[states[kept], tokens[kept], kept.nonzero()[:, 0]] = True
        joint = log_policy[..., None, None, :].masked_fill(~passes, -math.inf).logsumexp(-1)
        return joint - joint.logsumexp(-1, keepdim=True)

    @cached_property
    def _paths(self) -> tuple[Tensor, Tensor]:
        """The states passed and the tokens taken by each completion, (Y, length) each; -1 beyond its end."""
        branches = self.logits.shape[2] - 1
        states, tokens = [], []
        for completion in self.completions:
            path = [0]
            for token in completion[:-1]:
                path.append(1 + path[-1] * branches + token - 1)
            beyond = [-1] * (self.length - len(completion))
            states.append(path + beyond)
            tokens.append(list(completion) + beyond)
        return torch.tensor(states), torch.tensor(tokens)

    def _summed(self, token_logps: Tensor) -> Tensor:
        """(..., S, V) next-token log-probs to (..., Y) of completions."""
        states, tokens = self._paths
        return token_logps[..., states, tokens].masked_fill(tokens < 0, 0.0).sum(-1)


def random_toy_language(
    generator: torch.Generator, *, contexts: int, references: int, vocabulary: int = 3, length: int = 4, spread: float = 1.0
) -> ToyLanguageBandit:
    """References with independent logits spread * normal at every prefix."""
    shape = (contexts, count_states(vocabulary, length), vocabulary, references)
    return ToyLanguageBandit(spread * torch.randn(shape, generator=generator, dtype=torch.float64), length)


def count_states(vocabulary: int, length: int) -> int:
    """sum_{t < length} (V-1)^t, the number of open prefixes; ConfigError beyond what can be enumerated."""
    depths = [(vocabulary - 1) ** depth for depth in range(length + 1)]
    if sum(depths) > MOST_COMPLETIONS:
        raise ConfigError(
            f"{vocabulary} tokens and length {length} make {sum(depths)} completions",
            fix=f"stay within {MOST_COMPLETIONS}: shorten the completions or the vocabulary",
        )
    return sum(depths[:-1])


def total_variation(p_log: Tensor, q_log: Tensor) -> Tensor:
    """1/2 sum |p - q| over the last axis of log-probabilities (..., Y): (...)."""
    return (p_log.exp() - q_log.exp()).abs().sum(-1) / 2
