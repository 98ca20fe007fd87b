"""Records -> token ids, made once: for the policy, and for references that may have another tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from polyref.data.encode import Encoder, Encoding, Rendering, checked_boundary, common_start, render_record
from polyref.data.truncate import check_truncation, truncate_pair
from polyref.types import PreferenceRecord, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TokenizationReport:
    """What became of the records.

    `kept` and `dropped` count pairs; `dropped_rows` are (source, row) of pairs with no completion left. Of the pairs kept,
    `cut_completions` counts completions without their end, `cut_prompts` prompts without their start, and
    `moved_boundaries` pairs whose completions begin before the end of the prompt (see `tokenize_record`). `alike` counts pairs
    whose two completions have the same tokens, as texts that differ after the cut only do: no model prefers either.
    """

    kept: int
    dropped: int
    cut_completions: int
    cut_prompts: int
    moved_boundaries: int
    dropped_rows: tuple[tuple[str, int], ...] = ()
    alike: int = 0

    def __str__(self) -> str:
        alike = f", {self.alike} with two completions of the same tokens, which teach nothing" if self.alike else ""
        return (
            f"{self.kept} pairs kept, {self.dropped} dropped with no completion left, {self.cut_completions} completions cut, "
            f"{self.cut_prompts} prompts cut, {self.moved_boundaries} boundaries moved{alike}"
        )


@dataclass(frozen=True, slots=True)
class TokenizedPreferences:
    """N `pairs`, the N `records` they came from, and what became of all the records."""

    pairs: list[TokenizedPair]
    records: list[PreferenceRecord]
    report: TokenizationReport


def tokenize_record(
    record: PreferenceRecord, tokenizer: PreTrainedTokenizerBase, *, system_prompt: str | None = None
) -> TokenizedPair:
    """The token ids of one pair at its full length; prompt + completion are always the tokens of the whole text.

    Strings: the tokenizer's opening special tokens (BOS), the text, and its EOS after each completion. Messages: what the chat
    template writes, up to the end of the assistant's turn. A completion that has not ended gets no end. `system_prompt` goes
    first: as text and a blank line, or as a message. Where the prompt's own tokens do not begin every whole text (a token spans
    the boundary, or the template writes the prompt otherwise), the boundary moves back to the last token that all of them
    share: what is scored is then the exact likelihood of everything after it. Errors: `RowError` where no token is left before
    it, and those of `render_record`.
    """
    (encoding,) = _encode([record], tokenizer, system_prompt)
    return encoding.split(checked_boundary(encoding, record))


def tokenize_records(
    records: Sequence[PreferenceRecord],
    tokenizer: PreTrainedTokenizerBase,
    *,
    system_prompt: str | None = None,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
) -> TokenizedPreferences:
    """`tokenize_record` and `truncate_pair` for every record; pairs with an empty completion are dropped, and counted."""
    check_truncation(max_length, truncation_mode)
    pairs, kept, dropped = [], [], []
    prompts = completions = moved = alike = 0
    for record, encoding in zip(records, _encode(records, tokenizer, system_prompt), strict=True):
        boundary = checked_boundary(encoding, record)
        whole = encoding.split(boundary)
        pair = whole if max_length is None else truncate_pair(whole, max_length, truncation_mode)
        if pair is None or not all(pair.completions):
            dropped.append((record.source, record.row))
            continue
        pairs.append(pair)
        kept.append(record)
        completions += sum(pair.cuts)
        prompts += len(pair.prompt_ids) < boundary
        moved += boundary < len(encoding.prompt)
        alike += pair.chosen_ids == pair.rejected_ids
    return TokenizedPreferences(
        pairs, kept, TokenizationReport(len(pairs), len(dropped), completions, prompts, moved, tuple(dropped), alike)
    )


def tokenize_for_reference(
    records: Sequence[PreferenceRecord],
    pairs: Sequence[TokenizedPair],
    policy_tokenizer: PreTrainedTokenizerBase,
    reference_tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    system_prompt: str | None = None,
    policy_system_prompt: str | None = None,
) -> list[TokenizedPair]:
    """What a reference scores for pairs that were tokenised, and cut, for the policy under `policy_system_prompt`.

    With the policy's tokenizer (None, or one with the same fingerprint): the prompt under the reference's own `system_prompt`,
    then exactly the policy's completion tokens; where "keep_end" cut the policy's prompt, the reference sees its own system
    prompt and then the same window. With another tokenizer: the text by the reference's own template, the prompt whole. There
    a cut completion is the text that the policy's tokens spell, without a last character they spell in part, and without an
    end-of-turn; where that leaves no text, one token of prompt is scored with both completions.
    """
    same = reference_tokenizer is None or tokenizer_fingerprint(reference_tokenizer) == tokenizer_fingerprint(policy_tokenizer)
    if same and (system_prompt or None) == (policy_system_prompt or None):
        return list(pairs)
    tokenizer = policy_tokenizer if same or reference_tokenizer is None else reference_tokenizer
    policy = _encode(records, policy_tokenizer, policy_system_prompt)
    reference = _encode(records, tokenizer, system_prompt)
    scored: list[TokenizedPair | None] = []
    texts: list[tuple[int, Rendering]] = []
    for record, pair, at_policy, at_reference in zip(records, pairs, policy, reference, strict=True):
        own = at_reference.split(checked_boundary(at_reference, record))
        shared = _with_policy_tokens(own, pair, at_policy) if same else None
        if shared is None and any(pair.cuts):
            rendering = render_record(record, tokenizer, system_prompt)
            texts.append((len(scored), _cut_text(rendering, pair, at_policy, policy_tokenizer)))
        elif shared is None and not all(own.completions):
            own = at_reference.split(max(1, at_reference.boundary - 1))
        scored.append(shared or own)
    for (index, _), encoding in zip(texts, Encoder(tokenizer).encode(text for _, text in texts), strict=True):
        boundary = checked_boundary(encoding, records[index])
        pair = encoding.split(boundary)
        scored[index] = pair if all(pair.completions) else encoding.split(max(1, boundary - 1))
    return [pair for pair in scored if pair is not None]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that decides which ids a text or a conversation gets: 32 hexadecimal digits.

    Vocabulary, merges, normaliser and pre-tokenizer (the backend's serialisation, without its padding and truncation, which
    calls change), the chat template, and the special tokens.
    """
    import xxhash

    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str()) if backend is not None else [type(tokenizer).__name__, tokenizer.get_vocab()]
    if isinstance(model, dict):
        model |= {"padding": None, "truncation": None}
    parts = [model, tokenizer.chat_template, {name: str(token) for name, token in tokenizer.special_tokens_map.items()}]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))


def _encode(
    records: Sequence[PreferenceRecord], tokenizer: PreTrainedTokenizerBase, system_prompt: str | None
) -> Iterator[Encoding]:
    return Encoder(tokenizer).encode(render_record(record, tokenizer, system_prompt) for record in records)


def _with_policy_tokens(own: TokenizedPair, pair: TokenizedPair, policy: Encoding) -> TokenizedPair | None:
    """The reference's prompt before the policy's completions; None where its text has other tokens after the prompt."""
    if any(mine[: len(kept)] != kept for mine, kept in zip(own.completions, pair.completions, strict=True)):
        return None
    prompt, window = own.prompt_ids, pair.prompt_ids
    whole = policy.chosen[: policy.boundary]
    if len(window) < len(whole):
        shared = common_start(prompt[::-1], whole[::-1])
        if len(window) <= shared:
            prompt = prompt[: len(prompt) - shared] + window
    return replace(pair, prompt_ids=prompt)


def _cut_text(
    rendering: Rendering, pair: TokenizedPair, policy: Encoding, policy_tokenizer: PreTrainedTokenizerBase
) -> Rendering:
    """`rendering` with the completions that the policy's tokens were cut to, as text."""

    def decode(ids: Sequence[int]) -> str:
        return str(policy_tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def kept_text(ids: Sequence[int]) -> str:
        before, whole = decode(policy.prompt), decode([*policy.chosen[: policy.boundary], *ids])
        if not whole.startswith(before):
            return "" if before.startswith(whole) else decode(ids).rstrip("\ufffd")
        return whole[len(before) :].rstrip("\ufffd")

    chosen, rejected, *auxiliary = (
        rendering.prompt + kept_text(ids) if cut else whole
        for ids, cut, whole in zip(
            pair.completions, pair.cuts, (rendering.chosen, rendering.rejected, *rendering.auxiliary), strict=True
        )
    )
    return replace(
        rendering,
        chosen=chosen,
        rejected=rejected,
        chosen_cut=pair.chosen_cut,
        rejected_cut=pair.rejected_cut,
        auxiliary=tuple(auxiliary),
        auxiliary_cut=pair.auxiliary_cut,
    )
