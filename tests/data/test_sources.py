"""Every kind of source gives the same records; every way it can be broken is one line."""

import gzip
import json
import os
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyref.data import load_packaged, load_preferences, parse_record, split_by_prompt
from polyref.data.sources import by_prompt
from polyref.errors import ConfigError, DataError

ROWS = [
    {"prompt": f"Question {i // 2}?", "chosen": f"naïve {i}", "rejected": "不", "chosen_probability": 0.5 + i / 20, "extra": i}
    for i in range(10)
]
PLAIN = [(row["prompt"], row["chosen"], row["rejected"], row["chosen_probability"]) for row in ROWS]


def plain(records):
    return [(r.prompt, r.chosen, r.rejected, r.chosen_probability) for r in records]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def refused(source, **kwargs):
    """The one line with which `source` is refused."""
    with pytest.raises(DataError) as caught:
        load_preferences(source, **kwargs)
    line = str(caught.value)
    assert line.isprintable() and caught.value.exit_code == 2
    return line


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet"])
def test_every_kind_of_file_reads_alike(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".parquet"):
        pa.parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3)
    else:
        content = lines(ROWS) if ".jsonl" in name else json.dumps(ROWS, indent=1).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    records = load_preferences(path)
    assert plain(records) == PLAIN
    assert [(r.source, r.row) for r in records] == [(str(path), i) for i in range(1, 11)]
    assert plain(load_preferences(str(path), limit=3)) == PLAIN[:3]


def test_folders_data_sets_and_rows_read_alike(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    parts = datasets.DatasetDict(train=data, test=data.select([3]))
    parts.save_to_disk(tmp_path / "two")
    for source in (data, data.with_format("numpy"), parts, tmp_path / "one", tmp_path / "two", ROWS, iter(ROWS)):
        assert plain(load_preferences(source)) == PLAIN
    assert plain(load_preferences(tmp_path / "two", split="test")) == PLAIN[3:4] == plain(load_preferences(parts, split="test"))
    assert "there is no split 'dev'; choose one of train, test" in refused(parts, split="dev")


def test_message_lists_survive_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    row = {"prompt": [{"role": "user", "content": "Q"}]}
    row |= {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    pa.parquet.write_table(pa.Table.from_pylist([row]), path)
    assert load_preferences(path)[0].chosen == ({"role": "assistant", "content": "chosen"},)


def test_blank_lines_and_a_byte_order_mark_are_no_rows(write):
    path = write("a.jsonl", b"\xef\xbb\xbf" + lines(ROWS[:1]) + b"\n \r\n" + lines(ROWS[1:2]))
    assert [(r.row, r.chosen) for r in load_preferences(path)] == [(1, "naïve 0"), (4, "naïve 1")]


BROKEN = [
    (
        "a.jsonl",
        lines(ROWS[:2]) + b'{"prompt" "x"}\n',
        "row 3, column 11: is not JSON (Expecting ':' delimiter); repair or remove the line",
    ),
    ("a.jsonl", lines(ROWS[:1]) + b'{"prompt": "x"', "row 2, column 15: is not JSON (Expecting ',' delimiter)"),
    ("a.jsonl", lines(ROWS[:1]) + b'{"prompt": "caf\xe9"}\n', "row 2, column 16: is not UTF-8 (byte 0xe9)"),
    ("a.jsonl", b"[" * 100_000 + b"\n", "row 1, column 1: is JSON nested too deep to read"),
    ("a.jsonl", b'{"margin": ' + b"9" * 5000 + b"}\n", "row 1, column 1: is JSON that cannot be read (Exceeds the limit"),
    ("a.jsonl", b"[1, 2]\n", "row 1: is a list, not an object"),
    ("a.jsonl", b'{"prompt": "Q", "chosen": "a", "rejected": NaN}\n', "row 1, column rejected: is a number"),
    ("a.jsonl", b"\n\n", "there are no rows; give data with at least one pair"),
    ("a.jsonl.gz", gzip.compress(lines(ROWS * 99))[:-9], "the file is torn or corrupt from here on ("),
    ("a.jsonl.gz", b"plain text", "row 1: the file is torn or corrupt from here on (Not a gzipped file"),
    (
        "a.json",
        b'[{"prompt": "x"},\n {"prompt"]',
        "line 2, column 11: is not JSON (Expecting ':' delimiter); a .json file holds one",
    ),
    ("a.json", lines(ROWS), "line 2, column 1: is not JSON (Extra data); a .json file holds one list of rows"),
    ("a.json", b'{"data": []}', "holds an object, not a list; a .json file holds one list"),
    ("a.json", b"[]", "there are no rows"),
    ("a.json", b'["\xff"]', "line 1, column 3: is not UTF-8 (byte 0xff)"),
    ("a.json.gz", gzip.compress(b"[]")[:-4], "row 1: the file is torn or corrupt from here on ("),
    ("a.parquet", b"PAR1 no parquet PAR1", "row 1: the file is torn or corrupt from here on ("),
    ("a.parquet", b"", "row 1: the file is torn or corrupt from here on ("),
    ("a.csv", b"prompt,chosen,rejected\n", "the kind of file is not known; give one of .jsonl, .jsonl.gz, .json"),
]


@pytest.mark.parametrize(("name", "content", "line"), BROKEN, ids=[f"{name} {line[:45]}" for name, _, line in BROKEN])
def test_a_broken_file_is_one_line_with_its_place(write, name, content, line):
    path = write(name, content)
    message = refused(path)
    assert message.startswith(str(path)) and line in message


def test_torn_gzip_names_the_row_after_the_last_whole_one(write):
    rows = [row | {"extra": os.urandom(40).hex()} for row in ROWS * 200]
    whole = gzip.compress(lines(rows))
    message = refused(write("a.jsonl.gz", whole[: len(whole) // 2]))
    row = int(message.split(", row ")[1].split(":")[0])
    assert 1 < row < len(rows)


def test_a_page_torn_out_of_parquet(write, tmp_path):
    pa.parquet.write_table(pa.Table.from_pylist(ROWS * 50), tmp_path / "whole.parquet", row_group_size=100)
    content = bytearray((tmp_path / "whole.parquet").read_bytes())
    content[4:400] = b"\xff" * 396
    assert "the file is torn or corrupt from here on (" in refused(write("a.parquet", bytes(content)))


def test_what_is_not_there(tmp_path):
    assert refused(tmp_path / "a.jsonl").endswith("a.jsonl: there is no such file or folder; check the path")
    assert "is not a folder saved by datasets; give a folder written by save_to_disk" in refused(tmp_path)
    assert "there is no such file or folder" in refused("a b/c")
    assert "no packaged data set is called 'x'; there is pandalm-human" in refused("packaged:x")
    assert "preference data cannot be read from a number; give a path" in refused(5)
    assert "preference data cannot be read from an object" in refused(ROWS[0])


def test_a_torn_folder(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "data")
    (tmp_path / "data" / "state.json").write_text("{")
    assert "datasets cannot load it (" in refused(tmp_path / "data")


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    def load_dataset(name, *, split, revision):
        raise ConnectionError(f"no way to {name}\n\x1b[31mat all {split} {revision}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    line = refused("owner/name", split="test", revision="abc")
    assert line.startswith(r"owner/name: datasets cannot load it (no way to owner/name \x1b[31mat all test abc); check")


def test_a_hub_id_that_can_be_had(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, revision: datasets.Dataset.from_list(ROWS))
    assert load_preferences("owner/name")[0].source == "owner/name"


def test_streams_are_refused():
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    assert refused(stream).startswith("memory: IterableDataset streams rows that cannot be counted or split; load it without")


def test_the_first_bad_row_ends_the_reading(write):
    path = write("a.jsonl", lines([*ROWS[:4], ROWS[4] | {"chosen": 5}, *ROWS[5:]]))
    assert refused(path) == f"{path}, row 5, column chosen: is a number; give text, or a list of {{'role', 'content'}} messages"


def test_reference_weights_are_in_every_row_or_in_none(write):
    two, three = {"w": [0.5, 0.5]}, {"w": [1, 0, 0]}
    columns = {"reference_weights": "w"}
    path = write("a.jsonl", lines([ROWS[0] | two, ROWS[1] | three]))
    line = "row 2, column w: holds 3 weights where row 1 holds 2; give every row one weight for each reference"
    assert refused(path, columns=columns).endswith(line)
    rows = [ROWS[0] | two, ROWS[1] | {"w": None}]
    assert "row 2, column w: holds no weights where row 1 holds 2" in refused(rows, columns=columns)


@pytest.mark.parametrize("limit", [0, -1, 2.5, True])
def test_limit_is_a_number_of_rows(limit):
    with pytest.raises(ConfigError, match="give a number of rows of at least 1"):
        load_preferences(ROWS, limit=limit)


def test_packaged_pairs():
    records = load_packaged("pandalm-human")
    assert len(records) == 888 and len({r.prompt for r in records}) == 158
    assert Counter(r.chosen_probability for r in records) == {1.0: 792, 0.833333: 27, 0.666667: 69}
    assert load_preferences("packaged:pandalm-human", prompt_format="chat", limit=1)[0].prompt[0]["role"] == "user"


def test_packaged_pairs_are_the_source_rows(shared_data):
    with gzip.open(shared_data / "pandalm-human" / "pairs.jsonl.gz", "rt", encoding="utf-8") as file:
        for line, record in zip(file, load_packaged("pandalm-human"), strict=True):
            row = json.loads(line)
            assert [row[name] for name in ("prompt", "chosen", "rejected")] == [record.prompt, record.chosen, record.rejected]
            share = sum({row["chosen_position"]: 1, 0: 0.5}.get(vote, 0) for vote in row["votes"]) / 3
            assert record.chosen_probability == pytest.approx(share, abs=1e-6)


@given(st.lists(st.integers(0, 6), min_size=2, max_size=30), st.integers(1, 29), st.integers(0, 5), st.randoms())
def test_a_split_shares_no_prompt_and_depends_on_no_order(prompts, held_out, seed, random):
    records = [
        parse_record({"prompt": f"q{p}", "chosen": f"c{i}", "rejected": "r"}, source="s", row_number=i)
        for i, p in enumerate(prompts)
    ]
    try:
        train, held = split_by_prompt(records, held_out=held_out, seed=seed)
    except (ConfigError, DataError):
        assert held_out >= len(records) or min(Counter(prompts).values()) > held_out
        return
    assert sorted(train + held, key=lambda r: r.row) == records and train and 0 < len(held) <= held_out
    assert not {r.prompt for r in train} & {r.prompt for r in held}
    assert [r.row for r in train] == sorted(r.row for r in train)
    room = held_out - len(held)
    assert all(count > room for prompt, count in Counter(r.prompt for r in train).items())
    shuffled = records.copy()
    random.shuffle(shuffled)
    assert {r.row for r in split_by_prompt(shuffled, held_out=held_out, seed=seed)[1]} == {r.row for r in held}


def test_a_split_by_share_and_by_messages():
    records = load_packaged("pandalm-human", prompt_format="chat")
    train, held = split_by_prompt(records, held_out=0.25, seed=1)
    assert len(held) == 222 and len(train) == 666
    assert held != split_by_prompt(records, held_out=0.25, seed=2)[1]


@pytest.mark.parametrize("held_out", [0, 1.0, 888, -3, True, 2.5, float("nan")])
def test_a_split_that_leaves_a_side_empty_is_refused(held_out):
    with pytest.raises(ConfigError, match="held_out is .* of 888 pairs; give a share"):
        split_by_prompt(load_packaged("pandalm-human"), held_out=held_out, seed=0)


def test_one_prompt_cannot_be_split():
    records = load_preferences([{"prompt": "q", "chosen": str(i), "rejected": "r"} for i in range(4)])
    with pytest.raises(DataError, match="1 prompts for 4 pairs cannot be split with at most 2 pairs held out"):
        split_by_prompt(records, held_out=2, seed=0)


def test_precomputed_reference_columns_are_not_ignored_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "ref_chosen_logps": -1.0}] * 2
    with caplog.at_level("WARNING", logger="polyref"):
        load_preferences(rows)
    assert caplog.text.count("ref_chosen_logps not used") == 1


def test_records_are_grouped_by_prompt_in_order() -> None:
    turns = [{"role": "user", "content": "hello"}]
    replies = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    rows = [{"prompt": p, "chosen": f"yes {i}", "rejected": "no"} for i, p in enumerate("bab")]
    records = load_preferences([*rows, {"prompt": turns} | replies, {"prompt": turns[::-1]} | replies])
    assert [[record.row for record in group] for group in by_prompt(records).values()] == [[1, 3], [2], [4, 5]]
