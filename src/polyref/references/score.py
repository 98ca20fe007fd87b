"""Score preference pairs under every member of a reference set, through the cache, one loaded model at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from polyref.data.collate import collate, grouped_batches, row_length
from polyref.data.tokenize import TokenizedPreferences, tokenize_for_reference, tokenizer_fingerprint
from polyref.errors import DataError, InputError, ModelError, ReferenceSetError
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.scoring.cache import CachedScore, CacheWriter, LogProbCache, ScorerKey, row_key
from polyref.scoring.logprobs import ScoringPlan, completion_logps, probe, to_device
from polyref.scoring.models import (
    adapted,
    adapter_fingerprint,
    check_config,
    default_device,
    load_causal_lm,
    load_config,
    load_tokenizer,
    module_fingerprint,
    weights_fingerprint,
)
from polyref.types import PreferenceRecord, TokenizedPair

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total), in tokens."""


@dataclass(frozen=True)
class ReferenceScores:
    """Sequence log-probabilities of N pairs under K references, in nats.

    `chosen`, `rejected`: (N, K) float64; `auxiliary`: (N, 2M, K), of the completions of their M auxiliary pairs. `hits` and
    `misses` count completions found in the cache and scored anew; `tokens` and `seconds` measure the scoring, model loading
    left out. `compatibility` says one line a member.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    auxiliary: np.ndarray
    hits: int
    misses: int
    tokens: int
    seconds: float
    compatibility: tuple[str, ...]

    @property
    def hit_rate(self) -> float:
        """Share of completions found in the cache."""
        return self.hits / max(self.hits + self.misses, 1)


@dataclass
class _Member:
    """A reference made ready to score: its own rendering of every pair, and its address in the cache."""

    reference: Reference
    items: list[TokenizedPair]
    scorer: ScorerKey
    report: str
    keys: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.keys = [row_key(pair.prompt_ids, ids) for pair in self.items for ids in pair.completions]


def score_references(
    data: TokenizedPreferences,
    references: ReferenceSet,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_dir: str | Path | None = None,
    batch_size: int = 8,
    device: torch.device | None = None,
    progress: Progress | None = None,
    needed: Sequence[bool] | None = None,
) -> ReferenceScores:
    """log pi_i(y | x) of both completions of every pair under each member i: shapes (N, K), nats; of auxiliary ones too.

    `data` was tokenised for the policy with `tokenizer`. A member with the same tokenizer scores exactly those completion
    tokens after its own prompt (system prompt included); one with another tokenizer scores the text. Members that share
    weights are loaded once, and one model is in memory at a time, whatever K is. With `cache_dir`, what was scored before, by
    anyone, is read and not computed; batches depend on the data alone, so an interrupted scoring goes on to the same bytes.
    `needed` says which members to score, all by default (see `ReferenceSet.needed`); any other is not even loaded, and its
    column is 0.

    Raises ReferenceSetError where a member cannot score the data (vocabulary, context length), naming member and row, and
    DataError where pairs differ in their number of auxiliary pairs.
    """
    if not data.pairs:
        what = f"none of {data.report.dropped} pairs has a completion left to score"
        raise DataError(what, fix="raise max_length, or give pairs with completions")
    completions = _completions(data)
    needed = (True,) * len(references) if needed is None else tuple(needed)
    if len(needed) != len(references):
        raise ReferenceSetError(f"`needed` has {len(needed)} entries for {len(references)} references", fix="give one a member")
    lines = [f"reference {reference.label}: not scored, its weight is 0" for reference in references.members]
    columns = [i for i, counts in enumerate(needed) if counts]
    members = [_prepare(references.members[i], data, tokenizer) for i in columns]
    for i, member in zip(columns, members, strict=True):
        lines[i] = member.report
    for line in lines:
        logger.info("%s", line)
    device = device or default_device()
    with nullcontext(cache_dir) if cache_dir is not None else TemporaryDirectory() as folder:
        cache = LogProbCache(folder)
        found = [cache.lookup(member.scorer, member.keys) for member in members]
        total = sum(len(set(member.keys)) for member in members)
        meter = _Meter(progress)
        waiting = [i for i, member in enumerate(members) if len(found[i]) < len(set(member.keys))]
        for group in _same_weights(members, waiting):
            _score_group([members[i] for i in group], cache, batch_size, device, meter)
            for i in group:
                found[i] = cache.lookup(members[i].scorer, members[i].keys)
    pairs = np.zeros((len(data.pairs), completions, len(references)))
    for column, f, member in zip(columns, found, members, strict=True):
        pairs[:, :, column] = np.reshape([f[key].logp for key in member.keys], (-1, completions))
    parts = (pairs[:, 0].copy(), pairs[:, 1].copy(), pairs[:, 2:].copy())
    return ReferenceScores(*parts, total - meter.scored, meter.scored, meter.tokens, meter.seconds, tuple(lines))


def _completions(data: TokenizedPreferences) -> int:
    """How many completions every pair has: 2, and 2 for each auxiliary pair."""
    wanted = len(data.pairs[0].completions)
    for pair, record in zip(data.pairs, data.records, strict=True):
        if (count := len(pair.completions)) != wanted:
            what = f"{count // 2 - 1} auxiliary pairs where others have {wanted // 2 - 1}"
            where = f"{record.source}, row {record.row}"
            raise DataError(what, where=where, fix="give every row as many auxiliary pairs, or none")
    return wanted


@dataclass
class _Meter:
    progress: Progress | None
    tokens: int = 0
    seconds: float = 0.0
    scored: int = 0

    @contextmanager
    def batch(self, label: str, tokens: int, done: int, total: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
        self.tokens += tokens
        if self.progress:
            self.progress(label, done + tokens, total)


def _prepare(reference: Reference, data: TokenizedPreferences, policy_tokenizer: PreTrainedTokenizerBase) -> _Member:
    own = own_tokenizer(reference)
    tokenizer = own or policy_tokenizer
    items = tokenize_for_reference(data.records, data.pairs, policy_tokenizer, own, system_prompt=reference.system_prompt)
    config = _check_fit(reference, items, data)
    same = own is None or tokenizer_fingerprint(own) == tokenizer_fingerprint(policy_tokenizer)
    longest = max((row_length(p.prompt_ids, [max(p.completions, key=len)]) for p in items), default=0)
    scorer = ScorerKey(
        weights=module_fingerprint(reference.model) if reference.in_memory else weights_fingerprint(reference.source),
        adapter=adapter_fingerprint(str(reference.adapter) if reference.adapter else None),
        system_prompt=reference.system_prompt or "",
        template=str(tokenizer.chat_template or ""),
        tokenizer=tokenizer_fingerprint(tokenizer),
        dtype=_dtype(reference),
    )
    report = (
        f"reference {reference.label}: {'the policy’s tokenizer' if same else 'its own tokenizer, scoring the text'}, "
        f"{_template_words(tokenizer, data.records)}, vocabulary {config.vocab_size}, "
        f"longest sequence {longest} of {getattr(config, 'max_position_embeddings', None) or 'any'} tokens, "
        f"{_dtype(reference)}"
    )
    return _Member(reference, items, scorer, report)


def _template_words(tokenizer: PreTrainedTokenizerBase, records: Sequence[PreferenceRecord]) -> str:
    """Whether there is a chat template that the texts go through, and whether its tokens are other ones tomorrow."""
    if not tokenizer.chat_template:
        return "without chat template"
    if all(isinstance(record.prompt, str) for record in records):
        return "its chat template unused by plain text (prompt_format chat would make turns of it)"
    return "with chat template" + (" (it may write the date)" if "strftime_now" in str(tokenizer.chat_template) else "")


def _dtype(reference: Reference) -> str:
    """The dtype it scores in, with that of autocast where it is on: a model in memory may be scored under it."""
    import torch

    device = next(reference.model.parameters()).device.type if reference.in_memory else default_device().type
    autocast = [torch.get_autocast_dtype(device)] if torch.is_autocast_enabled(device) else []
    return "/".join([reference.scoring_dtype, *(str(dtype).removeprefix("torch.") for dtype in autocast)])


def own_tokenizer(reference: Reference) -> Any:
    """The tokenizer the reference brings, or None where it has none of its own."""
    if reference.tokenizer is None:
        return None if reference.in_memory else load_tokenizer(reference.source)
    if not isinstance(reference.tokenizer, str | Path):
        return reference.tokenizer
    source = replace(reference.source, model=str(reference.tokenizer))
    if not reference.in_memory and source.model != reference.source.model:
        source = replace(source, gguf_file=None, revision=None if reference.source.folder is None else source.revision)
    return load_tokenizer(source)


def _check_fit(reference: Reference, items: Sequence[TokenizedPair], data: TokenizedPreferences) -> Any:
    """The member's text configuration, after checking that its vocabulary and context hold every pair."""
    config = reference.model.config if reference.in_memory else load_config(reference.source)
    check_config(config, reference.label)
    check_fit(config, items, data.records, f"reference {reference.label}", refuse=ReferenceSetError)
    return config.get_text_config()


def check_fit(
    config: Any,
    pairs: Sequence[TokenizedPair],
    records: Sequence[PreferenceRecord],
    whose: str,
    *,
    refuse: type[InputError] = ModelError,
) -> None:
    """Raise `refuse`, naming the first such row, where `pairs` go beyond the vocabulary or the context of a model.

    Warn where some alone are longer than what LongRoPE calls long: it then turns a whole batch by the longest row.
    """
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    turn = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    lengths = [len(pair.prompt_ids) + max(map(len, pair.completions)) for pair in pairs]
    shortest = (len(pair.prompt_ids) + min(map(len, pair.completions)) for pair in pairs)
    if turn is not None and lengths and min(shortest) <= turn < max(lengths):
        logger.warning(
            "%s turns positions otherwise in batches that go beyond %d tokens: scores of what is shorter there depend on it; "
            "lower max_length to %d",
            whose,
            turn,
            turn,
        )
    for pair, record, longest in zip(pairs, records, lengths, strict=True):
        where = f"{record.source}, row {record.row}"
        highest = max(max(ids) for ids in (pair.prompt_ids, *pair.completions))
        if highest >= text.vocab_size:
            what = f"token id {highest} is outside the vocabulary ({text.vocab_size}) of {whose}"
            raise refuse(what, where=where, fix="give it the tokenizer that it was trained with")
        if context is not None and longest > context:
            what = f"{longest} tokens do not fit the context of {context} of {whose}"
            raise refuse(what, where=where, fix="lower max_length or shorten its system prompt")


def _same_weights(members: Sequence[_Member], waiting: Sequence[int]) -> list[list[int]]:
    """Indices of members still to score, grouped by the model that scores them, in first-seen order."""
    groups: dict[Any, list[int]] = {}
    for i in waiting:
        reference = members[i].reference
        groups.setdefault(id(reference.model) if reference.in_memory else reference.source, []).append(i)
    return list(groups.values())


def _score_group(members: Sequence[_Member], cache: LogProbCache, batch_size: int, device: torch.device, meter: _Meter) -> None:
    """Load one model and score every member that uses it."""
    first = members[0].reference
    model: Any = first.model if first.in_memory else load_causal_lm(first.source)
    home, training = next(model.parameters()).device, model.training
    model.to(device).eval()
    try:
        for member in members:
            adapter = member.reference.adapter
            switched = nullcontext(model) if adapter is None else adapted(model, str(adapter))
            with _named(member.reference), cache.writer(member.scorer) as writer, switched as scorer:
                _score_member(member, scorer, writer, batch_size, device, meter)
    finally:
        model.to(home).train(training)


@contextmanager
def _named(reference: Reference) -> Iterator[None]:
    """A ModelError that names no place is told with the reference that it is about."""
    try:
        yield
    except ModelError as error:
        if error.where is not None:
            raise
        raise ModelError(error.what, where=f"reference {reference.label}", fix=error.fix) from error


def _score_member(
    member: _Member, model: nn.Module, writer: CacheWriter, batch_size: int, device: torch.device, meter: _Meter
) -> None:
    lengths = [row_length(pair.prompt_ids, pair.completions) for pair in member.items]
    known = writer.known(member.keys)
    batches = [b for b in grouped_batches(lengths, batch_size) if any(set(_keys(member, i)) - known.keys() for i in b)]
    total, done = sum(lengths[i] for b in batches for i in b), 0
    plan = probe(model, row_limit=max(lengths)) if batches else None
    for batch in batches:
        tokens = sum(lengths[i] for i in batch)
        with meter.batch(member.reference.label, tokens, done, total):
            scores = _score_batch(model, [member.items[i] for i in batch], plan or ScoringPlan(), device)
        done += tokens
        keys = [key for i in batch for key in _keys(member, i)]
        fresh = {key: score for key, score in zip(keys, scores, strict=True) if key not in known}
        writer.add(list(fresh), [s.logp for s in fresh.values()], [s.tokens for s in fresh.values()])
        known |= fresh
        meter.scored += len(fresh)


def _keys(member: _Member, i: int) -> list[bytes]:
    """The cache keys of the completions of pair i."""
    each = len(member.items[i].completions)
    return member.keys[each * i : each * (i + 1)]


def _score_batch(
    model: nn.Module, pairs: Sequence[TokenizedPair], plan: ScoringPlan, device: torch.device
) -> list[CachedScore]:
    import torch

    batch = collate([(pair.prompt_ids, pair.completions) for pair in pairs], layout=plan.layout)
    with torch.no_grad():
        logps = completion_logps(model, to_device(batch, device), plan)
    return [CachedScore(*score) for score in zip(logps.total.flatten().tolist(), logps.tokens.flatten().tolist(), strict=True)]
