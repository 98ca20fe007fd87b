"""The members of a reference set made ready to draw and to score: weights shared, prompts of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polyref.data.encode import Encoder, Ids, render_record
from polyref.data.tokenize import tokenizer_fingerprint
from polyref.errors import ReferenceSetError
from polyref.references.reference_set import Composition, Reference, ReferenceSet
from polyref.references.score import own_tokenizer
from polyref.samplers.context import check_prompt, context_of
from polyref.samplers.local import end_tokens
from polyref.scoring.models import adapter_tensors, attach_adapter, check_adapter, default_device, load_causal_lm
from polyref.types import PreferenceRecord, Text

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Member:
    """One reference: a `model` under its own `system_prompt`; `ends` are the tokens that end a completion.

    Members may have one `model` in common: `adapter` names the one of its adapters to switch on, "" none of them, and None
    takes the model as it is.
    """

    label: str
    model: Any
    encoder: Encoder
    system_prompt: str | None
    adapter: str | None
    ends: frozenset[int]

    @contextmanager
    def switched(self) -> Iterator[Any]:
        """The model with this member's adapter on, and no other."""
        with self.model.disable_adapter() if self.adapter == "" else nullcontext():
            if self.adapter:
                self.model.set_adapter(self.adapter)
            yield self.model

    def prompt_ids(self, prompt: Text, max_new_tokens: int, row: int) -> Ids:
        """The tokens before a completion of prompt number `row`; DataError where there is none, or too little context."""
        ids = self.encoder.encode_prompt(prompt, self.system_prompt)
        check_prompt(ids, row, max_new_tokens, context_of(self.model.config), self.label)
        return ids

    def canonical_ids(self, prompt: Text, text: str) -> Ids | None:
        """What `text`, ended, is encoded to after `prompt`; None where that changes the prompt's own tokens or has no end."""
        completion: Text = text if isinstance(prompt, str) else ({"role": "assistant", "content": text},)
        record = PreferenceRecord(prompt, completion, completion)
        (encoding,) = self.encoder.encode([render_record(record, self.encoder.tokenizer, self.system_prompt)])
        start = len(encoding.prompt)
        ids = encoding.chosen[start:]
        return ids if encoding.chosen[:start] == encoding.prompt and ids and ids[-1] in self.ends else None


@dataclass(frozen=True, eq=False)
class Members:
    """A reference set in memory: `members` (K,), None where a member has weight 0 for every prompt; weights; composition.

    `one_tokenizer`: all of them read completions as the same tokens, so that laws of the next token compose.
    """

    members: tuple[Member | None, ...]
    weights: tuple[float, ...]
    composition: Composition
    one_tokenizer: bool

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Every model in evaluation mode and without gradients; afterwards as it was."""
        import torch

        models = {id(member.model): member.model for member in self.members if member is not None}
        modes = [(model, model.training) for model in models.values()]
        try:
            for model, _ in modes:
                model.eval()
            with torch.inference_mode():
                yield
        finally:
            for model, training in modes:
                model.train(training)


def load_members(
    references: ReferenceSet, *, needed: Sequence[bool] | None = None, device: torch.device | None = None
) -> Members:
    """The members of `references` that have weight, all in memory at once, on the accelerator if there is one.

    `needed` says which to load where prompts have weights of their own (see `ReferenceSet.needed`). Members with equal weights
    share them, under several system prompts and with several adapters; an adapter that overwrites weights of the model gets a
    copy. A model in memory is used as and where it is. Errors: those of loading; ReferenceSetError for a model in memory that
    has no tokenizer, or is to get an adapter.
    """
    needed = references.needed() if needed is None else needed
    wanted = [reference if use else None for reference, use in zip(references.members, needed, strict=True)]
    models = _models([reference for reference in wanted if reference is not None], device)
    members = tuple(None if reference is None else _member(reference, *models[id(reference)]) for reference in wanted)
    one = len({tokenizer_fingerprint(member.encoder.tokenizer) for member in members if member is not None}) <= 1
    return Members(members, references.weights or (), references.composition, one)


def _member(reference: Reference, model: Any, adapter: str | None) -> Member:
    tokenizer = own_tokenizer(reference)
    if tokenizer is None:
        what = "a model in memory has no tokenizer of its own"
        raise ReferenceSetError(what, where=reference.label, fix="give its tokenizer")
    ends = end_tokens(model, tokenizer)
    return Member(reference.label, model, Encoder(tokenizer), reference.system_prompt, adapter, ends)


def _models(references: Sequence[Reference], device: torch.device | None) -> dict[int, tuple[Any, str | None]]:
    """By the id of each reference its model and what to switch on, as `Member` has them."""
    found: dict[int, tuple[Any, str | None]] = {}
    by_source: dict[Any, list[Reference]] = {}
    for reference in references:
        if not reference.in_memory:
            by_source.setdefault(reference.source, []).append(reference)
            continue
        if reference.adapter is not None:
            fix = "give the model with its adapter attached, or both by name"
            raise ReferenceSetError("a model in memory is not given an adapter here", where=reference.label, fix=fix)
        found[id(reference)] = (reference.model, None)
    for source, group in by_source.items():
        model: Any = load_causal_lm(source)
        names = dict.fromkeys(str(reference.adapter) for reference in group if reference.adapter is not None)
        overwriting = {name for name in names if _overwrites(model, name)}
        switched = [name for name in names if name not in overwriting]
        model = _with_adapters(model, switched).to(device or default_device())
        for reference in group:
            name = None if reference.adapter is None else str(reference.adapter)
            if name in overwriting:
                own = attach_adapter(load_causal_lm(source), name).eval().to(device or default_device())
                found[id(reference)] = (own, None)
            else:
                at = "" if name is None else _name(switched.index(name))
                found[id(reference)] = (model, at if switched else None)
    return found


def _with_adapters(model: Any, adapters: Sequence[str]) -> Any:
    """`model` with all of PEFT's `adapters`, each under its own name."""
    for number, adapter in enumerate(adapters):
        model = attach_adapter(model, adapter, name=_name(number))
    return model.eval()


def _name(number: int) -> str:
    return f"member_{number}" if number else "default"


def _overwrites(model: Any, adapter: str) -> bool:
    """Whether an adapter puts tensors of its own in the place of the model's, so that it cannot be switched off."""
    check_adapter(adapter)
    return not adapter_tensors(adapter).isdisjoint(model.state_dict())
