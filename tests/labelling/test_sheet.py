"""What a person wrote into the file comes back as it was meant; what cannot be meant is named by file, row and column."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from labelling_world import some_pairs
from polyref.errors import ConfigError, DataError
from polyref.labelling import pairs_of, read_sheet, write_sheet
from polyref.types import PreferenceRecord

ODD = [
    "=1+1",
    "+cmd",
    "-2",
    "@SUM(A1)",
    "\t=1",
    " =1",
    '=HYPERLINK("http://x.example";"y")',
    "a,b;c\td",
    'say "hi"',
    "l1\r\nl2",
]
Rows = list[list[str]]


def rows_of(path: Path) -> Rows:
    return list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))


def save(path: Path, rows: Rows, delimiter: str = ",") -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8-sig", newline="")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_votes_come_back_in_the_terms_of_the_content(delimiter: str, tmp_path: Path) -> None:
    pairs, path = some_pairs(12), tmp_path / "annotate.csv"
    write_sheet(path, pairs, seed=3)
    assert read_sheet(path, pairs, seed=3) == []
    rows = rows_of(path)
    for i, row in enumerate(rows[1:]):
        row[4] = ("a" if row[2].startswith("better") else " B ", "Tie", "SKIP", "")[i % 4]
    del rows[-1][4], rows[4][4]
    save(path, rows, delimiter)
    votes = read_sheet(path, pairs, seed=3, annotator="ann")
    assert [vote.id for vote in votes] == [pair.id for i, pair in enumerate(pairs) if i % 4 < 3]
    for vote in votes:
        number = [pair.id for pair in pairs].index(vote.id)
        assert vote.annotator == "ann" and vote.choice == ("first", "tie", "skip")[number % 4], "better sorts before worse"
    assert {vote.left for vote in votes} == {"first", "second"}


def test_lines_of_json_too(tmp_path: Path) -> None:
    pairs, path = some_pairs(4), tmp_path / "annotate.jsonl"
    write_sheet(path, pairs, seed=0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [set(row) for row in rows] == [{"id", "prompt", "A", "B", "vote"}] * 4
    for row, vote in zip(rows, ("A" if rows[0]["A"].startswith("better") else "B", "tie", "", None), strict=True):
        row["vote"] = vote
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    votes = read_sheet(path, pairs, seed=0)
    assert [(vote.id, vote.choice) for vote in votes] == [(pairs[0].id, "first"), (pairs[1].id, "tie")]


def test_no_cell_is_a_formula_and_no_text_breaks_the_table(tmp_path: Path) -> None:
    turns = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "=1"})
    records = [PreferenceRecord(text, text + "x", "y" * 200_000) for text in ODD]
    records.append(
        PreferenceRecord(turns, ({"role": "assistant", "content": "=a"},), ({"role": "assistant", "content": "b\x1b"},))
    )
    pairs, path = pairs_of(records), tmp_path / "annotate.csv"
    write_sheet(path, pairs, seed=0)
    before = csv.field_size_limit(2**20)
    rows = rows_of(path)
    csv.field_size_limit(before)
    assert len(rows) == len(pairs) + 1 and {len(row) for row in rows} == {5}
    assert not [cell for row in rows for cell in row if cell.lstrip().startswith(tuple("=+-@"))]
    assert rows[-1][1] == "system: Be kind.\n\nuser: =1" and {"'=a", "b\\x1b"} == set(rows[-1][2:4])
    assert rows[1][1] == "'=1+1" and rows[10][1] == "l1\nl2"
    assert read_sheet(path, pairs, seed=0) == [] and csv.field_size_limit() == before


def vote(word: str) -> Callable[[Rows], None]:
    return lambda rows: rows[2].__setitem__(4, word)


def other_id(rows: Rows) -> None:
    rows[2][0], rows[2][4] = "p0", "A"


def twice(rows: Rows) -> None:
    rows[2][0] = rows[1][0]
    rows[1][4] = rows[2][4] = "A"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (vote("C"), "row 3, column vote: is 'c'; give A, B, tie or skip, or leave it empty"),
        (vote("A B"), "row 3, column vote: is 'a b'; give A"),
        (vote("1"), "row 3, column vote: is '1'; give A"),
        (other_id, "row 3, column id: is no pair of this data; leave the ids as they were written"),
        (twice, "row 3, column id: is there twice with a vote; keep one of the rows"),
        (lambda rows: rows.pop(0), "has no columns id and vote; keep the columns id, prompt, A, B, vote"),
    ],
)
def test_what_is_no_vote_is_named(change: Callable[[Rows], None], says: str, tmp_path: Path) -> None:
    pairs, path = some_pairs(3), tmp_path / "annotate.csv"
    write_sheet(path, pairs, seed=0)
    rows = rows_of(path)
    change(rows)
    save(path, rows)
    with pytest.raises(DataError, match=r"annotate\.csv") as refused:
        read_sheet(path, pairs, seed=0)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", 'id,vote\n"p,A', "a.csv, line 2: is no table"),
        ("a.csv", "", "a.csv: has no columns id and vote"),
        ("a.jsonl", '{"id": "p", "vote": 1}\n', "a.jsonl, row 1, column vote: is a number; give A"),
        ("a.jsonl", '{"id": ["p"], "vote": "A"}\n', "a.jsonl, row 1, column id: is no pair"),
        ("a.jsonl", '{"vote": "A"}\n', "a.jsonl, row 1, column id: is missing"),
        ("a.jsonl", "[]\n", "a.jsonl, row 1: is a list, not an object"),
        ("a.jsonl", "{\n", "a.jsonl, row 1, column 2: is not JSON"),
    ],
)
def test_a_file_that_is_none_is_refused(name: str, content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as refused:
        read_sheet(tmp_path / name, some_pairs(1), seed=0)
    assert says in str(refused.value)


def test_other_kinds_of_file_are_refused(tmp_path: Path) -> None:
    for use in (lambda: write_sheet(tmp_path / "a.xlsx", [], seed=0), lambda: read_sheet(tmp_path / "a.xlsx", [], seed=0)):
        with pytest.raises(ConfigError, match=r"a\.xlsx: the kind of file is not known; name one of \.csv, \.jsonl"):
            use()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_sheet(tmp_path / "a.csv", [], seed=0)
