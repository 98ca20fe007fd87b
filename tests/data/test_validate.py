"""Validation reads to the end and says everything."""

import gzip
import json

import datasets
import pytest

from fakes import CHATML, byte_tokenizer
from polyref.data import render_report, validate_preferences
from polyref.errors import ConfigError, DataError, ModelError

GOOD = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
ROWS = [
    GOOD,
    GOOD,
    GOOD | {"chosen": "no", "rejected": "yes", "chosen_probability": 0.5},
    GOOD | {"rejected": "yes"},
    GOOD | {"prompt": "P", "rejected": " "},
    {"prompt": 1, "chosen": None, "rejected": "no"},
    GOOD | {"chosen": None},
    GOOD | {"reference_weights": [1.0]},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row) for row in ROWS]
    path.write_text("\n".join([*lines[:5], '{"prompt": ', *lines[5:]]) + "\n")
    return path


def test_every_bad_row_is_found_with_its_place(file):
    report = validate_preferences(file)
    assert [(p.row, p.column, p.what) for p in report.problems] == [
        (4, "rejected", "is identical to chosen"),
        (6, "12", "is not JSON (Expecting value)"),
        (7, "prompt", "is a number"),
        (7, "chosen", "is null"),
        (8, "chosen", "is null"),
        (9, "reference_weights", "holds 1 weights where row 1 holds none"),
    ]
    assert {p.file for p in report.problems} == {str(file)} and all(p.fix for p in report.problems)
    assert (report.rows, report.pairs, report.prompts) == ({"train": 9}, {"train": 4}, {"train": 2})
    assert (report.duplicates, report.reversals, report.identical, report.ties, report.empty_replies) == (1, 1, 1, 1, 1)
    assert report.bad_rows == 5
    assert report.unit == "characters" and report.lengths["chosen"] == (2, 2, 3, 3, 3, 3)


def test_columns_that_are_not_read_and_prompts_that_are_not_given_are_told(tmp_path):
    path = tmp_path / "mapped.jsonl"
    rows = [{"question": "Q", "chosen": "the one", "rejected": "the other", "margn": 1.0, "\x1b[2J": 0}, GOOD | {"margin": 1.0}]
    path.write_text("\n".join(map(json.dumps, rows)))
    text = render_report(validate_preferences(path))
    assert "\ncolumns read: chosen, rejected, prompt, margin; left alone: question, margn, \\x1b[2J\n" in text
    assert "       1  pairs without a prompt column: their prompt is what chosen and rejected begin with\n" in text
    mapped = validate_preferences(rows[:1], columns={"prompt": "question"})
    assert mapped.implicit == 0 and mapped.columns["question"] and "without a prompt" not in render_report(mapped)


def test_the_report_as_text(file):
    text = render_report(validate_preferences(file))
    assert "train: 9 rows, 4 usable pairs, 2 distinct prompts\n" in text
    assert "       1  duplicate pairs\n" in text and "       5  rows that cannot be used\n" in text
    assert "characters  shortest       25%       50%       75%       95%   longest\n" in text
    assert f"\n{file}, row 4, column rejected: is identical to chosen; remove the row: it states no preference\n" in text
    assert (
        f"\n{file}, row 7, column chosen: is null; give text, or a list of {{'role', 'content'}} messages\n    also in row 8\n"
        in text
    )
    assert "None" not in text


def test_a_torn_file_is_reported_after_what_could_be_read(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(GOOD) + "\n").encode() * 9)[:-8])
    report = validate_preferences(path)
    assert report.pairs == {"train": 9} and report.problems[0].row == 10 and "torn or corrupt" in report.problems[0].what


def test_prompts_shared_across_splits():
    data = datasets.DatasetDict(
        train=datasets.Dataset.from_list([GOOD, GOOD | {"prompt": "P"}]), test=datasets.Dataset.from_list([GOOD])
    )
    assert validate_preferences(data).rows == {"train": 2}
    report = validate_preferences(data, splits=("train", "test", "test"))
    assert (report.rows, report.shared_prompts, report.duplicates) == ({"train": 2, "test": 1}, 1, 1)
    assert "       1  prompts in more than one split\n" in render_report(report)
    files = validate_preferences({"training": [GOOD], "held out": [GOOD, GOOD | {"prompt": "P"}]})
    assert (files.rows, files.shared_prompts) == ({"training": 1, "held out": 2}, 1)


def test_a_file_has_no_splits(file):
    assert validate_preferences(file, splits=("train", "test")).rows == {"train": 9}


def test_with_a_tokenizer():
    rows = [
        GOOD | {"prompt": "xa", "chosen": "b"},
        GOOD | {"chosen": "<eos>" * 3},
        GOOD | {"chosen": "y" * 99},
        GOOD | {"prompt": "Q" * 99},
    ]
    report = validate_preferences(rows, tokenizer=byte_tokenizer([("a", "b")]), max_length=32)
    assert (report.unit, report.moved_boundaries, report.special_texts, report.cut, report.dropped) == ("tokens", 1, 1, 1, 1)
    assert report.lengths["prompt"] == (2, 2, 2, 2, 100, 100) and report.lengths["chosen"][-1] == 100
    assert "       1  pairs dropped with no completion left\n" in render_report(report)


def test_completions_that_were_cut_when_drawn_are_counted():
    rows = [
        GOOD | {"chosen_ended": False, "rejected_ended": False},
        GOOD | {"chosen_ended": True, "rejected_ended": False},
        GOOD,
    ]
    report = validate_preferences(rows, tokenizer=byte_tokenizer(), max_length=32)
    assert (report.unended, report.cut, report.dropped) == (3, 0, 0) and report.lengths["rejected"] == (2, 2, 2, 3, 3, 3)
    assert "       3  completions that were cut when drawn (ended = false)\n" in render_report(report)
    assert validate_preferences(rows[2:]).unended == 0


def test_rows_that_the_tokenizer_refuses_are_collected():
    template = "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    rows = [GOOD, GOOD | {"prompt": "bad"}]
    report = validate_preferences(rows, prompt_format="chat", tokenizer=byte_tokenizer(chat_template=template))
    assert [(p.row, p.what) for p in report.problems] == [(2, "the chat template refuses the messages (no)")]
    with pytest.raises(ModelError, match="there is no chat template"):
        validate_preferences(rows, prompt_format="chat", tokenizer=byte_tokenizer(chat_template=None))


def test_rows_in_another_format_are_collected():
    report = validate_preferences([GOOD, GOOD], prompt_format="transcript", columns={"prompt": "chosen", "chosen": "prompt"})
    assert [p.row for p in report.problems] == [1, 2] and report.problems[0].column == "chosen"
    assert not report.lengths and "0 usable pairs" in render_report(report)


def test_hostile_text_reaches_no_terminal():
    rows = [{"\x1b[31m\u202e<img src=x onerror=alert(1)>": 1}, GOOD | {"reference_weights": ["\x1b]0;x\x07"]}, GOOD]
    text = render_report(validate_preferences({"tr\x1b[2Jain\n": rows}, columns={"margin": "\x1b[5m"}))
    assert text.replace("\n", "").isprintable()
    assert r"tr\x1b[2Jain: 3 rows" in text and r"column \x1b[5m: is missing" in text


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match="there is no such file"):
        validate_preferences(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="memory: there are no rows"):
        validate_preferences([])
    with pytest.raises(ConfigError, match="prompt_format is 'x'"):
        validate_preferences([GOOD], prompt_format="x")
