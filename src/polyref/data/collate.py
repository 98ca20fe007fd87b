"""Token ids -> batches, in the shared-prompt layout or with one row a completion.

Shared prompt: a row is the prompt once, then its C completions one after another. Positions restart after the prompt for each
completion, and the attention mask (built in `polyref.scoring.masks`) lets a completion see the prompt and itself only, so the
prompt's tokens pass through the model once for all its completions. Separate rows hold prompt + completion in the ordinary
way, for models that cannot take such a mask. Both describe the scored tokens by the same three flat indices, so everything
downstream is one code path.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Literal

import numpy as np

from polyref.types import TokenBatch

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["shared", "separate"]
"""How completions of one prompt are laid out in a batch."""

Item = tuple[Sequence[int], Sequence[Sequence[int]]]
"""One prompt's token ids and the token ids of its completions."""


def collate(items: Sequence[Item], *, layout: Layout = "shared", multiple: int = 1) -> TokenBatch:
    """Lay `items` (B prompts of C completions each) out as a `TokenBatch`.

    Under "shared" there are R = B rows of C completions; under "separate" R = B * C rows of one. `completion_index` numbers the
    B * C completions in the same order under both. Rows are padded on the right to a `multiple` of tokens, with id 0: no
    scored token sees the padding.
    Raises ValueError when prompts have different numbers of completions, or a prompt or completion has no token.
    """
    import torch

    counts = {len(completions) for _, completions in items}
    if len(counts) != 1:
        raise ValueError(f"every prompt of a batch needs the same number of completions, got counts {sorted(counts)}")
    if any(not prompt or not all(completions) for prompt, completions in items):
        raise ValueError("a prompt and each of its completions need at least one token")
    rows: list[Item] = list(items) if layout == "shared" else [(p, [c]) for p, cs in items for c in cs]
    per_row = len(rows[0][1])
    longest = max(row_length(prompt, completions) for prompt, completions in rows)
    length = -(-longest // multiple) * multiple

    input_ids = np.zeros((len(rows), length), dtype=np.int64)
    position_ids = np.zeros((len(rows), length), dtype=np.int64)
    segment_ids = np.full((len(rows), length), -1, dtype=np.int64)
    source, target, owner = [], [], []
    for r, (prompt, completions) in enumerate(rows):
        start = len(prompt)
        input_ids[r, :start] = prompt
        position_ids[r, :start] = np.arange(start)
        segment_ids[r, :start] = 0
        offset = start
        for c, completion in enumerate(completions):
            end = offset + len(completion)
            input_ids[r, offset:end] = completion
            position_ids[r, offset:end] = np.arange(start, start + len(completion))
            segment_ids[r, offset:end] = c + 1
            predicted_at = np.arange(offset - 1, end - 1)
            predicted_at[0] = start - 1
            source.append(predicted_at + r * length)
            target.append(np.asarray(completion, dtype=np.int64))
            owner.append(np.full(len(completion), r * per_row + c, dtype=np.int64))
            offset = end
    return TokenBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids),
        torch.from_numpy(segment_ids),
        torch.from_numpy(np.concatenate(source)),
        torch.from_numpy(np.concatenate(target)),
        torch.from_numpy(np.concatenate(owner)),
        completions=per_row,
    )


def row_length(prompt: Sequence[int], completions: Iterable[Sequence[int]]) -> int:
    """Tokens of the row a prompt and its completions fill in the shared-prompt layout."""
    return len(prompt) + sum(len(completion) for completion in completions)


def batch_tensors(batch: TokenBatch) -> dict[str, Tensor]:
    """The tensors of `batch` by field name: what a data loader can move between devices."""
    return {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "completions"}


def grouped_batches(
    lengths: Sequence[int], batch_size: int, *, seed: int | tuple[int, ...] | None = None, window: int = 50
) -> list[list[int]]:
    """Indices of rows cut into batches of similar length, so that little padding is computed.

    With a `seed`, rows are shuffled, sorted by length inside windows of `window` batches, and the batches shuffled again, a
    short one last: the order depends on `seed` and `lengths` alone. Without one, rows are sorted by length, longest first, so
    that running out of memory shows at once.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    if seed is None or not len(lengths):
        return [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(lengths))
    span = batch_size * window
    windows = (shuffled[i : i + span] for i in range(0, len(shuffled), span))
    by_length = np.concatenate([w[np.argsort([-lengths[j] for j in w], kind="stable")] for w in windows])
    batches = [by_length[i : i + batch_size].tolist() for i in range(0, len(by_length), batch_size)]
    order = generator.permutation(len(batches))
    return sorted((batches[i] for i in order), key=lambda batch: len(batch) < batch_size)
