"""Rows of a samples file, as `polyref sample` writes it: a completion of a prompt, its log-weight, and whether it ended."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from polyref.data.fields import Refusal, kind, read_ended, read_number, read_text
from polyref.data.files import Row
from polyref.data.records import RowError, to_messages
from polyref.data.sources import prompt_key, read_rows, source_name
from polyref.errors import ConfigError, DataError
from polyref.types import PreferenceRecord, Text

FIELDS = ("prompt", "completion", "log_weight", "weight", "ended")
"""The columns that are read, the last three where they are there; any other is left alone."""


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """One completion of `prompt`: both strings, or both message tuples, the completion one assistant turn.

    `log_weight` says how much it counts among the samples of its prompt, up to a constant of the prompt; -inf is not at all.
    One that has not `ended` was cut where it stops: an atom without the end factor. `source` and `row` (1-based) say where it
    came from.
    """

    prompt: Text
    completion: Text
    log_weight: float = 0.0
    ended: bool = True
    source: str = "memory"
    row: int = 0


def load_samples(
    source: Any,
    *,
    split: str = "train",
    prompt_format: str = "as_is",
    columns: Mapping[str, str] | None = None,
    revision: str | None = None,
) -> list[SampleRecord]:
    """The samples of `source`, in order; sources and prompt formats are those of `load_preferences`.

    A row has `prompt` and `completion`, and may have `log_weight` (or `weight`, at least 0) and `ended` (true). Rows without
    either weight count alike; all rows have a weight, or none. `columns` maps a field to the column that holds it. The first
    bad row ends the reading with a `DataError` that names file, row and column, as does a prompt whose weights are all zero.
    """
    names = _names(columns)
    found: list[SampleRecord] = []
    weighted: str | None = None
    for row in read_rows(source, split=split, revision=revision):
        if isinstance(row.value, DataError):
            raise row.value
        own = _weight_column(row, names)
        if found and own != weighted:
            what = f"is missing, and row {found[0].row} has it" if own is None else f"is there, and row {found[0].row} lacks it"
            fix = "give every row its weight, in one column, or none"
            raise RowError(what, source=row.source, row=row.number, column=names[own or weighted or ""], fix=fix)
        weighted = own
        found.append(_in_form(_record(row, names, own), prompt_format, names))
    if not found:
        raise DataError("there are no rows", where=source_name(source), fix="give data with at least one sample")
    _refuse_weightless(found)
    return found


def samples_by_prompt(samples: Sequence[SampleRecord]) -> list[list[SampleRecord]]:
    """The samples of each prompt: prompts as they first appear, samples in order."""
    groups: dict[str, list[SampleRecord]] = {}
    for sample in samples:
        groups.setdefault(prompt_key(sample.prompt), []).append(sample)
    return list(groups.values())


def split_prompts(
    samples: Sequence[SampleRecord], held_out: int | float, *, seed: int
) -> tuple[list[SampleRecord], list[SampleRecord]]:
    """(training, held-out) samples: `held_out` prompts, or a share of them below 1, go with all their samples to the second.

    Which ones depends on the prompts and `seed` alone. ConfigError where that leaves a side without a prompt.
    """
    keys = sorted({prompt_key(sample.prompt) for sample in samples})
    wanted = round(held_out * len(keys)) if 0 < held_out < 1 else held_out
    if wanted % 1 or not 0 < wanted < len(keys):
        fix = "give a share below 1, or a smaller number, that leaves prompts on both sides"
        raise ConfigError(f"held_out is {held_out:g} of {len(keys)} prompts", fix=fix)
    taken = set(random.Random(seed).sample(keys, int(wanted)))
    sides: tuple[list[SampleRecord], list[SampleRecord]] = ([], [])
    for sample in samples:
        sides[prompt_key(sample.prompt) in taken].append(sample)
    return sides


def sample_row(sample: SampleRecord) -> dict[str, Any]:
    """What `sample` holds, of plain values: a `log_weight` of None is that of a weight of 0."""
    prompt, completion = (each if isinstance(each, str) else list(each) for each in (sample.prompt, sample.completion))
    log_weight = sample.log_weight if sample.log_weight > -math.inf else None
    return {"prompt": prompt, "completion": completion, "log_weight": log_weight, "ended": sample.ended}


def _names(columns: Mapping[str, str] | None) -> dict[str, str]:
    for field, column in (columns or {}).items():
        if field not in FIELDS:
            raise ConfigError(f"columns maps {field!r}, which is no field", fix=f"the fields are {', '.join(FIELDS)}")
        if not isinstance(column, str) or not column:
            raise ConfigError(f"columns maps {field!r} to {kind(column)}", fix="give the name of a column")
    return {field: field for field in FIELDS} | dict(columns or {})


def _weight_column(row: Row, names: Mapping[str, str]) -> str | None:
    """Which of the two weights `row` has."""
    place: dict[str, Any] = {"source": row.source, "row": row.number}
    if not isinstance(row.value, Mapping):
        raise RowError(f"is {kind(row.value)}, not an object", fix="a row is an object with a value for each column", **place)
    given = [field for field in ("log_weight", "weight") if names[field] in row.value]
    if len(given) > 1:
        raise RowError("is there beside log_weight", column=names["weight"], fix="leave one of the two out", **place)
    return given[0] if given else None


def _record(row: Row, names: Mapping[str, str], weight: str | None) -> SampleRecord:
    values: dict[str, Any] = {}
    field = "prompt"
    try:
        for field in ("prompt", "completion"):
            if names[field] not in row.value:
                present = ", ".join(map(str, row.value)) or "none"
                raise Refusal(f"is missing (the row has {present})", f"map it with columns={{'{field}': 'NAME'}}")
            values[field] = read_text(row.value[names[field]])
        if weight is not None:
            field = weight
            values["log_weight"] = _log_weight(weight, row.value[names[weight]])
        field = "ended"
        ended = read_ended(row.value.get(names["ended"])) is not False
        field = "prompt"
        if isinstance(values["prompt"], str) and not values["prompt"].strip():
            raise Refusal("is empty", "fill it in or remove the row")
        field = "completion"
        _check_completion(values["prompt"], values["completion"], ended)
    except Refusal as refusal:
        raise RowError(refusal.what, source=row.source, row=row.number, column=names[field], fix=refusal.fix) from None
    return SampleRecord(**values, ended=ended, source=row.source, row=row.number)


def _log_weight(field: str, value: object) -> float:
    if value is None:
        raise Refusal("is null, and a sample without a weight cannot be counted", "write its weight, or remove the row")
    number = read_number(value)
    if field == "log_weight":
        return number
    if number < 0:
        raise Refusal(f"is {number:g}, and weights are at least 0", "correct the value or remove the row")
    return math.log(number) if number else -math.inf


def _check_completion(prompt: Text, completion: Text, ended: bool) -> None:
    if isinstance(prompt, str) != isinstance(completion, str):
        raise Refusal("is not of one kind with prompt", "give both as text, or both as messages")
    if not isinstance(completion, str) and [message["role"] for message in completion] != ["assistant"]:
        found = ", ".join(message["role"] for message in completion)
        raise Refusal(f"has the roles {found}", "a completion is exactly one assistant message")
    text = completion if isinstance(completion, str) else completion[0]["content"]
    if not text and not ended:
        raise Refusal("is empty, and has not ended: it holds no token", "remove the row")


def _in_form(sample: SampleRecord, prompt_format: str, names: Mapping[str, str]) -> SampleRecord:
    """`sample` in the form that `to_messages` gives a pair."""
    columns = {"prompt": names["prompt"], "chosen": names["completion"], "rejected": names["completion"]}
    pair = PreferenceRecord(sample.prompt, sample.completion, sample.completion, source=sample.source, row=sample.row)
    settled = to_messages(pair, prompt_format, columns=columns)
    return replace(sample, prompt=settled.prompt, completion=settled.chosen)


def _refuse_weightless(samples: Sequence[SampleRecord]) -> None:
    for some in samples_by_prompt(samples):
        if all(sample.log_weight == -math.inf for sample in some):
            what, fix = "all samples of its prompt have weight 0", "give one of them weight, or remove the prompt"
            raise RowError(what, source=some[0].source, row=some[0].row, fix=fix)
