"""Human votes as preference pairs, and auxiliary pairs from the replies to the same prompt: the data of human_votes_study.py.

pandalm-human: three votes a pair on the replies of five models, ties among them; mt-bench-human: the majority alone, no ties.
What the replies were drawn from is known by these replies only: the pool of a prompt stands for it.
"""

from __future__ import annotations

import gzip
import json
import random
import runpy
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from polyref.data.sources import load_preferences, prompt_key, split_by_prompt
from polyref.rewards.auxiliary_columns import AuxiliaryPairs
from polyref.rewards.votes import vote_share
from polyref.types import PreferenceRecord, Text

POCKET = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "pocket_policy.py"))
"""SOURCES and SPLIT_SEED: the pocket policy's own split, so that neither it nor its tokenizer has seen a held-out prompt."""


class Vote(NamedTuple):
    """A pair that people compared.

    `record` holds as `chosen_probability` the share of the votes for `chosen`, a tie being half a vote; `majority` is 1, or 1/2
    where it says tie; `writers` are the models that wrote chosen and rejected, if known.
    """

    record: PreferenceRecord
    majority: float
    writers: tuple[str, str] | None


class Side(NamedTuple):
    """The training or the held-out votes of a set, their auxiliary pairs, and g, cross-fitted, of both: (N, 1 + M)."""

    votes: list[Vote]
    auxiliary: AuxiliaryPairs
    g: Tensor

    @property
    def records(self) -> list[PreferenceRecord]:
        return [vote.record for vote in self.votes]

    @property
    def prompts(self) -> list[str]:
        return [prompt_key(vote.record.prompt) for vote in self.votes]

    def take(self, rows: Sequence[int]) -> Side:
        return Side([self.votes[row] for row in rows], [self.auxiliary[row] for row in rows], self.g[rows])


def load_votes(data: Path, name: str) -> tuple[list[Vote], list[Vote]]:
    """(training, held out) of set `name`, split by prompt as the pocket policy splits; ties go where their prompt goes."""
    source = POCKET["SOURCES"][name]
    votes = [as_vote(row) for row in read(data / name / source.file)]
    _, held_out = split_by_prompt([v.record for v in votes], held_out=source.held_out, seed=POCKET["SPLIT_SEED"])
    if (ties := data / name / "ties.jsonl.gz").exists():
        votes += [as_vote(row) for row in read(ties)]
    prompts = {prompt_key(record.prompt) for record in held_out}
    sides: tuple[list[Vote], list[Vote]] = ([], [])
    for vote in votes:
        sides[prompt_key(vote.record.prompt) in prompts].append(vote)
    return sides


def read(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return list(map(json.loads, lines))


def as_vote(row: dict[str, Any]) -> Vote:
    """One row of a file: a pair with a winner, or (`response1`, `response2`) one whose majority says tie."""
    tied = "chosen" not in row
    position = 1 if tied else row["chosen_position"]
    share = vote_share(row["votes"], position) if "votes" in row else 1.0
    texts = {"chosen": row["response1"], "rejected": row["response2"]} if tied else row
    pair = {name: texts[name] for name in ("chosen", "rejected")} | {"prompt": row["prompt"], "chosen_probability": share}
    (record,) = load_preferences([pair], prompt_format="chat")
    models = tuple(row["cmp_key"].split("_")) if "cmp_key" in row else None
    return Vote(record, 0.5 if tied else 1.0, models[::-1] if models and position == 2 else models)


def by_majority(vote: Vote) -> PreferenceRecord:
    """The record with the majority as its label."""
    return replace(vote.record, chosen_probability=vote.majority)


def pools(votes: Sequence[Vote]) -> dict[str, list[tuple[Text, Text]]]:
    """For each prompt, every pair of different replies by different models: replies of unknown models are one model's each."""
    replies: dict[str, dict[tuple[str, str], Text]] = {}
    for record, _, writers in votes:
        pool = replies.setdefault(prompt_key(record.prompt), {})
        for text, writer in zip((record.chosen, record.rejected), writers or (None, None), strict=True):
            pool[writer or prompt_key(text), prompt_key(text)] = text
    return {
        prompt: [
            (first, second)
            for ((writer, first), (other, second)) in combinations([(writer, text) for (writer, _), text in pool.items()], 2)
            if writer != other and first != second
        ]
        for prompt, pool in replies.items()
    }


def auxiliary_pairs(votes: Sequence[Vote], count: int, *, seed: int) -> list[list[tuple[Text, Text]]]:
    """For each vote, `count` pairs from the pool of its prompt, each uniform over it, its own pair included.

    They are drawn without replacement; from a pool of fewer pairs each is taken equally often, and the rest are drawn so. A
    pool of one pair gives that pair `count` times, and leaves the variance-reduced loss at c = 1 the plain one.
    """
    of_prompt, generator = pools(votes), random.Random(seed)
    drawn = []
    for vote in votes:
        pool = of_prompt[prompt_key(vote.record.prompt)]
        whole, rest = divmod(count, len(pool))
        drawn.append(generator.sample(pool * whole + generator.sample(pool, rest), count))
    return drawn
