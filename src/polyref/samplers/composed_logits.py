"""Token-level composition inside `generate`: a proposal, NOT the composed reference.

Composing next-token laws and renormalising each gives prod_t p_t, p_t = prod_i pi_i(. | prefix)^{a_i} / z_t. The normalisers
depend on the prefix and do not cancel, so this is another law than G_a = prod_i pi_i^{a_i} / F_a: it favours completions that
lead where the members disagree. The difference is exactly prod_t z_t, which `TokenComposition` keeps as `log_mass`: weighed by
exp(log_mass), completions follow G_a, and the weights' mean is F_a. To draw from G_a itself use `composed.draw_composed`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from polyref.errors import ConfigError
from polyref.references.compose import geometric
from polyref.samplers.composed_values import common_ends
from polyref.samplers.members import Members
from polyref.samplers.members_lockstep import LockStep
from polyref.types import Text


class TokenComposition(LogitsProcessor):
    """Replaces the scores of the first member, whose model generates, by sum_i a_i log pi_i, for one call of `generate`.

    `prompts` are those that it is called with, in order; with R rows, each has R / P of them, side by side, as
    `num_return_sequences` makes them. The other members read their own prompts and then what is generated. For sampling and
    greedy search, at temperature 1 and without other processors (beams change places, which their caches would not).
    `log_mass` (R,), in nats, is log prod_t z_t of each row so far, up to the token that ends it.

    The other members read in evaluation mode and are left as they were. ConfigError for members of different tokenizers, a
    member that is not loaded, rows that P does not divide, or a first member that generates in training mode.
    """

    def __init__(self, members: Members, prompts: Sequence[Text], max_new_tokens: int) -> None:
        some = [(member, weight) for member, weight in zip(members.members, members.weights, strict=True) if weight > 0]
        loaded = [member for member, _ in some if member is not None]
        if len(loaded) < len(some) or not members.one_tokenizer:
            what = "members have different tokenizers, or one that has weight is not loaded"
            raise ConfigError(what, where="TokenComposition", fix="give loaded members of one tokenizer")
        self._weights = torch.tensor([weight for _, weight in some], dtype=torch.float64)
        self._members, self._generating = members, loaded[0].model
        self._others, self._ends = loaded[1:], torch.tensor(sorted(common_ends(loaded)))
        rows = enumerate(prompts, 1)
        self._ids = [[member.prompt_ids(prompt, max_new_tokens, row) for member in self._others] for row, prompt in rows]
        self._steps: LockStep | None = None
        self.log_mass = torch.zeros(0, dtype=torch.float64)
        self._ended = torch.zeros(0, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (R, V) of the next token after `input_ids` (R, L)."""
        if self._generating.training:
            what = "the model that generates is in training mode, which may drop out"
            raise ConfigError(what, where="TokenComposition", fix="call its eval() before generate")
        if not self._others:
            return scores
        with self._members.drawing():
            return self._composed(input_ids, scores)

    def _composed(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        last = input_ids[:, -1]
        if self._steps is None:
            count, odd = divmod(len(input_ids), len(self._ids))
            if odd:
                what = f"{len(input_ids)} rows for {len(self._ids)} prompts"
                raise ConfigError(what, where="TokenComposition", fix="give the prompts of one call of generate")
            self._steps = LockStep(self._others, self._ids).pick([row for row in range(len(self._ids)) for _ in range(count)])
            self.log_mass = torch.zeros(len(input_ids), dtype=torch.float64)
            self._ended = torch.zeros(len(input_ids), dtype=torch.bool)
        else:
            self._steps.step(last)
            self._ended = self._ended | torch.isin(last.cpu(), self._ends)
        law = self._steps.law.to(scores.device)
        own = scores.to(torch.float64).log_softmax(-1)[:, : law.shape[1], None]
        joint = geometric(torch.cat([own, law[:, : own.shape[1]]], -1), self._weights.to(scores.device))
        self.log_mass = self.log_mass + joint.logsumexp(-1).cpu().masked_fill(self._ended, 0.0)
        composed = torch.full(scores.shape, -torch.inf, dtype=torch.float64, device=scores.device)
        composed[:, : joint.shape[1]] = joint.log_softmax(-1)
        return composed.to(scores.dtype)
