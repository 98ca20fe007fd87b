"""Sequences that a model continues side by side, each with what it has read in a key-value cache.

A row ends in the last column and is padded on the left, so that all rows take their next token in one column, rows read
elsewhere can join, and columns that no row needs are cut off: the cache is never longer than its longest row.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyref.errors import ModelError

_UNUSED = 32
"""Columns that no row needs, above which those that stay are copied without them."""


@dataclass
class Rows:
    """R rows: the `logits` (R, V) of what comes next, the `cache`, and a `mask` (R, L) that is 1 where a row has a token.

    `model` and its `name` in errors are those that read them.
    """

    model: nn.Module
    name: str
    logits: Tensor
    cache: Any
    mask: Tensor

    @classmethod
    def read(cls, model: nn.Module, prompts: Sequence[Sequence[int]], name: str) -> Rows:
        """A row for each of `prompts`, in one pass. ModelError for logits that are not numbers."""
        from transformers import DynamicCache

        from polyref.samplers.room import with_room

        device, length = next(model.parameters()).device, max(map(len, prompts))
        tokens = torch.zeros(len(prompts), length, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, length - len(prompt) :] = 1
        tokens, mask = tokens.to(device), mask.to(device)
        cache = DynamicCache(config=cast(Any, model).config)
        cache.layers = [with_room(layer) for layer in cache.layers]
        logits = _call(model, tokens, mask, (mask.cumsum(1) - 1).clamp(min=0), cache, name)
        return cls(model, name, logits, cache, mask)

    @property
    def joinable(self) -> bool:
        """Whether these rows can be joined with others; state that is no list of keys and values cannot."""
        from transformers.cache_utils import DynamicSlidingWindowLayer

        from polyref.samplers.room import RoomyLayer

        return all(type(layer) in (RoomyLayer, DynamicSlidingWindowLayer) for layer in self.cache.layers)

    @property
    def roomy(self) -> bool:
        """Whether all layers can be changed in place."""
        from polyref.samplers.room import RoomyLayer

        return all(type(layer) is RoomyLayer for layer in self.cache.layers)

    def pick(self, rows: Sequence[int]) -> Rows:
        """These rows, perhaps in another order or several times over, without the columns that none of them needs."""
        at = torch.tensor(rows, device=self.mask.device)
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        mask = self.mask[at]
        if self.joinable and (unused := mask.shape[1] - int(mask.sum(1).max())):
            for layer in cache.layers:
                _cut(layer, unused)
            mask = mask[:, unused:]
        cache.batch_select_indices(at)
        return Rows(self.model, self.name, self.logits[at], cache, mask)

    def drop(self, rows: Sequence[int]) -> tuple[Rows, list[int]]:
        """Without these rows: those that stay, and where each of them was. These rows are of no use afterwards.

        They are moved together in place where that can be done, and where it leaves few columns that none of them needs.
        """
        stay = [row for row in range(len(self.mask)) if row not in set(rows)]
        if not self.roomy or self.mask.shape[1] - int(self.mask[stay].sum(1).max()) > _UNUSED:
            return self.pick(stay), stay
        free = [row for row in rows if row < len(stay)]
        moves = list(zip([row for row in stay if row >= len(stay)], free, strict=True))
        for layer in self.cache.layers:
            layer.move(moves, len(stay))
        order = list(range(len(stay)))
        for a, b in moves:
            order[b] = a
        at = torch.tensor(order, device=self.mask.device)
        return Rows(self.model, self.name, self.logits[at], self.cache, self.mask[at]), order

    def join(self, others: Rows) -> Rows:
        """These rows and then `others`; both must be `joinable`, and neither is of use afterwards."""
        for layer, more in zip(self.cache.layers, others.cache.layers, strict=True):
            if not layer.is_sliding:
                layer.join(more)
            elif layer.is_initialized:
                layer.keys, layer.values = _stack(layer.keys, more.keys, -2), _stack(layer.values, more.values, -2)
                layer.cumulative_length = max(layer.cumulative_length, more.cumulative_length)
        mask = _stack(self.mask, others.mask, -1)
        return Rows(self.model, self.name, torch.cat([self.logits, others.logits]), self.cache, mask)

    def step(self, tokens: Tensor) -> None:
        """Read one more token (R,) a row. ModelError for logits that are not numbers."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        positions = self.mask.sum(1, keepdim=True) - 1
        self.logits = _call(self.model, tokens[:, None], self.mask, positions, self.cache, self.name)


def _call(model: nn.Module, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any, name: str) -> Tensor:
    """Logits (R, V) after the last of `tokens` (R, T), which the cache keeps."""
    output = model(
        input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    logits: Tensor = output.logits[:, -1]
    if not logits.amax(-1).isfinite().all():  # NaN, an infinite logit, or no token at all
        raise ModelError("gives logits that are not numbers", where=name, fix="check the weights and the dtype")
    return logits


def _cut(layer: Any, columns: int) -> None:
    """Forget the first `columns` columns; a layer with a window keeps the last of them only."""
    if not layer.is_initialized:
        return
    kept = layer.get_seq_length() - columns
    if layer.is_sliding:
        layer.cumulative_length, kept = kept, min(kept, layer.sliding_window - 1)
    start = layer.keys.shape[-2] - kept
    layer.keys, layer.values = layer.keys[:, :, start:], layer.values[:, :, start:]


def _stack(first: Tensor, second: Tensor, columns: int) -> Tensor:
    """Both along the rows, the one with fewer columns padded in front."""
    length = max(first.shape[columns], second.shape[columns])
    after = [0, 0] * (-columns - 1)
    return torch.cat([nn.functional.pad(x, (*after, length - x.shape[columns], 0)) for x in (first, second)])
