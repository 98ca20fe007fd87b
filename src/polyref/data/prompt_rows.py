"""Prompts to draw for: the distinct ones of any source, whose rows are preference pairs or hold a prompt alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyref.data.files import Row
from polyref.data.records import RowError, column_names, parse_record, to_messages
from polyref.data.sources import check_alike, prompt_key, read_rows, source_name
from polyref.errors import DataError
from polyref.types import PreferenceRecord, Text


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt, with the weights over references that its row gives; `source` and `row` (1-based) say where it stands first."""

    prompt: Text
    reference_weights: tuple[float, ...] | None = None
    source: str = "memory"
    row: int = 0


def load_prompts(
    source: Any,
    *,
    split: str = "train",
    prompt_format: str = "as_is",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    revision: str | None = None,
) -> list[PromptRow]:
    """The distinct prompts of `source`, in order, at most `limit`; a prompt under other weights is another one.

    Sources, settings and errors are those of `load_preferences`; a row may leave out both completions, but then not the prompt.
    """
    found: dict[tuple[str, tuple[float, ...] | None], PromptRow] = {}
    first: PreferenceRecord | None = None
    for row in read_rows(source, split=split, revision=revision):
        if isinstance(row.value, DataError):
            raise row.value
        record = to_messages(_record(row, columns), prompt_format, columns=columns)
        first = first or record
        check_alike(record, first, "reference_weights", columns)
        key = prompt_key(record.prompt), record.reference_weights
        found.setdefault(key, PromptRow(record.prompt, record.reference_weights, record.source, record.row))
        if len(found) == limit:
            break
    if not found:
        raise DataError("there are no rows", where=source_name(source), fix="give data with at least one prompt")
    return list(found.values())


def places_among(prompts: Sequence[PromptRow]) -> Callable[[Sequence[PromptRow]], list[int]]:
    """For some of the rows `prompts`: the place of each among those with its prompt, 0 where it is the only one.

    It tells the randomness of equal prompts apart (under other weights, or on other rows), whichever rows are asked for
    together. A row that is asked for twice at once gets a place that no other has.
    """
    rows: dict[str, list[Hashable]] = {}
    for row in prompts:
        own = rows.setdefault(prompt_key(row.prompt), [])
        if _identity(row) not in own:
            own.append(_identity(row))

    def places(some: Sequence[PromptRow]) -> list[int]:
        seen, found = Counter[tuple[str, Hashable]](), list[int]()
        for row in some:
            key, own = prompt_key(row.prompt), _identity(row)
            found.append(rows[key].index(own) + len(rows[key]) * seen[key, own])
            seen[key, own] += 1
        return found

    return places


def _identity(row: PromptRow) -> Hashable:
    return row.reference_weights, row.source, row.row


def _record(row: Row, columns: Mapping[str, str] | None) -> PreferenceRecord:
    """The pair that `row` holds; where it holds a prompt alone, one with completions that stand for none."""
    names, value = column_names(columns), row.value
    place: dict[str, Any] = {"source": row.source, "row_number": row.number, "columns": columns}
    if not isinstance(value, Mapping) or names["chosen"] in value or names["rejected"] in value:
        return parse_record(value, **place)
    if names["prompt"] not in value:
        what, fix = f"is missing (the row has {', '.join(map(str, value)) or 'none'})", "map it with columns={'prompt': 'NAME'}"
        raise RowError(what, source=row.source, row=row.number, column=names["prompt"], fix=fix)
    text = isinstance(value[names["prompt"]], str)
    stand_ins = {
        names[field]: word if text else [{"role": "assistant", "content": word}]
        for field, word in (("chosen", " a"), ("rejected", " b"))
    }
    return parse_record({**value, **stand_ins}, **place)
