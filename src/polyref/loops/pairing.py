"""The stage that makes preference pairs of what a step kept, labelled by the reward that it was kept by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from polyref.samplers.pairing import PAIRINGS
from polyref.samplers.pairs import Scored, make_pairs
from polyref.samplers.tilt import Kept
from polyref.stages import Stage
from polyref.types import PreferenceRecord, Text

Cut = Mapping[tuple[str, int], tuple[bool, bool]]
"""By source and row of a record whether its chosen and its rejected completion were cut: neither has an end."""


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
    stage: Stage, prompts: Sequence[PromptRow], proposed: Sequence[Proposed], kept: Sequence[Kept | None], how: Pairing
) -> tuple[list[PreferenceRecord], Cut, dict[str, Any]]:
    """The pairs, in `stage`'s pairs.jsonl, which of their completions were cut, and what they were made from.

    DataError where there is none.
    """
    pairs, counts = stage.folder / "pairs.jsonl", stage.folder / "counts.json"
    if not stage.done:
        scored = [_scored(*row) for row in zip(prompts, proposed, kept, strict=True)]
        preference = from_reward(_known(scored), 1.0) if how.labels == "soft" else None
        settings: dict[str, Any] = {"pairs": how.pairs, "min_margin": how.min_margin, "tie_within": how.tie_within}
        found = make_pairs(scored, PAIRINGS[how.name], seed=how.seed, preference=preference, **settings)
        write_rows(pairs, _rows(found.records, prompts, proposed))
        told = {"pairs": len(found.records), "ties": found.ties, "prompts_without_pairs": len(found.without)}
        write_bytes(counts, json.dumps(told).encode())
        stage.finish([pairs, counts])
    records = load_preferences(pairs)
    rows = [
        json.loads(line) for line in pairs.read_text(encoding="utf-8").split("\n") if line
    ]  # texts may hold other line ends
    cut = {
        (record.source, record.row): (not row["chosen_ended"], not row["rejected_ended"])
        for record, row in zip(records, rows, strict=True)
    }
    return records, cut, json.loads(counts.read_text())


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


def _scored(row: PromptRow, one: Proposed, kept: Kept | None) -> Scored:
    some = [] if kept is None else [one.proposals[i] for i in kept.indices.tolist()]
    texts = [as_completion(row.prompt, proposal.text) for proposal in some]
    return Scored(row.prompt, texts, [proposal.rewards[0] for proposal in some], None, row.source, row.row)


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
