"""Pairs that a person is to label: their ids and the order of their sides, both of which no label has a part in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from polyref.data.sources import prompt_key
from polyref.stages import content_digest
from polyref.types import PreferenceRecord, Text

Place = Literal["first", "second"]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of `prompt`, `first` the one whose JSON sorts first: equal pairs are equal, whichever was `chosen`."""

    id: str
    prompt: Text
    first: Text
    second: Text


def pair_of(record: PreferenceRecord) -> Pair:
    """The pair of `record`, without its label. The id is "p" and a checksum of prompt and both completions."""
    first, second = sorted((record.chosen, record.rejected), key=prompt_key)
    return Pair("p" + content_digest([record.prompt, first, second]), record.prompt, first, second)


def pairs_of(records: Iterable[PreferenceRecord]) -> list[Pair]:
    """The distinct pairs of `records`, in the order in which they first occur."""
    return list({pair.id: pair for pair in map(pair_of, records)}.values())


def left_of(pair: Pair, seed: int) -> Place:
    """Which completion is shown on the left, or as A: a fair coin that the id and `seed` decide, so that it stays."""
    return "second" if int(content_digest([seed, pair.id]), 16) % 2 else "first"


def sides(pair: Pair, seed: int) -> tuple[Text, Text]:
    """(left, right) as they are shown."""
    return (pair.first, pair.second) if left_of(pair, seed) == "first" else (pair.second, pair.first)
