"""Votes -> records that know the share of people who preferred the chosen completion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from polyref.data.records import turned
from polyref.labelling.pairs import pair_of
from polyref.labelling.votes import Vote
from polyref.rewards.votes import vote_share
from polyref.types import PreferenceRecord

_CODES = {"tie": 0, "first": 1, "second": 2}


def shares(votes: Iterable[Vote]) -> dict[str, float]:
    """The share of the votes on each pair that is for its first completion, ties as halves; none where all skipped."""
    codes: dict[str, list[int]] = {}
    for vote in votes:
        if vote.choice in _CODES:
            codes.setdefault(vote.id, []).append(_CODES[vote.choice])
    return {id: vote_share(listed, 1) for id, listed in codes.items()}


def label_records(records: Sequence[PreferenceRecord], votes: Iterable[Vote]) -> tuple[list[PreferenceRecord], int]:
    """The `records` on whose pair somebody voted, with the votes as their labels; and how many have no vote.

    `chosen` is what the larger share preferred (of a tie, the `Pair`'s first), `chosen_probability` that share, at least 1/2.
    What the record said of its own label counts for nothing: `margin` is dropped, and what g says is turned with the sides.
    """
    found, labelled = shares(votes), []
    for record in records:
        pair = pair_of(record)
        if (share := found.get(pair.id)) is None:
            continue
        chosen, g = pair.first if share >= 1 / 2 else pair.second, record.predicted_probability
        if chosen != record.chosen:
            record = replace(turned(record), predicted_probability=None if g is None else 1 - g)
        labelled.append(replace(record, chosen_probability=max(share, 1 - share), margin=None))
    return labelled, len(records) - len(labelled)
