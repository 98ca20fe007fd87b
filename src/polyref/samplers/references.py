"""References as engines: the members of a set made ready to draw, models shared where their weights are."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from polyref.data.encode import Encoder
from polyref.data.prompt_rows import PromptRow
from polyref.errors import DataError, ReferenceSetError
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.references.score import own_tokenizer
from polyref.samplers.auxiliary import Policy
from polyref.samplers.context import context_of, fits
from polyref.samplers.local import LocalEngine
from polyref.scoring.models import attach_adapter, check_adapter, check_config, default_device, load_causal_lm, load_config
from polyref.types import PreferenceRecord

if TYPE_CHECKING:
    import torch


def check_mixture(references: ReferenceSet) -> None:
    """ReferenceSetError for a geometric composition of several: a member drawn by its weight draws from the mixture alone."""
    if references.composition == "geometric" and sum(references.needed()) > 1:
        what = "a geometric composition is no mixture: it has no member to draw from"
        fix = "set composition to arithmetic, or give the one policy that the data were drawn from"
        raise ReferenceSetError(what, where="sampling_policy", fix=fix)


def sampling_policy(
    references: ReferenceSet, *, per_pair: bool = False, batch_size: int = 32, device: torch.device | None = None
) -> Policy:
    """The mixture of the members that have weight, all in memory at once, on the accelerator if there is one.

    Members with the same weights and no adapter, such as one model under several system prompts, share them. Errors: those of
    `check_mixture` and of loading a model; ReferenceSetError for a model in memory that is to get an adapter.
    """
    check_mixture(references)

    @functools.cache
    def loaded(source: Any, adapter: str | None) -> Any:
        model: Any = load_causal_lm(source)
        model.to(device or default_device())
        return model if adapter is None else attach_adapter(model, adapter).eval()

    engines, weights = [], []
    for member, weight in zip(references.members, references.weights or (), strict=True):
        if weight > 0:
            if member.adapter is not None:
                if member.in_memory:
                    fix = "give the model with its adapter attached, or both by name"
                    raise ReferenceSetError("a model in memory is not given an adapter here", where=member.label, fix=fix)
                check_adapter(str(member.adapter))
            model = member.model if member.in_memory else loaded(member.source, _adapter(member))
            own: dict[str, Any] = {"system_prompt": member.system_prompt, "name": member.label}
            engines.append(LocalEngine(model, _tokenizer(member), batch_size=batch_size, **own))
            weights.append(weight)
    return Policy(engines, weights, per_pair)


def without_room(records: Sequence[PreferenceRecord | PromptRow], references: ReferenceSet, max_new_tokens: int) -> list[int]:
    """Indices of records whose prompt leaves no room for `max_new_tokens` in the context of a member that has weight."""
    found: set[int] = set()
    for member, needed in zip(references.members, references.needed(), strict=True):
        if needed:
            config = member.model.config if member.in_memory else load_config(member.source)
            check_config(config, member.label)
            context = context_of(config)
            encoder = Encoder(_tokenizer(member))
            lengths = (len(encoder.encode_prompt(record.prompt, member.system_prompt)) for record in records)
            found |= {i for i, length in enumerate(lengths) if not fits(length, max_new_tokens, context)}
    return sorted(found)


def refuse_long(records: Sequence[PreferenceRecord | PromptRow], indices: Sequence[int], max_new_tokens: int) -> None:
    """DataError that names the first of the records at `indices`, if there is one."""
    if indices:
        first = records[indices[0]]
        what = f"{len(indices)} prompts leave no room for {max_new_tokens} new tokens in the context; this is the first"
        where = f"{first.source}, row {first.row}"
        raise DataError(what, where=where, fix="lower max_new_tokens, or set leave_out to do without them")


def _tokenizer(member: Reference) -> Any:
    tokenizer = own_tokenizer(member)
    if tokenizer is None:
        raise ReferenceSetError("a model in memory has no tokenizer of its own", where=member.label, fix="give its tokenizer")
    return tokenizer


def _adapter(member: Reference) -> str | None:
    return str(member.adapter) if member.adapter is not None else None
