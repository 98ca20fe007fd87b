"""Attention masks of the shared-prompt layout.

A token sees the earlier tokens of its prompt and of its own completion, at positions no further back than the layer's window.
Masks are additive floats (0 allowed, the dtype's least value not): a boolean mask is silently wrong under eager attention.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from polyref.types import TokenBatch

MaskKind = Literal["full", "sliding", "by_layer_type"]
"""One mask for all layers, one windowed mask for all layers, or a dict by the model's layer types."""


def visible(batch: TokenBatch, window: int | None = None) -> Tensor:
    """(R, L, L) boolean: may the query at i see the key at j. Padding sees itself only, so that no softmax is empty."""
    segment, position = batch.segment_ids, batch.position_ids
    length = segment.shape[1]
    index = torch.arange(length, device=segment.device)
    same = segment[:, :, None] == segment[:, None, :]
    allowed = (same | (segment[:, None, :] == 0)) & (index[:, None] >= index[None, :]) & (segment[:, :, None] >= 0)
    if window is not None:
        allowed &= position[:, :, None] - position[:, None, :] < window
    return allowed | torch.eye(length, dtype=torch.bool, device=segment.device)


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, L, L) boolean -> (R, 1, L, L) additive mask of `dtype`."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def shared_prompt_mask(batch: TokenBatch, kind: MaskKind, window: int | None, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """What a decoder takes as `attention_mask` for a shared-prompt `batch`: (R, 1, L, L), or a dict of them by layer type."""
    if kind == "full":
        return additive(visible(batch), dtype)
    if kind == "sliding":
        return additive(visible(batch, window), dtype)
    return {
        "full_attention": additive(visible(batch), dtype),
        "sliding_attention": additive(visible(batch, window), dtype),
    }
