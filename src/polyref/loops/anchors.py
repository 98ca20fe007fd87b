"""What the KL of a round is taken to: the original references, the policy of the round before, or an average of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from polyref.data.prompt_rows import PromptRow
from polyref.errors import ConfigError
from polyref.loops.policies import Policy
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.scoring.models import ModelSource, load_causal_lm, load_tokenizer
from polyref.stages import RunFolder
from polyref.training.checkpoints import save_policy
from polyref.types import PreferenceRecord

ANCHORS = ("references", "previous", "average")


@dataclass(frozen=True)
class Anchor:
    """`kind` is one of `ANCHORS`; the average is w <- `decay` w + (1 - decay) w_policy after each round, from the start on."""

    kind: str = "references"
    decay: float = 0.9

    def __post_init__(self) -> None:
        if self.kind not in ANCHORS:
            raise ConfigError(f"unknown anchor {self.kind!r}", fix=f"use one of {', '.join(ANCHORS)}")
        if not 0 < self.decay < 1:
            raise ConfigError(f"anchor_decay is {self.decay}", fix="give a number between 0 and 1, such as 0.9")

    @property
    def told(self) -> str:
        """What the manifest, the summary and the page call it."""
        if self.kind == "references":
            return "the original references, in every round"
        if self.kind == "previous":
            return "the policy of the round before (it moves)"
        return f"a moving average of the policy's weights, decay {self.decay:g} a round (it moves)"


def reference_of(policy: Policy, name: str) -> Reference:
    """`policy` as a frozen reference, in its own dtype."""
    given = policy.source
    options: dict[str, Any] = {"gguf_file": given.gguf_file, "revision": given.revision}
    options |= {"dtype": given.dtype, "trust_remote_code": given.trust_remote_code, "adapter": policy.adapter}
    return Reference(given.model, tokenizer=None, name=name, **options)


def anchor_of(
    folder: RunFolder, how: Anchor, policies: Sequence[Policy], references: ReferenceSet, inputs: dict[str, str]
) -> tuple[ReferenceSet, dict[str, str]]:
    """The anchor that the round after `policies`, the start first, is held to, and what it adds to later inputs.

    Averages are stages, each made of the one before and the newest policy.
    """
    if how.kind == "references":
        return references, {}
    if how.kind == "previous" or len(policies) == 1:
        return ReferenceSet((reference_of(policies[-1], "the policy of the round before"),)), {}
    number = len(policies) - 1
    stage = folder.stage(f"anchor-{number}", inputs)
    target = stage.folder / "model"
    if not stage.done:
        before = policies[0].source if number == 1 else _saved(policies[0].source, folder, number - 1)
        averaged = _average(load_causal_lm(_wide(before)), policies[-1], how.decay)
        save_policy(averaged, load_tokenizer(policies[0].source), target)
        stage.finish([target])
    average = Policy(_saved(policies[0].source, folder, number))
    return ReferenceSet((reference_of(average, "the moving average"),)), stage.outputs


def _saved(start: ModelSource, folder: RunFolder, number: int) -> ModelSource:
    path = folder.path / "stages" / f"anchor-{number}" / "model"
    return replace(start, model=str(path), gguf_file=None, revision=None)


def _wide(source: ModelSource) -> ModelSource:
    """`source` in a dtype in which small changes add up: an average is kept in float32, and rounded only where it is read."""
    return source if source.dtype == "float64" else replace(source, dtype="float32")


@torch.no_grad()
def _average(before: Any, policy: Policy, decay: float) -> Any:
    """`before` moved to decay w + (1 - decay) w_policy, in float64, an adapter merged into its weights first."""
    newest: Any = policy.load()
    if policy.adapter is not None:
        newest = newest.merge_and_unload()
    there = newest.state_dict()
    for name, tensor in (*before.named_parameters(), *before.named_buffers()):  # a tied weight once, under its first name
        if name in there and tensor.is_floating_point():
            tensor.copy_(decay * tensor.double() + (1 - decay) * there[name].double())
    return before


def with_anchor(
    references: ReferenceSet, anchor: ReferenceSet, prompts: Sequence[PromptRow]
) -> tuple[ReferenceSet, list[PromptRow]]:
    """References and prompts under which completions are scored: the anchor's one member last, where it is another set."""
    if anchor is references:
        return references, list(prompts)
    every = ReferenceSet((*references.members, *anchor.members), _halved(references.weights or ()), references.composition)
    given = [(row, row.reference_weights) for row in prompts]
    return every, [row if own is None else replace(row, reference_weights=_halved(own)) for row, own in given]


def _halved(weights: Sequence[float]) -> tuple[float, ...]:
    return (*(a / 2 for a in weights), 0.5)


def under(anchor: ReferenceSet, references: ReferenceSet, records: Sequence[PreferenceRecord]) -> list[PreferenceRecord]:
    """`records` to train on: weights over `references` say nothing of another anchor."""
    if anchor is references:
        return list(records)
    return [replace(record, reference_weights=None) for record in records]
