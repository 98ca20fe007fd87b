"""A completion that was cut when it was drawn: read from every source, kept on every way, and never given an end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fakes import CHATML, byte_tokenizer
from polyref.data import load_preferences, tokenize_for_reference, tokenize_record, tokenize_records
from polyref.data.records import turned
from polyref.data.write import WRITTEN_KINDS, write_preferences
from polyref.errors import DataError
from polyref.types import PreferenceRecord

BYTES = byte_tokenizer()
MERGING = byte_tokenizer([("a", "b"), ("b", "b")])
ROW = {"prompt": "Q:", "chosen": " yes", "rejected": " no"}
ROWS: list[dict[str, Any]] = [ROW | {"chosen_ended": True, "rejected_ended": False}, ROW | {"chosen_ended": False}, ROW]
ENDS = [(True, False), (False, None), (None, None)]


def ends_of(records: list[PreferenceRecord]) -> list[tuple[bool | None, bool | None]]:
    return [(record.chosen_ended, record.rejected_ended) for record in records]


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def listed(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def folder(path: Path, rows: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.mark.parametrize(("name", "write"), [("a.jsonl", lines), ("a.json", listed), ("a.parquet", parquet), ("a", folder)])
def test_ends_are_read_from_every_source_and_bad_ones_named(
    name: str, write: Callable[[Path, list[dict[str, Any]]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / name, ROWS)
    assert ends_of(load_preferences(file)) == ENDS
    assert ends_of(load_preferences(file, prompt_format="chat")) == ENDS
    bad = write(tmp_path / f"bad {name}", [ROW | {"rejected_ended": 1}])
    where = f"{bad}, row 1, column rejected_ended: is a number, not true or false; say whether the completion ended by itself"
    with pytest.raises(DataError) as refused:
        load_preferences(bad)
    assert str(refused.value) == where
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, revision: datasets.Dataset.from_list(ROWS))
    assert ends_of(load_preferences("owner/name")) == ENDS
    mapped = load_preferences([ROW | {"whole": False}], columns={"chosen_ended": "whole"})
    assert ends_of(mapped) == [(False, None)]


@pytest.mark.parametrize("kind", WRITTEN_KINDS)
def test_ends_are_written_and_turn_with_their_sides(kind: str, tmp_path: Path) -> None:
    records = [turned(record) for record in load_preferences(ROWS)]
    assert records[0] == replace(
        load_preferences(ROWS)[0], chosen=" no", rejected=" yes", chosen_ended=False, rejected_ended=True
    )
    write_preferences(tmp_path / f"pairs{kind}", records)
    back = load_preferences(tmp_path / f"pairs{kind}")
    assert ends_of(back) == [(right, left) for left, right in ENDS] and [one.chosen for one in back] == [" no"] * 3


TEXT = st.text("ab é不\n", max_size=12)


@given(TEXT.filter(str.strip), TEXT, TEXT, st.booleans(), st.sampled_from([BYTES, MERGING]))
def test_what_was_cut_has_the_tokens_of_what_ended_but_the_end(
    prompt: str, chosen: str, rejected: str, chat: bool, tokenizer: Any
) -> None:
    assume(chosen != rejected and rejected)
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected, "rejected_ended": ended} for ended in (True, False)]
    whole, cut = (
        tokenize_record(record, tokenizer) for record in load_preferences(rows, prompt_format="chat" if chat else "as_is")
    )
    assert cut.chosen_ids == whole.chosen_ids and cut.prompt_ids == whole.prompt_ids
    assert whole.rejected_ids == (*cut.rejected_ids, tokenizer.eos_token_id)
    assert (cut.cuts, whole.cuts) == ((False, True), (False, False))


def test_cutting_shortens_what_was_cut_and_nothing_is_left_of_nothing() -> None:
    rows = [ROW | {"chosen": " yes, yes", "chosen_ended": False}, ROW | {"rejected": "", "rejected_ended": False}]
    records = load_preferences(rows)
    data = tokenize_records(records, BYTES, max_length=8)
    assert data.report.dropped_rows == (("memory", 2),) and data.report.cut_completions == 1
    (pair,) = data.pairs
    assert BYTES.decode(pair.chosen_ids) == " yes," and BYTES.decode(pair.rejected_ids) == " no<eos>"
    whole = tokenize_records(records[:1], BYTES).pairs[0]
    assert BYTES.decode(whole.chosen_ids) == " yes, yes" and whole.cuts == (True, False)


def test_a_template_that_changes_what_it_is_told_leaves_a_cut_completion_as_it_was_drawn() -> None:
    trimming = byte_tokenizer(chat_template=CHATML.replace("message['content']", "message['content']|trim"))
    (record,) = load_preferences([ROW | {"chosen": " so ", "chosen_ended": False}], prompt_format="chat")
    pair = tokenize_record(record, trimming)
    assert trimming.decode(pair.chosen_ids) == " so " and trimming.decode(pair.rejected_ids) == "no<eos>"


def test_half_a_character_at_the_end_of_what_was_cut_is_left_out() -> None:
    rows = [ROW | {"chosen": f" yes{end}", "chosen_ended": ended} for end in ("\ufffd", "") for ended in (True, False)]
    ended, cut, _, bare = (tokenize_record(record, BYTES) for record in load_preferences(rows))
    assert cut == bare and len(ended.chosen_ids) == len(cut.chosen_ids) + 4


@pytest.mark.parametrize("reference", [None, MERGING, byte_tokenizer(chat_template=CHATML.replace("turn", "pad"))])
@pytest.mark.parametrize("system_prompt", [None, "be kind"])
def test_no_reference_reads_an_end_that_was_not_drawn(reference: Any, system_prompt: str | None) -> None:
    records = load_preferences(ROWS[:2], prompt_format="chat")
    pairs = [tokenize_record(record, BYTES) for record in records]
    seen = tokenize_for_reference(records, pairs, BYTES, reference, system_prompt=system_prompt)
    tokenizer = reference or BYTES
    assert [[tokenizer.decode(ids) for ids in pair.completions] for pair in seen] == [
        [" yes<eos>", " no"],
        [" yes", " no<eos>"],
    ]
