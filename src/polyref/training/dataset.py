"""Scored pairs as a map-style data set, batches of them as tensors, and an order that groups rows of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from polyref.data.collate import Layout, batch_tensors, collate, grouped_batches, row_length
from polyref.types import PreferenceRecord, TokenizedPair


@dataclass(frozen=True)
class ScoredPair:
    """One training example: token ids, its anchor's log-probabilities (chosen, rejected) in nats, and its label."""

    tokens: TokenizedPair
    record: PreferenceRecord
    anchor: tuple[float, float]
    index: int


class ScoredPairs(Dataset[ScoredPair]):
    """N pairs with their anchors: everything a training step needs besides the policy."""

    def __init__(self, tokens: Sequence[TokenizedPair], records: Sequence[PreferenceRecord], anchor: Tensor) -> None:
        """`anchor`: (N, 2) log-probabilities of chosen and rejected under the composed references, in nats."""
        rows = zip(tokens, records, anchor.tolist(), strict=True)
        self.pairs = [ScoredPair(t, r, (a[0], a[1]), i) for i, (t, r, a) in enumerate(rows)]
        self.lengths = [row_length(t.prompt_ids, t.completions) for t in tokens]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> ScoredPair:
        return self.pairs[index]


@dataclass(frozen=True)
class PairCollator:
    """Pairs -> the tensors of one step: a `TokenBatch` by field, `anchor` (B, 2), `chosen_probability`, `margin`, `index`."""

    layout: Layout = "shared"

    def __call__(self, pairs: Sequence[ScoredPair]) -> dict[str, Tensor]:
        batch = collate([(p.tokens.prompt_ids, p.tokens.completions) for p in pairs], layout=self.layout)
        label = [1.0 if p.record.chosen_probability is None else p.record.chosen_probability for p in pairs]
        return batch_tensors(batch) | {
            "anchor": torch.tensor([p.anchor for p in pairs], dtype=torch.float64).float(),
            "chosen_probability": torch.tensor(label),
            "margin": torch.tensor([p.record.margin or 0.0 for p in pairs]),
            "index": torch.tensor([p.index for p in pairs]),
        }


class GroupedSampler(Sampler[int]):
    """Rows in batches of similar length, in an order made from (seed, epoch) alone, so that a resumed run sees the same one."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        seed: Any = (self.seed, self.epoch)
        return (i for batch in grouped_batches(self.lengths, self.batch_size, seed=seed) for i in batch)
