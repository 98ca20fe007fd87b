"""g in the records: each number beside its own pair, through a file and back."""

from __future__ import annotations

import math

import pytest
import torch

from polyref.data.records import RowError, parse_record, record_to_row
from polyref.errors import DataError, ModelError
from polyref.rewards.auxiliary_columns import comparisons, with_auxiliary
from polyref.rewards.cross_fit import Comparison
from polyref.rewards.preference_model import from_reward
from polyref.types import PreferenceRecord


def turn(text):
    return ({"role": "assistant", "content": text},)


def length(prompts, completions):
    return torch.tensor([len(c if isinstance(c, str) else c[0]["content"]) / 10 for c in completions], dtype=torch.float64)


length.name = "length"
MODEL = from_reward(length)
CHAT = ({"role": "user", "content": "hello"},)
RECORDS = [PreferenceRecord("p", "long one", "b"), PreferenceRecord(CHAT, turn("a"), turn("hi there"), 0.25, row=2)]
AUXILIARY = [[("x", "yyyy"), ("zz", "x")], [(turn("u"), turn("vvv")), (turn("hi"), turn("hi there"))]]


def test_every_number_is_beside_its_pair():
    pairs = comparisons(RECORDS, AUXILIARY)
    assert pairs[0] == Comparison("p", "long one", "b") and pairs[4] == Comparison(CHAT, turn("u"), turn("vvv"))
    found = with_auxiliary(RECORDS, AUXILIARY, MODEL(*zip(*pairs, strict=True)))
    for record, given, auxiliary in zip(found, RECORDS, AUXILIARY, strict=True):
        asked = [(given.chosen, given.rejected), *auxiliary]
        expected = [MODEL([given.prompt], [first], [second]).item() for first, second in asked]
        assert [record.predicted_probability, *record.auxiliary_probability] == expected
        assert list(zip(record.auxiliary_1, record.auxiliary_2, strict=True)) == auxiliary
        assert (record.prompt, record.chosen_probability, record.row) == (given.prompt, given.chosen_probability, given.row)


def test_it_is_what_a_file_of_these_rows_gives():
    found = with_auxiliary(RECORDS, AUXILIARY, torch.linspace(0, 1, 6, dtype=torch.float64))
    for record in found:
        assert parse_record(record_to_row(record), source=record.source, row_number=record.row) == record
    again = with_auxiliary(found, [pairs[:1] for pairs in AUXILIARY], torch.full((4,), 0.5))
    assert again[0].auxiliary_probability == (0.5,) and again[0].predicted_probability == 0.5


def test_what_does_not_fit_is_refused():
    g = torch.full((6,), 0.5)
    with pytest.raises(DataError, match="1 lists of auxiliary pairs for 2 records"):
        comparisons(RECORDS, AUXILIARY[:1])
    with pytest.raises(DataError, match="records have 1, 2 auxiliary pairs"):
        with_auxiliary(RECORDS, [AUXILIARY[0][:1], AUXILIARY[1]], g[:5])
    with pytest.raises(DataError, match="records have 0 auxiliary pairs"):
        comparisons(RECORDS, [[], []])
    with pytest.raises(RowError, match="row 2, column auxiliary_2: entry 1 is identical"):
        with_auxiliary(RECORDS, [AUXILIARY[0], [(turn("u"), turn("u")), AUXILIARY[1][1]]], g)
    with pytest.raises(ModelError, match=r"gave shape \(5,\) for 6 rows"):
        with_auxiliary(RECORDS, AUXILIARY, g[:5])
    with pytest.raises(ModelError, match="with_auxiliary, row 6: gave nan"):
        with_auxiliary(RECORDS, AUXILIARY, torch.tensor([0.5] * 5 + [math.nan]))
