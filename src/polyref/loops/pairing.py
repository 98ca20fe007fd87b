"""The stage that makes preference pairs of what a step kept, labelled by the reward that it was kept by."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polyref.data.prompt_rows import PromptRow
from polyref.data.sources import load_preferences, prompt_key
from polyref.data.write import write_preferences
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
) -> tuple[list[PreferenceRecord], dict[str, Any]]:
    """The pairs, in `stage`'s pairs.jsonl, each with the weights of its prompt, and what they were made from.

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
        weights = {(row.source, row.row): row.reference_weights for row in prompts}
        write_preferences(pairs, [replace(one, reference_weights=weights[one.source, one.row]) for one in found.records])
        told = {"pairs": len(found.records), "ties": found.ties, "prompts_without_pairs": len(found.without)}
        write_bytes(counts, json.dumps(told).encode())
        stage.finish([pairs, counts])
    return load_preferences(pairs), json.loads(counts.read_text())


def _scored(row: PromptRow, one: Proposed, kept: Kept | None, groups: Sequence[int] | None) -> Scored:
    indices = [] if kept is None else kept.indices.tolist()
    some = [one.proposals[i] for i in indices]
    texts = [as_completion(row.prompt, proposal.text) for proposal in some]
    rewards, ended = [proposal.rewards[0] for proposal in some], [proposal.ended for proposal in some]
    who = None if groups is None else [groups[i] for i in indices]
    return Scored(row.prompt, texts, rewards, None, row.source, row.row, groups=who, ended=ended)


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
