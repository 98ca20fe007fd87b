"""The columns of an auxiliary preference model: all four in a row or none, and alike in every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from polyref.data.fields import Refusal
from polyref.types import PreferenceRecord, Text

AUXILIARY_FIELDS: Final = ("predicted_probability", "auxiliary_1", "auxiliary_2", "auxiliary_probability")
"""What control-variate and doubly robust training read besides the pair (see `PreferenceRecord`)."""


def check_auxiliary(values: Mapping[str, Any]) -> None:
    """Refuse fields, as read, that are half present, of different lengths, or not completions of the row's own prompt.

    `chosen` is settled already: one text, or one assistant message. The prompt stands in a column of its own, as auxiliary
    completions do not repeat it. The two completions of a pair differ, as those of every data pair do: else the auxiliary
    pairs had another law than the data.
    """
    given = [name for name in AUXILIARY_FIELDS if values.get(name) is not None]
    if not given:
        return
    for name in AUXILIARY_FIELDS:
        if name not in given:
            fix = f"give all of {', '.join(AUXILIARY_FIELDS)}, or none"
            raise Refusal(f"is missing where {given[0]} is given", fix, name)
    if values.get("prompt") is None:
        raise Refusal("is missing where auxiliary columns are given", "give the prompt in a column of its own", "prompt")
    first: Sequence[Text] = values["auxiliary_1"]
    for name in AUXILIARY_FIELDS[2:]:
        if len(values[name]) != len(first):
            what = f"holds {len(values[name])} entries where auxiliary_1 holds {len(first)}"
            raise Refusal(what, "give one of each for every auxiliary pair", name)
    for name in AUXILIARY_FIELDS[1:3]:
        for number, text in enumerate(values[name], 1):
            _check_completion(text, values["chosen"], name, number)
    for number, (one, other) in enumerate(zip(first, values["auxiliary_2"], strict=True), 1):
        if one == other:
            fix = "draw the pair again until its completions differ, as those of data pairs do"
            raise Refusal(f"entry {number} is identical to that of auxiliary_1", fix, "auxiliary_2")


def _check_completion(text: Text, chosen: Text, name: str, number: int) -> None:
    if isinstance(text, str) != isinstance(chosen, str):
        raise Refusal(f"entry {number} is not of one kind with chosen", "give both as text, or both as messages", name)
    if not isinstance(text, str) and [message["role"] for message in text] != ["assistant"]:
        raise Refusal(f"entry {number} is not one assistant message", "a completion is exactly one assistant message", name)


def auxiliary_pairs(record: PreferenceRecord) -> int:
    """M, the number of auxiliary pairs of `record`; 0 where it has none."""
    return len(record.auxiliary_1 or ())


def auxiliary_completions(record: PreferenceRecord) -> tuple[Text, ...]:
    """The 2M auxiliary completions of `record`: the first and the second of each pair in turn."""
    pairs = zip(record.auxiliary_1 or (), record.auxiliary_2 or (), strict=True)
    return tuple(text for pair in pairs for text in pair)
