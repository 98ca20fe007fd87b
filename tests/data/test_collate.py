"""Batches of rows: where every token goes, and in which order rows come."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyref.data.collate import batch_tensors, collate, grouped_batches, row_length
from polyref.types import TokenBatch

ITEMS = [((1, 2, 3), [(10, 11), (20,)]), ((4,), [(30,), (40, 41, 42)])]
IDS = st.lists(st.integers(0, 99), min_size=1, max_size=5)
LENGTHS = st.lists(st.integers(1, 500), max_size=80)


def predicted(batch: TokenBatch) -> list[tuple[tuple[int, ...], int]]:
    """What each scored token is predicted from, by segments and positions: (the tokens before it, the token)."""
    found = []
    length = batch.input_ids.shape[1]
    for source, target in zip(batch.source_index.tolist(), batch.target_ids.tolist(), strict=True):
        row, column = divmod(source, length)
        segment, position = int(batch.segment_ids[row, column]), int(batch.position_ids[row, column])
        seen = {
            int(batch.position_ids[row, k]): int(batch.input_ids[row, k])
            for k in range(length)
            if int(batch.segment_ids[row, k]) in (0, segment) and int(batch.position_ids[row, k]) <= position
        }
        assert sorted(seen) == list(range(position + 1))
        found.append((tuple(seen[k] for k in range(position + 1)), target))
    return found


def test_a_shared_row_is_a_prompt_and_its_completions() -> None:
    batch = collate(ITEMS)
    assert batch.completions == 2
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 11, 20], [4, 30, 40, 41, 42, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 1, 2, 3, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, 2, 2, 2, -1]]
    assert batch.target_ids.tolist() == [10, 11, 20, 30, 40, 41, 42]
    assert batch.source_index.tolist() == [2, 3, 2, 6, 6, 8, 9]
    assert batch.completion_index.tolist() == [0, 0, 1, 2, 3, 3, 3]


@given(st.lists(st.tuples(IDS, st.lists(IDS, min_size=3, max_size=3)), min_size=1, max_size=4), st.integers(1, 8))
def test_both_layouts_predict_the_same_tokens_from_the_same_tokens(
    items: list[tuple[list[int], list[list[int]]]], multiple: int
) -> None:
    shared = collate(items, multiple=multiple)
    separate = collate(items, layout="separate", multiple=multiple)
    expected = [
        (tuple(prompt + completion[:t]), completion[t])
        for prompt, completions in items
        for completion in completions
        for t in range(len(completion))
    ]
    assert predicted(shared) == predicted(separate) == expected
    assert torch.equal(shared.completion_index, separate.completion_index)
    assert (shared.completions, separate.completions) == (3, 1)
    assert shared.input_ids.shape == (len(items), -(-max(row_length(*item) for item in items) // multiple) * multiple)
    assert separate.input_ids.shape[0] == 3 * len(items)
    for batch in (shared, separate):
        assert batch.input_ids.shape[1] % multiple == 0
        assert all(tensor.dtype == torch.int64 for tensor in batch_tensors(batch).values())


def test_rows_that_cannot_be_scored_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same number of completions, got counts \[1, 2\]"):
        collate([((1,), [(2,)]), ((1,), [(2,), (3,)])])
    for item in (((), [(1,)]), ((1,), [()]), ((1,), [(2,), ()])):
        with pytest.raises(ValueError, match="at least one token"):
            collate([item])
    with pytest.raises(ValueError):
        collate([])


def test_batch_tensors_are_what_a_loader_moves() -> None:
    batch = collate(ITEMS)
    assert TokenBatch(**batch_tensors(batch), completions=2).input_ids is batch.input_ids


@given(LENGTHS, st.integers(1, 9), st.one_of(st.none(), st.integers(0, 5)), st.integers(1, 4))
def test_every_row_is_in_exactly_one_batch(lengths: list[int], size: int, seed: int | None, window: int) -> None:
    batches = grouped_batches(lengths, size, seed=seed, window=window)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == size for batch in batches[:-1]), "only the last may be short"
    assert len(batches) == -(-len(lengths) // size)
    assert batches == grouped_batches(lengths, size, seed=seed, window=window)


def test_without_a_seed_the_longest_come_first() -> None:
    assert grouped_batches([3, 9, 1, 9, 5], 2) == [[1, 3], [4, 0], [2]]


def test_seeds_give_different_orders_of_rows_of_similar_length() -> None:
    lengths = [(7 * i) % 400 + 1 for i in range(400)]
    first, second = (grouped_batches(lengths, 8, seed=seed) for seed in (0, 1))
    assert first != second
    assert grouped_batches(lengths, 8, seed=(0, 1)) != grouped_batches(lengths, 8, seed=(0, 2))

    def padding(batches: list[list[int]]) -> int:
        return sum(max(lengths[i] for i in batch) - lengths[j] for batch in batches for j in batch)

    in_order = [list(range(i, i + 8)) for i in range(0, 400, 8)]
    assert padding(first) < padding(in_order) / 4
    means = [sum(lengths[i] for i in batch) for batch in first]
    assert means != sorted(means) and means != sorted(means, reverse=True), "batches come in no order of length"
