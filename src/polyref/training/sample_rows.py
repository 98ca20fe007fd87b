"""Weighted samples as a map-style data set: rows of one prompt and some of its completions, and batches of them as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from polyref.data.collate import Layout, batch_tensors, collate, row_length
from polyref.data.encode import Ids
from polyref.data.sample_tokens import TokenizedSamples
from polyref.data.samples import SampleRecord


@dataclass(frozen=True)
class WeightedRow:
    """One training example: C completions of a prompt, the `weights` (C,) of their log-probabilities in the row's loss.

    `even` are the weights were all samples of the prompt to count alike; `prompt` is the prompt's number, `record` the first
    sample.
    """

    prompt_ids: Ids
    completions: tuple[Ids, ...]
    weights: tuple[float, ...]
    even: tuple[float, ...]
    record: SampleRecord
    prompt: int
    index: int


class SampleRows(Dataset[WeightedRow]):
    """X prompts in R rows, of which the mean loss is (1/X) sum_x sum_j share_xj (-log pi(y_xj | x)), shares of sum 1 a prompt.

    A prompt with more than `samples_per_row` completions fills several rows of nearly equal size; every weight is its sample's
    share times R/X, so that the mean over rows is the mean over prompts, however they are cut.
    """

    def __init__(self, prompts: Sequence[TokenizedSamples], samples_per_row: int) -> None:
        pieces = [(x, piece) for x, each in enumerate(prompts) for piece in _pieces(len(each.completions), samples_per_row)]
        self.prompts, self.scale = list(prompts), len(pieces) / len(prompts)
        self.rows: list[WeightedRow] = []
        for index, (x, piece) in enumerate(pieces):
            each, even = prompts[x], self.scale / len(prompts[x].completions)
            weights = tuple(self.scale * share for share in each.shares[piece])
            row = (each.prompt_ids, each.completions[piece], weights, (even,) * len(weights))
            self.rows.append(WeightedRow(*row, each.records[piece][0], x, index))
        self.lengths = [row_length(row.prompt_ids, row.completions) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> WeightedRow:
        return self.rows[index]


def _pieces(count: int, most: int) -> list[slice]:
    """`count` items cut into as few pieces of at most `most` as there can be, their sizes within 1 of each other."""
    pieces = -(-count // most)
    ends = [count * i // pieces for i in range(pieces + 1)]
    return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]


@dataclass(frozen=True)
class RowCollator:
    """Rows -> the tensors of one step: a `TokenBatch` by field, `weights` and `even` (B, C), `index` (B,).

    Rows with fewer completions than the longest are filled up with a token of their own, of weight 0.
    """

    layout: Layout = "shared"

    def __call__(self, rows: Sequence[WeightedRow]) -> dict[str, Tensor]:
        count = max(len(row.completions) for row in rows)
        filled = [row.completions + (row.completions[-1][:1],) * (count - len(row.completions)) for row in rows]
        batch = collate([(row.prompt_ids, each) for row, each in zip(rows, filled, strict=True)], layout=self.layout)

        def padded(values: Sequence[tuple[float, ...]]) -> Tensor:
            return torch.tensor([each + (0.0,) * (count - len(each)) for each in values], dtype=torch.float64).float()

        columns = {"weights": padded([row.weights for row in rows]), "even": padded([row.even for row in rows])}
        return batch_tensors(batch) | columns | {"index": torch.tensor([row.index for row in rows])}
