"""Annotators' votes, as data sets publish them -> records that know the share who preferred the chosen completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from polyref.data.records import RowError, parse_record, to_messages
from polyref.data.sources import read_rows, source_name
from polyref.errors import DataError
from polyref.types import PreferenceRecord


def vote_share(votes: Any, chosen: Any) -> float:
    """The share of the list `votes` for completion `chosen`, 1 or 2: a vote is 1 or 2, or 0 for a tie, which counts 1/2.

    DataError for no votes, or for what is none of these.
    """
    if type(chosen) is not int or chosen not in (1, 2):
        raise DataError(
            f"the position of the chosen completion is {_shown(chosen)}", fix="give 1 or 2, the number of the chosen completion"
        )
    listed = isinstance(votes, Sequence) and not isinstance(votes, str | bytes)
    if not (listed and len(votes) and all(type(vote) is int and 0 <= vote <= 2 for vote in votes)):
        raise DataError(
            f"votes are {list(votes) if listed else _shown(votes)}", fix="give a list of votes, each 1 or 2, or 0 for a tie"
        )
    return sum(2 * (vote == chosen) + (vote == 0) for vote in votes) / (2 * len(votes))


def _shown(value: Any) -> str:
    return "not given" if value is None else repr(value)


def load_votes(
    source: Any,
    *,
    split: str = "train",
    prompt_format: str = "as_is",
    columns: Mapping[str, str] | None = None,
    chosen_position: str | int = "chosen_position",
) -> list[PreferenceRecord]:
    """The records of `source`, as `load_preferences` reads them, with the `vote_share` of the column `votes` as their label.

    `chosen_position` names the column that says which completion the votes call 1 or 2 is `chosen`, or is that number in all
    rows. `from_votes` makes a preference model of the records. The first bad row ends the reading with a DataError that names
    file and row.
    """
    records: list[PreferenceRecord] = []
    for name, number, row in read_rows(source, split=split):
        if isinstance(row, DataError):
            raise row
        record = parse_record(row, source=name, row_number=number, columns=columns)
        try:
            chosen = row.get(chosen_position) if isinstance(chosen_position, str) else chosen_position
            share = vote_share(row.get("votes"), chosen)
        except DataError as error:
            raise RowError(error.what, source=name, row=number, fix=error.fix) from None
        records.append(to_messages(replace(record, chosen_probability=share), prompt_format, columns=columns))
    if not records:
        raise DataError("there are no rows", where=source_name(source), fix="give data with at least one pair")
    return records
