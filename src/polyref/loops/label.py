"""The stage that labels a round's pairs by something other than the reward: a preference model, or a person."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from polyref.data.records import turned
from polyref.data.sources import load_preferences
from polyref.data.write import write_preferences
from polyref.errors import DataError
from polyref.files import write_bytes
from polyref.labelling import Desk, Votes, label_records, pairs_of
from polyref.loops.generate import blaming
from polyref.rewards.cross_fit import Comparison
from polyref.stages import Stage
from polyref.types import PreferenceRecord

Labeller = Callable[[Sequence[PreferenceRecord], int], list[PreferenceRecord]]
"""Given the pairs of a round and its number, those with a label: sides turned where the label says so, some left out."""


class Paused(Exception):
    """A person has yet to vote: `str` says how. The same command goes on."""


def label(
    stage: Stage, records: Sequence[PreferenceRecord], labeller: Labeller, number: int
) -> tuple[list[PreferenceRecord], dict[str, Any]]:
    """The pairs of round `number` as `labeller` labels them, in `stage`'s labelled.jsonl. DataError where none has a label."""
    file, counts = stage.folder / "labelled.jsonl", stage.folder / "counts.json"
    if not stage.done:
        found = labeller(records, number)
        if not found:
            raise DataError(f"none of {len(records)} pairs of round {number} has a label", fix="label them, or draw others")
        write_preferences(file, found)
        ties = sum(one.chosen_probability == 0.5 for one in found)
        told = {"pairs": len(found), "ties": ties, "unlabelled": len(records) - len(found)}
        write_bytes(counts, json.dumps(told).encode())
        stage.finish([file, counts])
    return load_preferences(file), json.loads(counts.read_text())


def by_model(ask: Callable[[Sequence[Comparison]], Any], name: str) -> Labeller:
    """Soft labels: the probability that `ask` gives, NaN for none, chosen and rejected swapped where it is below 1/2.

    ModelError that names `name` where it fails.
    """

    def labelled(records: Sequence[PreferenceRecord], number: int) -> list[PreferenceRecord]:
        asked = [Comparison(one.prompt, one.chosen, one.rejected) for one in records]
        with blaming(name, f"{len(asked)} pairs"):
            rows = list(zip(records, ask(asked).tolist(), strict=True))
        sides = [(one, p) if p >= 0.5 else (turned(one), 1 - p) for one, p in rows if p == p]
        return [replace(one, chosen_probability=p, margin=None) for one, p in sides]

    return labelled


def by_person(folder: Path, ask: Callable[[Desk, int], str], *, seed: int, annotator: str, question: str) -> Labeller:
    """Shares of the votes in `folder`/votes-ROUND.jsonl, where `ask` gets those that are missing, and says what to do next.

    The votes lie beside the stages, which may be done again: none is lost. Paused while `annotator` has not voted on all.
    DataError where all of them are skips: the next `ask` may change that.
    """

    def labelled(records: Sequence[PreferenceRecord], number: int) -> list[PreferenceRecord]:
        with Votes(folder / f"votes-{number}.jsonl") as votes:
            desk = Desk(pairs_of(records), votes, seed=seed, annotator=annotator, question=question)
            then = ask(desk, number)
            if missing := desk.missing():
                raise Paused(f"{len(missing)} of {desk.total} pairs of round {number} still lack a vote: {then}")
            found, _ = label_records(records, [vote for vote in votes.all() if vote.id in desk.pairs])
            if not found:
                raise DataError(f"all {desk.total} pairs of round {number} were skipped: none has a label", fix=then)
            return found

    return labelled
