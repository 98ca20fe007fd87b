"""The columns of an auxiliary preference model, from rows to token ids."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fakes import byte_tokenizer, pair_rows
from polyref.data.records import parse_record, read_record, record_to_row, to_messages
from polyref.data.sources import check_alike, load_preferences
from polyref.data.tokenize import tokenize_for_reference, tokenize_record, tokenize_records
from polyref.data.validate import validate_preferences
from polyref.data.validation_text import render_report
from polyref.errors import DataError

G = {"predicted_probability": 0.8, "auxiliary_1": ["a", "bb"], "auxiliary_2": ["ccc", "d"], "auxiliary_probability": [0.9, 0]}
GOOD = {"prompt": "Q", "chosen": "yes", "rejected": "no"} | G
USER = {"role": "user", "content": "Q"}


def turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


CHAT = G | {
    "prompt": [USER],
    "chosen": turn("yes"),
    "rejected": turn("no"),
    "auxiliary_1": [turn("a"), turn("bb")],
    "auxiliary_2": [turn("ccc"), turn("d")],
}
PLAIN = {name: value for name, value in GOOD.items() if name not in G}


def parse(row, **kwargs):
    return parse_record(row, source="pairs.jsonl", row_number=7, **kwargs)


def test_lists_and_single_values_are_read():
    record = parse(GOOD)
    assert (record.auxiliary_1, record.auxiliary_2, record.auxiliary_probability) == (("a", "bb"), ("ccc", "d"), (0.9, 0.0))
    assert record.predicted_probability == 0.8
    for row in (GOOD, CHAT):
        one = parse(row | {name: row[name][0] for name in list(G)[1:]})
        assert one.auxiliary_1 == parse(row).auxiliary_1[:1] and one.auxiliary_probability == (0.9,)
    assert parse(CHAT).auxiliary_2 == (tuple(turn("ccc")), tuple(turn("d")))


def test_null_columns_are_absent_columns():
    assert parse(PLAIN | dict.fromkeys(G)) == parse(PLAIN)


@pytest.mark.parametrize("row", [GOOD, CHAT], ids=["text", "chat"])
def test_a_record_goes_back_to_the_row_it_came_from(row):
    assert parse(record_to_row(parse(row))) == parse(row)
    assert not set(G) & record_to_row(parse(PLAIN)).keys()


def test_formats_reach_auxiliary_completions_too():
    assert to_messages(parse(GOOD), "chat") == parse(CHAT)
    spoken = parse(GOOD | {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " yes", "auxiliary_1": [" a", " bb"]})
    assert to_messages(spoken, "transcript") == parse(CHAT)
    longer = parse(GOOD | {"prompt": "\n\nHuman: Q\n\nAssistant:", "auxiliary_2": ["x\n\nHuman: y", "d"]})
    with pytest.raises(DataError, match="row 7, column other: holds more turns than one reply"):
        to_messages(longer, "transcript", columns={"auxiliary_2": "other"})


HALF = [({name: None}, name, "is missing where") for name in G] + [
    ({name: None for name in list(G)[1:]}, "auxiliary_1", "is missing where predicted_probability is given; give all of"),
]
WRONG = [
    ({"predicted_probability": 1.2}, "predicted_probability", "is 1.2, outside 0 to 1"),
    ({"predicted_probability": float("nan")}, "predicted_probability", "is nan, not a finite number"),
    ({"predicted_probability": [0.5]}, "predicted_probability", "is a list, not a number"),
    ({"auxiliary_probability": [0.5, float("nan")]}, "auxiliary_probability", "entry 2 is nan, not a finite number"),
    ({"auxiliary_probability": [-0.5, 1]}, "auxiliary_probability", "entry 1 is -0.5, outside 0 to 1"),
    ({"auxiliary_probability": [0.5]}, "auxiliary_probability", "holds 1 entries where auxiliary_1 holds 2"),
    ({"auxiliary_probability": []}, "auxiliary_probability", "is an empty list"),
    ({"auxiliary_probability": "0.5"}, "auxiliary_probability", "is text, not a number"),
    ({"auxiliary_probability": 2}, "auxiliary_probability", "is 2, outside 0 to 1"),
    ({"auxiliary_2": "ccc"}, "auxiliary_2", "holds 1 entries where auxiliary_1 holds 2"),
    ({"auxiliary_1": []}, "auxiliary_1", "is an empty list"),
    ({"auxiliary_1": ["a", None]}, "auxiliary_1", "entry 2 is null"),
    ({"auxiliary_1": 3}, "auxiliary_1", "is a number"),
    ({"auxiliary_1": ["a", "d"]}, "auxiliary_2", "entry 2 is identical to that of auxiliary_1; draw the pair again"),
    ({"auxiliary_1": ["a", turn("b")]}, "auxiliary_1", "entry 2 is not of one kind with chosen"),
    ({"prompt": None, "chosen": "Q yes", "rejected": "Q no"}, "prompt", "is null"),
]


@pytest.mark.parametrize(("change", "column", "line"), HALF + WRONG, ids=lambda value: str(value)[:60])
def test_what_cannot_be_used_is_one_line_with_its_place(change, column, line):
    with pytest.raises(DataError) as caught:
        parse(GOOD | change)
    message = str(caught.value)
    assert message.startswith(f"pairs.jsonl, row 7, column {column}: {line}")
    assert "; " in message and message.isprintable() and caught.value.exit_code == 2


def test_conversations_repeat_no_prompt_and_end_in_one_reply():
    whole = {name: value for name, value in CHAT.items() if name != "prompt"}
    with pytest.raises(DataError, match="column prompt: is missing where auxiliary columns are given"):
        parse(whole | {"chosen": [USER, *turn("yes")], "rejected": [USER, *turn("no")]})
    with pytest.raises(DataError, match="column auxiliary_1: entry 2 is not one assistant message"):
        parse(CHAT | {"auxiliary_1": [turn("a"), [USER, *turn("b")]]})


def test_rows_need_be_alike_only_where_auxiliary_pairs_are_read():
    fewer = GOOD | {name: value[:1] for name, value in G.items() if isinstance(value, list)}
    for first, second, words in (
        (GOOD, fewer, "holds 1 auxiliary pairs where row 1 holds 2"),
        (GOOD, PLAIN, "holds no auxiliary pairs where row 1 holds 2"),
        (PLAIN, GOOD, "holds 2 auxiliary pairs where row 1 holds none"),
    ):
        records = load_preferences([first, second])
        with pytest.raises(DataError, match=f"row 2, column auxiliary_1: {words}; give every row as many"):
            check_alike(records[1], records[0], "auxiliary_1")
        (problem,) = validate_preferences([first, second]).problems
        assert (problem.row, problem.column, problem.what) == (2, "auxiliary_1", words)
    renamed = [{"aux" if k == "auxiliary_1" else k: v for k, v in row.items()} for row in (GOOD, fewer)]
    (problem,) = validate_preferences(renamed, columns={"auxiliary_1": "aux"}).problems
    assert problem.column == "aux"


@pytest.mark.parametrize("row", [GOOD, CHAT], ids=["text", "chat"])
def test_parquet_gives_the_same_records(row, tmp_path):
    pq.write_table(pa.Table.from_pylist([row | {"margin": None}, row | {"margin": 1.0}]), tmp_path / "pairs.parquet")
    (first, second) = load_preferences(tmp_path / "pairs.parquet")
    assert record_to_row(first) == record_to_row(parse(row)) and second.margin == 1.0


def test_validation_measures_auxiliary_completions_and_lists_bad_rows():
    rows = [GOOD, GOOD | {"prompt": "R", "auxiliary_probability": [0.1, 7]}, PLAIN | {"prompt": "S"}]
    for tokenizer, longest in ((None, 3), (byte_tokenizer(), 4)):
        report = validate_preferences(rows, tokenizer=tokenizer)
        assert report.lengths["auxiliary"][-1] == longest and report.pairs == {"train": 1}
        assert [(p.row, p.column) for p in report.problems] == [(2, "auxiliary_probability"), (3, "auxiliary_1")]
        assert any(line.startswith("auxiliary ") for line in render_report(report).splitlines())
    assert "auxiliary" not in validate_preferences([PLAIN]).lengths


def test_a_bad_row_lists_its_problem_once():
    record, problems = read_record(GOOD | {"auxiliary_probability": None}, source="f", row_number=1)
    assert record is None and [problem.column for problem in problems] == ["auxiliary_probability"]


# Tokens.

TOKENIZER = byte_tokenizer()


@pytest.mark.parametrize("row", [GOOD, CHAT], ids=["text", "chat"])
def test_each_auxiliary_completion_has_the_ids_it_has_as_a_chosen_one(row):
    pair = tokenize_record(parse(row), TOKENIZER)
    assert len(pair.completions) == 6 and pair.cuts == (False,) * 6
    order = [row["auxiliary_1"][0], row["auxiliary_2"][0], row["auxiliary_1"][1], row["auxiliary_2"][1]]
    for completion, ids in zip(order, pair.auxiliary_ids, strict=True):
        alone = tokenize_record(parse({k: row[k] for k in ("prompt", "rejected")} | {"chosen": completion}), TOKENIZER)
        assert (alone.prompt_ids, alone.chosen_ids) == (pair.prompt_ids, ids)


def test_a_merge_across_the_boundary_in_an_auxiliary_completion_moves_the_boundary_of_all():
    tokenizer = byte_tokenizer([("Q", "z")])
    plain, moved = (tokenize_record(parse(row), tokenizer) for row in (GOOD, GOOD | {"auxiliary_2": ["ccc", "z"]}))
    assert len(moved.prompt_ids) == len(plain.prompt_ids) - 1
    assert [len(ids) for ids in moved.completions] == [len(ids) + 1 for ids in plain.completions[:5]] + [2]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_cutting_reaches_auxiliary_completions(mode):
    rows = [row | G | {"auxiliary_1": ["x" * 60, "y"]} for row in pair_rows(2)]
    data = tokenize_records(load_preferences(rows), TOKENIZER, max_length=32, truncation_mode=mode)
    for pair in data.pairs:
        assert pair.auxiliary_cut == (True, False, False, False)
        assert len(pair.prompt_ids) + max(map(len, pair.completions)) == 32
    assert data.report.cut_completions == sum(sum(pair.cuts) for pair in data.pairs)


def test_references_with_another_tokenizer_score_the_text_of_cut_completions():
    record = parse(GOOD | {"auxiliary_1": ["a€", "b"]})
    data = tokenize_records([record], TOKENIZER, max_length=4)
    other = byte_tokenizer([("a", "b")])
    (mine,) = tokenize_for_reference(data.records, data.pairs, TOKENIZER, other)
    assert [other.decode(ids) for ids in mine.auxiliary_ids] == ["a", "cc", "b<eos>", "d<eos>"]
    assert mine.auxiliary_cut == data.pairs[0].auxiliary_cut == (True, True, False, False)
    (prompted,) = tokenize_for_reference(data.records, data.pairs, TOKENIZER, None, system_prompt="S")
    assert prompted.completions == data.pairs[0].completions and len(prompted.prompt_ids) > len(data.pairs[0].prompt_ids)
