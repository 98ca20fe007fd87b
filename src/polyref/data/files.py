"""Rows of .jsonl, .json and .parquet files. What cannot be read becomes an error in the place of its row."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from polyref.data.fields import kind
from polyref.data.records import RowError
from polyref.errors import DataError

FILE_KINDS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")

_TORN = (OSError, EOFError, zlib.error)
_JSON_LIST = "a .json file holds one list of rows; call a file of one row a line .jsonl"


class Row(NamedTuple):
    """Row `number` (1-based) of `source`. `value` is what stands there, or the `DataError` that reading it met."""

    source: str
    number: int
    value: Any


def read_file(path: Path) -> Iterator[Row]:
    """The rows of `path`, by its suffix. An error that ends the reading is the last row; a bad .jsonl line ends nothing."""
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_lines(path)
    if path.name.endswith((".json", ".json.gz")):
        return _read_json(path)
    if path.name.endswith(".parquet"):
        return _read_parquet(path)
    raise DataError("the kind of file is not known", where=str(path), fix=f"give one of {', '.join(FILE_KINDS)}")


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _read_lines(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Row(str(path), number, _parse_line(line.rstrip(b"\r\n"), str(path), number))
    except _TORN as error:
        yield _unreadable(error, path, number + 1)


def _read_json(path: Path) -> Iterator[Row]:
    try:
        with _open(path) as file:
            content = file.read()
    except _TORN as error:
        yield _unreadable(error, path, 1)
        return
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        what, line, column = _why_not_json(error, content)
        where = f"{path}, line {line}, column {column}"
        yield Row(str(path), 1, DataError(what, where=where, fix=_JSON_LIST))
        return
    if isinstance(rows, list):
        yield from (Row(str(path), number, value) for number, value in enumerate(rows, 1))
    else:
        yield Row(str(path), 1, DataError(f"holds {kind(rows)}, not a list", where=str(path), fix=_JSON_LIST))


def _parse_line(line: bytes, source: str, number: int) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        what, _, column = _why_not_json(error, line)
        return RowError(what, source=source, row=number, column=str(column), fix="repair or remove the line")


def _why_not_json(error: Exception, data: bytes) -> tuple[str, int, int]:
    """What is wrong, and the line and column (both 1-based) where."""
    if isinstance(error, UnicodeDecodeError):
        line, column = data.count(b"\n", 0, error.start) + 1, error.start - data.rfind(b"\n", 0, error.start)
        return f"is not UTF-8 (byte 0x{data[error.start]:02x})", line, column
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON ({error.msg})", error.lineno, error.colno
    if isinstance(error, RecursionError):
        return "is JSON nested too deep to read", 1, 1
    return f"is JSON that cannot be read ({error})", 1, 1


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(str(path), number, value)
    except (*_TORN, UnicodeDecodeError, pyarrow.ArrowException) as error:
        yield _unreadable(error, path, number + 1)


def _unreadable(error: Exception, path: Path, number: int) -> Row:
    if isinstance(error, PermissionError):
        return Row(str(path), number, DataError("may not be read", where=str(path), fix="ask for the right to read it"))
    what, fix = f"the file is torn or corrupt from here on ({error})", "fetch or write the file again"
    return Row(str(path), number, RowError(what, source=str(path), row=number, fix=fix))
