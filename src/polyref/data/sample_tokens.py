"""Samples -> token ids, made once: each prompt with all its completions, and the share of each in the likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polyref.data.encode import Encoder, Ids, common_start, render_prompt, render_whole
from polyref.data.records import RowError
from polyref.data.samples import SampleRecord, samples_by_prompt
from polyref.data.truncate import check_truncation, prompt_and_room

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TokenizedSamples:
    """One prompt: `prompt_ids`, and of S samples with weight the token ids, the record and whether the completion is cut.

    `shares` (S,) are their weights, of sum 1: every prompt counts the same, however many samples it has.
    """

    prompt_ids: Ids
    completions: tuple[Ids, ...]
    cuts: tuple[bool, ...]
    shares: tuple[float, ...]
    records: tuple[SampleRecord, ...]


def tokenize_samples(
    samples: Sequence[SampleRecord],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
) -> list[TokenizedSamples]:
    """The prompts of `samples`, in order, those left out that alone fill `max_length`.

    Token ids are those of `tokenize_record` for a completion that ended. One that did not is its prompt's text and its own,
    without an end-of-turn, and without what a chat template writes after it. Samples of weight 0 are left out. A completion
    longer than `max_length` allows is cut, and loses its end-of-turn.
    Errors: those of `tokenize_record`, and `RowError` for a completion without a token.
    """
    check_truncation(max_length, truncation_mode)
    encoder = Encoder(tokenizer)
    found = []
    for some in samples_by_prompt(samples):
        counted = [sample for sample in some if sample.log_weight > -math.inf]
        prompt, completions = _encoded(counted, encoder)
        room = None
        if max_length is not None:
            prompt, room = prompt_and_room(prompt, completions, max_length, truncation_mode)
        if room != 0:
            cuts = tuple(not s.ended or len(ids) > (room or len(ids)) for s, ids in zip(counted, completions, strict=True))
            kept = tuple(ids[:room] for ids in completions)
            found.append(TokenizedSamples(prompt, kept, cuts, _shares(counted), tuple(counted)))
    return found


def _encoded(samples: Sequence[SampleRecord], encoder: Encoder) -> tuple[Ids, tuple[Ids, ...]]:
    """Token ids of the one prompt of `samples`, up to where all texts still agree with it, and of what comes after it."""
    first, tokenizer = samples[0], encoder.tokenizer
    text = render_prompt(first.prompt, tokenizer, source=first.source, row=first.row)
    wholes = [
        render_whole(one.prompt, text, one.completion, tokenizer, ended=one.ended, source=one.source, row=one.row)
        for one in samples
    ]
    chat, cuts = not isinstance(first.prompt, str), [not sample.ended for sample in samples]
    prompt, ids = encoder.encode_texts(text, wholes, cuts, chat=chat)
    boundary = min(common_start(prompt, whole) for whole in ids)
    if boundary == 0:
        what = "no token of the prompt is left whole before the completions"
        fix = "lengthen the prompt, or use a tokenizer with a beginning-of-sequence token"
        raise RowError(what, source=first.source, row=first.row, column="prompt", fix=fix)
    for sample, whole in zip(samples, ids, strict=True):
        if len(whole) == boundary:
            what, fix = "holds no token", "remove the row, or use a tokenizer with an end-of-sequence token"
            raise RowError(what, source=sample.source, row=sample.row, column="completion", fix=fix)
    return prompt[:boundary], tuple(whole[boundary:] for whole in ids)


def _shares(samples: Sequence[SampleRecord]) -> tuple[float, ...]:
    top = max(sample.log_weight for sample in samples)
    weights = [math.exp(sample.log_weight - top) for sample in samples]
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)
