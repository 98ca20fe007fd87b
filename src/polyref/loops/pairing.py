"""The stage that makes preference pairs of what a step kept, labelled by the reward that it was kept by."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyref.data.prompt_rows import PromptRow
from polyref.data.records import record_to_row
from polyref.data.sources import load_preferences, prompt_key
from polyref.data.write import write_rows
from polyref.files import write_bytes
from polyref.loops.generate import Proposed
from polyref.rewards.functions import NamedReward
from polyref.rewards.preference_model import from_reward
from polyref.samplers.auxiliary import as_completion
from polyref.samplers.pairing import PAIRINGS, Floats, farthest
from polyref.samplers.pairs import Scored, make_pairs
from polyref.samplers.tilt import Kept
from polyref.stages import Stage
from polyref.types import PreferenceRecord, Text

Cut = Mapping[tuple[str, int], tuple[bool, bool]]
"""By source and row of a record whether its chosen and its rejected completion were cut: neither has an end."""


Apart = Callable[[Sequence[Scored]], Sequence[Floats]]
"""How far the completions of each prompt are from each other, (n, n): what the pairing farthest goes by."""


@dataclass(frozen=True)
class Pairing:
    """Which `pairs` of a prompt's kept completions, and `labels`: soft s(r_w - r_l), in units of which beta is one, or hard."""

    name: str
    pairs: int
    labels: str
    min_margin: float
    tie_within: float
    seed: int


def pair(
    stage: Stage,
    prompts: Sequence[PromptRow],
    proposed: Sequence[Proposed],
    kept: Sequence[Kept | None],
    how: Pairing,
    *,
    groups: Sequence[Sequence[int]] | None = None,
    apart: Apart | None = None,
) -> tuple[list[PreferenceRecord], Cut, dict[str, Any]]:
    """The pairs, in `stage`'s pairs.jsonl, which of their completions were cut, and what they were made from.

    With `groups`, who made each proposal of a prompt, no pair is of one group alone. DataError where there is no pair.
    """
    pairs, counts = stage.folder / "pairs.jsonl", stage.folder / "counts.json"
    if not stage.done:
        who: Sequence[Sequence[int] | None] = [None] * len(prompts) if groups is None else groups
        scored = [_scored(*row) for row in zip(prompts, proposed, kept, who, strict=True)]
        if apart is not None:
            scored = [replace(one, apart=distances) for one, distances in zip(scored, apart(scored), strict=True)]
        preference = from_reward(_known(scored), 1.0) if how.labels == "soft" else None
        settings: dict[str, Any] = {"pairs": how.pairs, "min_margin": how.min_margin, "tie_within": how.tie_within}
        pairing = farthest if how.name == "farthest" else PAIRINGS[how.name]
        found = make_pairs(scored, pairing, seed=how.seed, preference=preference, **settings)
        write_rows(pairs, _rows(found.records, prompts, proposed))
        told = {"pairs": len(found.records), "ties": found.ties, "prompts_without_pairs": len(found.without)}
        write_bytes(counts, json.dumps(told).encode())
        stage.finish([pairs, counts])
    return *read_pairs(pairs), json.loads(counts.read_text())


def read_pairs(file: Path) -> tuple[list[PreferenceRecord], Cut]:
    """The pairs in `file`, and which of their completions were cut."""
    records = load_preferences(file)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]  # texts hold other line ends
    cut = {
        (record.source, record.row): (not row["chosen_ended"], not row["rejected_ended"])
        for record, row in zip(records, rows, strict=True)
    }
    return records, cut


def _rows(
    records: Sequence[PreferenceRecord], prompts: Sequence[PromptRow], proposed: Sequence[Proposed]
) -> list[dict[str, Any]]:
    """`records` as rows, with the weights of their prompts, and whether each completion ended."""
    weights = {(row.source, row.row): row.reference_weights for row in prompts}
    ended = {
        (prompt_key(row.prompt), prompt_key(as_completion(row.prompt, proposal.text))): proposal.ended
        for row, one in zip(prompts, proposed, strict=True)
        for proposal in one.proposals
    }

    def row_of(one: PreferenceRecord) -> dict[str, Any]:
        prompt = prompt_key(one.prompt)
        ends = {f"{side}_ended": ended[prompt, prompt_key(getattr(one, side))] for side in ("chosen", "rejected")}
        return record_to_row(replace(one, reference_weights=weights[one.source, one.row])) | ends

    return [row_of(one) for one in records]


def _scored(row: PromptRow, one: Proposed, kept: Kept | None, groups: Sequence[int] | None) -> Scored:
    indices = [] if kept is None else kept.indices.tolist()
    some = [one.proposals[i] for i in indices]
    texts = [as_completion(row.prompt, proposal.text) for proposal in some]
    rewards, who = [proposal.rewards[0] for proposal in some], None if groups is None else [groups[i] for i in indices]
    return Scored(row.prompt, texts, rewards, None, row.source, row.row, groups=who)


def _known(scored: Sequence[Scored]) -> NamedReward:
    """The reward as it was told already: no completion is scored twice."""
    values = {
        (prompt_key(one.prompt), prompt_key(text)): reward
        for one in scored
        for text, reward in zip(one.completions, one.rewards, strict=True)
    }

    def rewards(prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        keys = [(prompt_key(prompt), prompt_key(text)) for prompt, text in zip(prompts, completions, strict=True)]
        return torch.tensor([values[key] for key in keys], dtype=torch.float64)

    return NamedReward("reward", rewards)
