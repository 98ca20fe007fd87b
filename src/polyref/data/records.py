"""One row of preference data -> one `PreferenceRecord`, or a refusal that names the file, the row and the column."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from polyref.data.auxiliary import check_auxiliary
from polyref.data.fields import READERS, Refusal, kind
from polyref.data.prompts import settle_texts
from polyref.data.transcripts import parse_reply, parse_transcript
from polyref.errors import ConfigError, DataError
from polyref.types import Message, PreferenceRecord, Text

FIELDS = tuple(READERS)
"""The columns of a row. `prompt` may be implicit, those after `rejected` are optional; any other column is left alone."""

PROMPT_FORMATS = ("as_is", "chat", "transcript")


class RowError(DataError):
    """One thing wrong with one row. `row` is 1-based: the line of a .jsonl file, elsewhere the position in the data."""

    def __init__(self, what: str, *, source: str, row: int, column: str | None = None, fix: str | None = None) -> None:
        self.source, self.row, self.column = source, row, column
        where = f"{source}, row {row}" + (f", column {column}" if column else "")
        super().__init__(what, where=where, fix=fix)


def parse_record(
    row: Mapping[str, Any], *, source: str, row_number: int, columns: Mapping[str, str] | None = None
) -> PreferenceRecord:
    """The preference pair that `row` holds; the first thing wrong with it is raised as `RowError` (a `DataError`).

    `prompt`, `chosen` and `rejected` are text or lists of `{"role", "content"}` messages; with messages, a completion is one
    assistant turn. Without a `prompt` column the prompt is implicit: the messages, or the characters, that `chosen` and
    `rejected` begin with alike (for "\\n\\nHuman:" transcripts, up to the last "\\n\\nAssistant:" they share). `columns` maps
    a field to the column that holds it; nothing is guessed.
    """
    record, problems = read_record(row, source=source, row_number=row_number, columns=columns)
    if record is None:
        raise problems[0]
    return record


def read_record(
    row: Mapping[str, Any], *, source: str, row_number: int, columns: Mapping[str, str] | None = None
) -> tuple[PreferenceRecord | None, list[RowError]]:
    """As `parse_record`, but with everything that is wrong with the row, in the order of the fields; None if anything is."""
    named = column_names(columns)

    def error(refusal: Refusal, field: str | None = None) -> RowError:
        column = named[field] if field else None
        return RowError(refusal.what, source=source, row=row_number, column=column, fix=refusal.fix)

    if not isinstance(row, Mapping):
        return None, [error(Refusal(f"is {kind(row)}, not an object", "a row is an object with a value for each column"))]
    values: dict[str, Any] = {}
    problems: list[RowError] = []
    for field, reader in READERS.items():
        column = named[field]
        try:
            if column in row:
                values[field] = reader(row[column])
            elif field in ("chosen", "rejected") or field in (columns or ()):
                present = ", ".join(map(str, row)) or "none"
                raise Refusal(f"is missing (the row has {present})", f"map it with columns={{'{field}': 'NAME'}}")
        except Refusal as refusal:
            problems.append(error(refusal, field))
    if problems:
        return None, problems
    try:
        prompt, values["chosen"], values["rejected"] = settle_texts(values.get("prompt"), values["chosen"], values["rejected"])
        check_auxiliary(values)
    except Refusal as refusal:
        return None, [error(refusal, refusal.field)]
    values["prompt"] = prompt
    return PreferenceRecord(**values, source=source, row=row_number), []


def column_names(columns: Mapping[str, str] | None) -> dict[str, str]:
    """The column of every field, with `columns` laid over the fields' own names; `ConfigError` for a field that is none."""
    for field, column in (columns or {}).items():
        if field not in FIELDS:
            raise ConfigError(f"columns maps {field!r}, which is no field", fix=f"the fields are {', '.join(FIELDS)}")
        if not isinstance(column, str) or not column:
            raise ConfigError(f"columns maps {field!r} to {kind(column)}", fix="give the name of a column")
    return {field: field for field in FIELDS} | dict(columns or {})


def to_messages(record: PreferenceRecord, prompt_format: str, *, columns: Mapping[str, str] | None = None) -> PreferenceRecord:
    """`record` in the form that `prompt_format` names.

    "as_is" leaves it alone. "chat" turns plain strings into one user turn and one assistant turn, and leaves messages alone.
    "transcript" parses "\\n\\nHuman: ...\\n\\nAssistant:" strings into the messages of a conversation, without the space after
    a colon. Errors: `ConfigError` for another format; `RowError` (its column named as `columns` maps it) for no transcript.
    """
    if prompt_format not in PROMPT_FORMATS:
        raise ConfigError(f"prompt_format is {prompt_format!r}", fix=f"choose one of {', '.join(PROMPT_FORMATS)}")
    is_text = isinstance(record.prompt, str)
    if prompt_format == "as_is" or (prompt_format == "chat" and not is_text):
        return record
    if prompt_format == "chat":
        turns: dict[str, Any] = {
            "prompt": _one_turn("user", record.prompt),
            "chosen": _one_turn("assistant", record.chosen),
            "rejected": _one_turn("assistant", record.rejected),
        }
        turns |= {name: tuple(_one_turn("assistant", text) for text in texts) for name, texts in _auxiliary(record)}
        return replace(record, **turns)
    parsed: dict[str, Any] = {}
    parsers: dict[str, Callable[[Any], Any]] = {"prompt": parse_transcript, "chosen": parse_reply, "rejected": parse_reply}
    parsers |= {name: lambda texts: tuple(map(parse_reply, texts)) for name, _ in _auxiliary(record)}
    for field, parse in parsers.items():
        try:
            parsed[field] = parse(getattr(record, field))
        except ValueError as error:
            fix = "use prompt_format 'chat' or 'as_is' for data that is no transcript"
            column = column_names(columns)[field]
            raise RowError(str(error), source=record.source, row=record.row, column=column, fix=fix) from None
    return replace(record, **parsed)


def _one_turn(role: str, text: object) -> tuple[Message, ...]:
    return ({"role": role, "content": str(text)},)


def turned(record: PreferenceRecord) -> PreferenceRecord:
    """`record` with chosen and rejected exchanged, their texts and their ends; what it says of its label stays as it is."""
    return replace(
        record,
        chosen=record.rejected,
        rejected=record.chosen,
        chosen_ended=record.rejected_ended,
        rejected_ended=record.chosen_ended,
    )


def record_to_row(record: PreferenceRecord) -> dict[str, Any]:
    """The row that `parse_record` reads `record` from, without the optional columns it does not set."""
    texts = {field: text if isinstance(text, str) else list(text) for field, text in _texts(record)}
    optional = {
        "chosen_probability": record.chosen_probability,
        "reference_weights": list(record.reference_weights) if record.reference_weights is not None else None,
        "margin": record.margin,
        "chosen_ended": record.chosen_ended,
        "rejected_ended": record.rejected_ended,
        "predicted_probability": record.predicted_probability,
        **{name: [text if isinstance(text, str) else list(text) for text in texts] for name, texts in _auxiliary(record)},
        "auxiliary_probability": list(record.auxiliary_probability) if record.auxiliary_probability is not None else None,
    }
    return texts | {field: value for field, value in optional.items() if value is not None}


def _auxiliary(record: PreferenceRecord) -> tuple[tuple[str, tuple[Text, ...]], ...]:
    """The auxiliary completions by field, where there are any."""
    found = ("auxiliary_1", record.auxiliary_1), ("auxiliary_2", record.auxiliary_2)
    return tuple((name, texts) for name, texts in found if texts is not None)


def _texts(record: PreferenceRecord) -> tuple[tuple[str, Text], ...]:
    return ("prompt", record.prompt), ("chosen", record.chosen), ("rejected", record.rejected)
