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
    """One training example: token ids, its anchor's log-probabilities (chosen, rejected, auxiliary) in nats, and its label.

    `sampling` holds those under the policy that completions were drawn from, where the objective needs them.
    """

    tokens: TokenizedPair
    record: PreferenceRecord
    anchor: tuple[float, ...]
    index: int
    sampling: tuple[float, ...] = ()


class ScoredPairs(Dataset[ScoredPair]):
    """N pairs with their anchors: everything a training step needs besides the policy."""

    def __init__(
        self,
        tokens: Sequence[TokenizedPair],
        records: Sequence[PreferenceRecord],
        anchor: Tensor,
        sampling: Tensor | None = None,
    ) -> None:
        """`anchor`: (N, 2 + 2M) log-probabilities of all completions under the composed references, in nats.

        `sampling`: the same under the sampling policy.
        """
        drawn = sampling.tolist() if sampling is not None else [()] * len(tokens)
        rows = zip(tokens, records, anchor.tolist(), drawn, strict=True)
        self.pairs = [ScoredPair(t, r, tuple(a), i, tuple(s)) for i, (t, r, a, s) in enumerate(rows)]
        self.lengths = [row_length(t.prompt_ids, t.completions) for t in tokens]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> ScoredPair:
        return self.pairs[index]


@dataclass(frozen=True)
class PairCollator:
    """Pairs -> the tensors of one step: a `TokenBatch` by field, `anchor` (B, 2), `chosen_probability`, `margin`, `index`.

    With M auxiliary pairs `anchor` is (B, 2 + 2M), and there are `predicted_probability` (B,), `auxiliary_probability` (B, M)
    and, where pairs have it, `sampling` (B, 2 + 2M).
    """

    layout: Layout = "shared"

    def __call__(self, pairs: Sequence[ScoredPair]) -> dict[str, Tensor]:
        batch = collate([(p.tokens.prompt_ids, p.tokens.completions) for p in pairs], layout=self.layout)
        label = [1.0 if p.record.chosen_probability is None else p.record.chosen_probability for p in pairs]
        columns = {
            "anchor": torch.tensor([p.anchor for p in pairs], dtype=torch.float64).float(),
            "chosen_probability": torch.tensor(label),
            "margin": torch.tensor([p.record.margin or 0.0 for p in pairs]),
            "index": torch.tensor([p.index for p in pairs]),
        }
        return batch_tensors(batch) | columns | self._auxiliary(pairs)

    @staticmethod
    def _auxiliary(pairs: Sequence[ScoredPair]) -> dict[str, Tensor]:
        if not pairs[0].tokens.auxiliary_ids:
            return {}
        columns = {
            "predicted_probability": torch.tensor([p.record.predicted_probability for p in pairs], dtype=torch.float32),
            "auxiliary_probability": torch.tensor([p.record.auxiliary_probability for p in pairs], dtype=torch.float32),
        }
        if pairs[0].sampling:
            columns["sampling"] = torch.tensor([p.sampling for p in pairs], dtype=torch.float64).float()
        return columns


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
