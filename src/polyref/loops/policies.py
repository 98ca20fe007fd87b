"""The policy as it stands between two stages: where its weights are, how it is loaded, and what draws from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from polyref.data.prompt_rows import PromptRow, places_among
from polyref.data.tokenize import tokenizer_fingerprint
from polyref.loops.generate import Draw, Proposal, Proposed
from polyref.references.compose import COMPOSITIONS
from polyref.references.reference_set import ReferenceSet
from polyref.samplers.engine import Completion, Engine, SamplingParameters
from polyref.samplers.local import LocalEngine
from polyref.samplers.members import Members, load_members
from polyref.samplers.members_scores import member_logps
from polyref.samplers.sampled import Drawing, open_draw, pooled
from polyref.scoring.models import ModelSource, attach_adapter, default_device, load_causal_lm, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Policy:
    """The model at `source`, with the `adapter` that training left in a folder, if any."""

    source: ModelSource
    adapter: Path | None = None

    def load(self) -> Any:
        """The model, an adapter's weights ready to be trained on."""
        model: Any = load_causal_lm(self.source)
        if self.adapter is None:
            return model
        model = attach_adapter(model, str(self.adapter))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return model

    def trained(self, folder: Path, adapter: bool) -> Policy:
        """What training left in `folder`: an adapter of the same model, or a whole one."""
        if adapter:
            return replace(self, adapter=folder)
        return Policy(replace(self.source, model=str(folder), gguf_file=None, revision=None))


def from_references(references: ReferenceSet, prompts: Sequence[PromptRow], how: Drawing) -> Draw:
    """Proposals of the composition of `references`, opened for `prompts`; particles of smc bring their log-weights."""
    draw = open_draw(references, prompts, how)

    def proposed(some: Sequence[PromptRow]) -> list[Proposed]:
        return [
            Proposed(
                tuple(Proposal(s.text, len(s.token_ids), s.ended, None, s.logps, s.log_weight) for s in one.samples),
                one.proposals,
                one.calls,
                one.exact,
                one.note,
            )
            for one in draw(some)
        ]

    return proposed


def from_policy(
    policy: Policy,
    tokenizer_source: ModelSource,
    prompts: Sequence[PromptRow],
    n: int,
    parameters: SamplingParameters,
    *,
    batch_size: int,
    seed: int,
    scored: ReferenceSet | None = None,
    system_prompt: str | None = None,
) -> Draw:
    """`n` proposals of each prompt from `policy`, read by the tokenizer at `tokenizer_source`, under a `system_prompt` or none.

    `prompts` are all there are. With `scored`, references, proposals carry their log-probabilities under these: of the very
    tokens where the tokenizer is the policy's, else of the text, as a completion that ended.
    """
    tokenizer = load_tokenizer(tokenizer_source)
    model = policy.load().to(default_device()).eval()
    engine = LocalEngine(model, tokenizer, system_prompt=system_prompt, batch_size=batch_size, name="policy")
    members = None if scored is None else load_members(pooled(scored, prompts))
    same = [] if members is None else _alike(members, tokenizer)
    places = places_among(prompts)

    def draw(some: Sequence[PromptRow]) -> list[Proposed]:
        drawn = _drawn(engine, some, places(some), n, parameters, seed)
        logps: list[list[tuple[float | None, ...]]] = [[()] * n for _ in some]
        if members is not None and scored is not None:
            logps = _reference_logps(members, scored, some, drawn, same, batch_size)
        return [
            Proposed(tuple(map(_proposal, completions, rows)), n, sum(len(one.token_ids) for one in completions))
            for completions, rows in zip(drawn, logps, strict=True)
        ]

    return draw


def _drawn(
    engine: Engine, rows: Sequence[PromptRow], places: Sequence[int], n: int, parameters: SamplingParameters, seed: int
) -> list[list[Completion]]:
    """`n` completions of each prompt, those in another place among equal prompts by another seed."""
    found: dict[int, list[Completion]] = {}
    for place in sorted(set(places)):
        some = [i for i, own in enumerate(places) if own == place]
        own = seed if place == 0 else xxhash.xxh3_64_intdigest(f"{seed} {place}".encode()) >> 1
        found |= zip(some, engine([rows[i].prompt for i in some], n, parameters, seed=own), strict=True)
    return [found[i] for i in range(len(rows))]


def _proposal(one: Completion, logps: tuple[float | None, ...]) -> Proposal:
    return Proposal(one.text, len(one.token_ids), one.ended, one.logp, logps)


def _reference_logps(
    members: Members,
    references: ReferenceSet,
    rows: Sequence[PromptRow],
    drawn: Sequence[Sequence[Completion]],
    same: Sequence[bool],
    batch_size: int,
) -> list[list[tuple[float | None, ...]]]:
    """log pi_i(y|x), (K,) for every completion of every prompt; None of members without weight for a prompt.

    `same` (K,) says which members have the tokenizer that the completions were drawn with.
    """
    n = len(drawn[0])
    table: list[list[list[float | None]]] = [[[None] * len(references) for _ in range(n)] for _ in rows]
    with members.drawing():
        for k, member in enumerate(members.members):
            if member is None:
                continue
            places, items = [], []
            for i, row in enumerate(rows):
                if (row.reference_weights or references.weights or ())[k] > 0:
                    prompt = member.encoder.encode_prompt(row.prompt, member.system_prompt)
                    for j, one in enumerate(drawn[i]):
                        ids = one.token_ids if same[k] else member.canonical_ids(row.prompt, one.text)
                        if ids:
                            places.append((i, j))
                            items.append((prompt, ids))
            for (i, j), logp in zip(places, member_logps(member, items, batch_size), strict=True):
                table[i][j][k] = logp
    return [[tuple(logps) for logps in some] for some in table]


def _alike(members: Members, tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Which members have `tokenizer`: asked once, as its vocabulary is read for it."""
    own = tokenizer_fingerprint(tokenizer)
    return [one is not None and tokenizer_fingerprint(one.encoder.tokenizer) == own for one in members.members]


def anchor_logp(proposal: Proposal, references: ReferenceSet, row: PromptRow) -> float:
    """log G_a or log M_a of it under `references`, up to a term of the prompt alone; NaN where one of theirs is not known."""
    weights = row.reference_weights or references.weights or ()
    active = [k for k, weight in enumerate(weights) if weight > 0]
    known = [math.nan if proposal.logps[k] is None else proposal.logps[k] for k in active]
    a = torch.tensor([weights[k] for k in active], dtype=torch.float64)
    return float(COMPOSITIONS[references.composition](torch.tensor(known, dtype=torch.float64), a / a.sum()))
