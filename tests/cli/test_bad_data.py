"""Preference data that cannot be used ends in one line with file, row, column and remedy, and leaves nothing behind."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from cli_world import Outcome, World, assert_one_line, assert_refused, some_rows, table
from polyref import PreferenceConfig, PreferenceTrainer, load_preferences
from polyref.errors import DataError

GOOD = {"prompt": "a question", "chosen": "yes", "rejected": "no"}
LINE = json.dumps(GOOD) + "\n"
HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m<script>\u202e\r"

FILES: dict[str, tuple[Any, ...]] = {
    "malformed JSON": (("a.jsonl", LINE + '{"prompt": \n'), "a.jsonl, row 2, column ", "is not JSON", "repair"),
    "a malformed JSON list": (("a.json", "[\n{,\n]"), "a.json, line 2, column 2: is not JSON", "list of rows"),
    "a JSON object, not a list": (("a.json", LINE), "a.json: holds an object", "list of rows"),
    "a JSON list of numbers": (("a.json", "[1, 2]"), "a.json, row 1: is a number, not an object", "a row is"),
    "a line that is a list": (("a.jsonl", LINE + "[]\n"), "a.jsonl, row 2: is a list, not an object", "a row is"),
    "JSON nested too deep": (("a.jsonl", "[" * 99999 + "\n"), "a.jsonl, row 1, column 1: ", "nested too deep"),
    "a number of 9999 digits": (("a.jsonl", LINE + "9" * 9999 + "\n"), "a.jsonl, row 2", "repair"),
    "not UTF-8": (("a.jsonl", LINE.encode() + b'{"prompt": "\xff"}\n'), "row 2, column 13: is not UTF-8 (byte 0xff)"),
    "an empty file": (("a.jsonl", ""), "a.jsonl: there are no rows", "at least one"),
    "an empty list": (("a.json", "[]"), "a.json: there are no rows", "at least one"),
    "an unknown suffix": (("a.csv", "prompt,chosen\n"), "a.csv: the kind of file is not known", ".parquet"),
    "a torn .gz": (("a.jsonl.gz", gzip.compress(LINE.encode() * 99)[:-9]), "a.jsonl.gz, row ", ": the file is torn", "again"),
    "a .gz that is none": (("a.jsonl.gz", LINE), "a.jsonl.gz, row 1: the file is torn", "again"),
    "a parquet file that is none": (("a.parquet", LINE), "a.parquet, row 1: the file is torn", "again"),
}

SECOND_ROWS: dict[str, tuple[Any, ...]] = {
    "a missing column": ({"rejected": ...}, "row 2, column rejected: is missing (the row has prompt, chosen)", "columns"),
    "no prompt to be found": ({"prompt": ...}, "row 2, column prompt: there is no prompt", "add a prompt column"),
    "a prompt that is a number": ({"prompt": 3}, "row 2, column prompt: is a number", "give text"),
    "a completion that is null": ({"chosen": None}, "row 2, column chosen: is null", "give text"),
    "an empty prompt": ({"prompt": " "}, "row 2, column prompt: is empty", "fill it in"),
    "no messages": ({"chosen": []}, "row 2, column chosen: is an empty list of messages", "remove"),
    "a message without role": ({"prompt": [{"content": ""}]}, "row 2, column prompt: the role of message 1 is missing"),
    "text beside messages": ({"prompt": [{"role": "user", "content": "a"}]}, "row 2, column prompt: holds messages while"),
    "half a surrogate pair": ({"chosen": "a\ud800"}, "row 2, column chosen: character 2 is half of a surrogate pair"),
    "an identical pair": ({"rejected": "yes"}, "row 2, column rejected: is identical to chosen", "remove"),
    "probability NaN": ({"chosen_probability": float("nan")}, "row 2, column chosen_probability: is nan", "correct"),
    "probability 1.5": ({"chosen_probability": 1.5}, "row 2, column chosen_probability: is 1.5, outside 0 to 1", "give"),
    "probability as text": ({"chosen_probability": "0.5"}, "row 2, column chosen_probability: is text, not a number"),
    "probability true": ({"chosen_probability": True}, "row 2, column chosen_probability: is true or false, not a"),
    "margin infinite": ({"margin": float("inf")}, "row 2, column margin: is inf, not a finite number", "correct"),
    "weights negative": ({"reference_weights": [2, -1]}, "column reference_weights: holds the negative weight -1", "sum"),
    "weights of sum 2": ({"reference_weights": [1, 1]}, "column reference_weights: sums to 2", "sum to 1"),
    "weights in this row only": ({"reference_weights": [1]}, "row 2, column reference_weights: holds 1 weights", "every row"),
    "hostile text": ({"rejected": ..., HOSTILE: HOSTILE}, "row 2, column rejected: is missing", r"\x1b[2J", "<script>"),
}

ROWS = some_rows()
ONE_PROMPT = [GOOD | {"chosen": f"yes {i}"} for i in range(4)]
WEIGHTED = [row | {"reference_weights": [0.5, 0.5]} for row in ROWS]
TRAINING: dict[str, tuple[Any, ...]] = {
    "one row and held_out": (([GOOD], {"held_out": 1}), "held_out is 1 of 1 pairs", "smaller number"),
    "one prompt and held_out": ((ONE_PROMPT, {"held_out": 0.5}), "1 prompts for 4 pairs cannot be split", "more prompts"),
    "held_out negative": ((ROWS, {"held_out": -1}), "held_out is -1", "give a number of pairs"),
    "held_out NaN": ((ROWS, {"held_out": "nan"}), "held_out", "nan", "--help"),
    "held_out 1.5": ((ROWS, {"held_out": 1.5}), "held_out is 1.5", "give a number of pairs"),
    "eval_data and held_out": ((ROWS, {"held_out": 1, "eval_data": "x.jsonl"}), "eval_data and held_out are both", "one of"),
    "limit 0": ((ROWS, {"limit": 0}), "limit is 0", "at least 1"),
    "every prompt too long": ((ROWS, {"max_length": 8}), "no pair of the train set has a completion left within 8", "raise"),
    "a column of no field": ((ROWS, {"columns": {"question": "prompt"}}), "'question', which is no field", "the fields are"),
    "a column that is not there": ((ROWS, {"columns": {"prompt": "q"}}), "row 1, column q: is missing", "columns"),
    "a hostile column": ((ROWS, {"columns": {"prompt": HOSTILE}}), r"\x1b[2J", "is missing", "columns"),
    "transcripts that are none": ((ROWS, {"prompt_format": "transcript"}), "row 1, column prompt: does not begin", "format"),
    "too many weights": ((WEIGHTED, {}), "row 1, column reference_weights: 2 reference weights for 1", "one weight"),
    "no such file": ((ROWS, {"data": "absent.jsonl"}), "absent.jsonl: there is no such file or folder", "check the path"),
    "a hostile file name": ((ROWS, {"data": HOSTILE + ".jsonl"}), r"\x1b[2J", "there is no such file", "check"),
}


@table(FILES)
def test_a_bad_file(given: tuple[str, str | bytes], says: list[str], world: World) -> None:
    assert_refused(world, world.score(data=world.file(*given)), says)


@table(SECOND_ROWS)
def test_a_bad_row(given: dict[str, Any], says: list[str], world: World) -> None:
    second = {column: value for column, value in (GOOD | given).items() if value is not ...}
    assert_refused(world, world.score(data=world.pairs(GOOD, second)), says)


@table(TRAINING)
def test_rows_that_do_not_fit_the_settings(given: tuple[list[Any], dict[str, Any]], says: list[str], world: World) -> None:
    rows, settings = given
    assert_refused(world, world.train(**{"data": world.pairs(*rows)} | settings), says)


def test_a_parquet_file_that_is_torn(world: World) -> None:
    file = world.path / "pairs.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    for torn in (file.read_bytes()[:-20], file.read_bytes().replace(b"question", b"\xff\xfe\xfd\xfcstio")):
        file.write_bytes(torn)
        assert_refused(world, world.score(data=file), ["pairs.parquet, row 1", "again"])


def test_folders_that_hold_no_such_data(world: World) -> None:
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(world.path / "saved")
    assert_refused(world, world.train(data=world.path / "saved", split="test"), ["saved: there is no split 'test'", "of train"])
    assert_refused(world, world.train(data=world.model), ["tiny: is not a folder saved by datasets", "save_to_disk"])
    for file in (world.path / "saved").rglob("*.arrow"):
        file.write_bytes(b"torn")
    assert_refused(world, world.train(data=world.path / "saved"), ["saved: datasets cannot load it", "again"])


def test_pairs_that_leave_nothing_to_score(world: World) -> None:
    assert_refused(world, world.score(max_length=8), ["none of 12 pairs has a completion left", "raise max_length"])


VALIDATE: dict[str, tuple[Any, ...]] = {
    "bad rows": (["pairs.jsonl", "bad.jsonl"], "pairs.jsonl, bad.jsonl: 2 of 15 rows cannot be used", "mend or remove"),
    "nothing to check": ([], "there is no data to check", "name it"),
    "no such file": (["absent.jsonl"], "absent.jsonl: there is no such file", "check the path"),
    "an empty file beside a good one": (["pairs.jsonl", "empty.jsonl"], "empty.jsonl: there are no rows", "at least one"),
    "max_length without a model": (["pairs.jsonl", "--max_length", "9"], "max_length is in tokens", "give --model"),
    "revision without a model": (["pairs.jsonl", "--revision", "v1"], "revision is of a model, and there is none", "--model"),
    "max_length 1": (["pairs.jsonl", "--max_length", "1", "--model", "tiny"], "max_length is 1", "at least 2"),
    "a prompt_format": (["pairs.jsonl", "--prompt_format", "x"], "prompt_format", "--help"),
    "a column of no field": (["pairs.jsonl", "--columns", '{"a": "b"}'], "columns maps 'a', which is no field", "the fields"),
}


@table(VALIDATE)
def test_validate_says_that_data_is_bad(given: list[str], says: list[str], world: World) -> None:
    world.pairs()
    world.pairs(GOOD, GOOD | {"rejected": "yes"}, GOOD | {"margin": HOSTILE}, name="bad.jsonl")
    world.file("empty.jsonl", "")
    words = [world.path / word if word.endswith(".jsonl") else world.model if word == "tiny" else word for word in given]
    outcome = world.run(["validate", *words])
    assert_one_line(Outcome(outcome.code, outcome.out, outcome.err.replace(f"{world.path}/", "")), says)
    if "bad rows" in says[0]:
        assert "bad.jsonl, row 2, column rejected: is identical to chosen" in outcome.out
        assert "bad.jsonl, row 3, column margin: is text, not a number" in outcome.out
    assert all(character.isprintable() or character == "\n" for character in outcome.out)


@pytest.mark.slow
@pytest.mark.ci
def test_a_process_of_its_own_ends_alike(world: World) -> None:
    """No library says a word of its own, and no hub is waited for."""
    for data, says in (("nobody/nothing", ["nobody/nothing: datasets cannot load it"]), (HOSTILE, ["there is no such file"])):
        command = [sys.executable, "-m", "polyref.cli.main", *world.train(data=data)]
        done = subprocess.run(command, capture_output=True, text=True, env=world.environment, timeout=120)
        assert_one_line(Outcome(done.returncode, done.stdout, done.stderr), says)
    assert not (world.path / "run").exists()


def test_streams_are_refused_in_python_too(world: World) -> None:
    streamed = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(DataError, match="IterableDataset streams rows that cannot be counted or split; load it without"):
        load_preferences(streamed)
    with pytest.raises(DataError, match="IterableDataset streams rows that cannot be counted or split; load it without"):
        PreferenceTrainer(str(world.model), None, PreferenceConfig(output_dir=str(world.path / "run")), streamed)
