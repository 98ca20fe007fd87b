"""Scored pairs as examples and batches, and the order they come in."""

from __future__ import annotations

import pytest
import torch

from polyref.training.dataset import GroupedSampler, PairCollator, ScoredPairs
from polyref.types import PreferenceRecord, TokenizedPair


def dataset(count: int = 3) -> ScoredPairs:
    tokens = [TokenizedPair((1,) * (i + 1), (5, 6), (7,) * (i + 1)) for i in range(count)]
    labels = [None, 0.25, 0.0]
    records = [
        PreferenceRecord("p", "c", "r", chosen_probability=labels[i % 3], margin=0.5 if i == 1 else None, row=i + 1)
        for i in range(count)
    ]
    anchor = torch.arange(2 * count, dtype=torch.float64).view(count, 2) / -3
    return ScoredPairs(tokens, records, anchor)


def test_every_pair_keeps_its_record_its_anchor_and_its_number() -> None:
    data = dataset()
    assert len(data) == 3 and data.lengths == [4, 6, 8]
    assert [pair.index for pair in data.pairs] == [0, 1, 2]
    assert data[2].anchor == (-4 / 3, -5 / 3) and data[2].record.row == 3 and data[2] is data.pairs[2]
    with pytest.raises(ValueError):
        ScoredPairs([data[0].tokens], [], torch.zeros(1, 2))


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_a_batch_holds_tokens_anchors_and_labels(layout: str) -> None:
    data = dataset()
    batch = PairCollator(layout)([data[2], data[1]])  # type: ignore[arg-type]
    rows = {"shared": 2, "separate": 4}[layout]
    assert batch["input_ids"].shape[0] == batch["segment_ids"].shape[0] == rows
    assert batch["completion_index"].max() == 3, "completions are numbered alike in both layouts"
    assert batch["target_ids"].tolist() == [5, 6, 7, 7, 7, 5, 6, 7, 7]
    torch.testing.assert_close(batch["anchor"], torch.tensor([[-4 / 3, -5 / 3], [-2 / 3, -1.0]]))
    assert batch["chosen_probability"].tolist() == [0.0, 0.25]
    assert batch["margin"].tolist() == [0.0, 0.5]
    assert batch["index"].tolist() == [2, 1]
    certain = PairCollator(layout)([data[0]])  # type: ignore[arg-type]
    assert certain["chosen_probability"].tolist() == [1.0] and certain["margin"].tolist() == [0.0]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = [3 * i % 17 for i in range(50)]
    sampler = GroupedSampler(lengths, 4, seed=3)
    first = list(sampler)
    assert len(sampler) == 50 and sorted(first) == list(range(50))
    assert list(sampler) == first, "iterating leaves no trace"
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first and sorted(second) == list(range(50))
    fresh = GroupedSampler(lengths, 4, seed=3)
    fresh.set_epoch(1)
    assert list(fresh) == second
    assert list(GroupedSampler(lengths, 4, seed=4)) != first
    torch.manual_seed(123)
    assert list(GroupedSampler(lengths, 4, seed=3)) == first
