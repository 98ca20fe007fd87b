"""A file for a person to vote in, with any editor or spreadsheet: a row a pair, and an empty column `vote`.

Columns id, prompt, A, B, vote, as .csv or .jsonl. A vote is A, B, tie or skip, in either case; empty is none yet. Only `id` and
`vote` are read back, so nothing that a spreadsheet does to long or odd texts matters.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polyref.data.fields import kind
from polyref.data.files import read_file
from polyref.data.records import RowError
from polyref.data.write import write_rows
from polyref.errors import ConfigError, DataError
from polyref.files import write_bytes
from polyref.labelling.desk import completion_text, in_content, turns_of
from polyref.labelling.pairs import Pair, left_of, sides
from polyref.labelling.votes import Vote

COLUMNS = ("id", "prompt", "A", "B", "vote")
SHEET_KINDS = (".csv", ".jsonl")
_ANSWERS = {"a": "left", "b": "right", "tie": "tie", "skip": "skip"}
_FORMULA = tuple("=+-@\t＝＋－＠")
_FIX = "give A, B, tie or skip, or leave it empty"


def write_sheet(path: str | Path, pairs: Sequence[Pair], *, seed: int) -> None:
    """Write `pairs` to the .csv or .jsonl file `path`, whole or not at all, A and B in the order of `left_of`.

    In a .csv file text that a spreadsheet would take for a formula has an apostrophe before it.

    Raises:
        ConfigError: another kind of file. RunFolderError: it cannot be written.
    """
    rows = [_row(pair, seed) for pair in pairs]
    if _kind(path) == ".jsonl":
        return write_rows(path, rows)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\r\n")
    table.writerows([COLUMNS, *([_guarded(row[name]) for name in COLUMNS] for row in rows)])
    write_bytes(path, text.getvalue().encode("utf-8-sig"))  # the mark by which spreadsheets know UTF-8
    return None


def read_sheet(path: str | Path, pairs: Iterable[Pair], *, seed: int, annotator: str = "") -> list[Vote]:
    """The votes that `annotator` wrote into what `write_sheet` made of `pairs` with `seed`, in the order of the rows.

    A .csv file may have been saved with semicolons or tabs. Its rows count from 1, the header, as a spreadsheet counts them.

    Raises:
        DataError: no such table, or a RowError that names file, row and column of the first wrong or repeated id or vote.
    """
    known, votes = {pair.id: pair for pair in pairs}, dict[str, Vote]()
    for row, id, answer in _answers(Path(path)):
        if id not in known:
            fix = "leave the ids as they were written, or remove the row"
            raise RowError("is no pair of this data", source=str(path), row=row, column="id", fix=fix)
        if id in votes:
            raise RowError("is there twice with a vote", source=str(path), row=row, column="id", fix="keep one of the rows")
        left = left_of(known[id], seed)
        votes[id] = Vote(id, in_content(answer, left), left, annotator)
    return list(votes.values())


def _answers(path: Path) -> Iterator[tuple[int, Any, str]]:
    """(row, id, answer as of what is shown) of the rows with a vote."""
    for number, row in _json_rows(path) if _kind(path) == ".jsonl" else _csv_rows(path):
        for column in ("id", "vote"):
            if column not in row:
                fix = f"keep the columns {', '.join(COLUMNS)}"
                raise RowError("is missing", source=str(path), row=number, column=column, fix=fix)
        vote = row["vote"]
        if vote is not None and not isinstance(vote, str):
            raise RowError(f"is {kind(vote)}", source=str(path), row=number, column="vote", fix=_FIX)
        word = (vote or "").strip().casefold()
        if word and word not in _ANSWERS:
            raise RowError(f"is {word!r}", source=str(path), row=number, column="vote", fix=_FIX)
        if word:
            yield number, row["id"].strip() if isinstance(row["id"], str) else None, _ANSWERS[word]


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for source, number, value in read_file(path):
        if isinstance(value, DataError):
            raise value
        if not isinstance(value, dict):
            raise RowError(f"is {kind(value)}, not an object", source=source, row=number, fix="restore the line")
        yield number, value


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="replace")  # ids and votes are ASCII, whatever saved the rest
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path), fix="mend or remove it") from error
    header = text.partition("\n")[0].replace('"', "").strip().split
    delimiter = next((mark for mark in ",;\t" if {"id", "vote"} <= set(header(mark))), None)
    if delimiter is None:
        fix = f"keep the columns {', '.join(COLUMNS)}, as the first row"
        raise DataError("has no columns id and vote", where=str(path), fix=fix)
    with _long_fields():
        try:
            table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            names = next(table)
            for number, cells in enumerate(table, 2):
                if any(cells):
                    yield (
                        number,
                        dict.fromkeys(names, "") | dict(zip(names, cells, strict=False)),
                    )  # empty ends of rows may be cut off
        except csv.Error as error:
            fix = "save it as CSV again, or remove it and start again"
            raise DataError(f"is no table ({error})", where=f"{path}, line {table.line_num}", fix=fix) from error


@contextmanager
def _long_fields() -> Iterator[None]:
    """The csv module refuses a field of more than 128 KiB, and a transcript may be longer."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _row(pair: Pair, seed: int) -> dict[str, str]:
    left, right = map(completion_text, sides(pair, seed))
    prompt = "\n\n".join(f"{turn['role']}: {turn['text']}" if turn["role"] else turn["text"] for turn in turns_of(pair.prompt))
    return {"id": pair.id, "prompt": prompt, "A": left, "B": right, "vote": ""}


def _guarded(text: str) -> str:
    return f"'{text}" if text.lstrip(" \n").startswith(_FORMULA) else text


def _kind(path: str | Path) -> str:
    found = next((kind for kind in SHEET_KINDS if str(path).endswith(kind)), None)
    if found is None:
        raise ConfigError("the kind of file is not known", where=str(path), fix=f"name one of {', '.join(SHEET_KINDS)}")
    return found
