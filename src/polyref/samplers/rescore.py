"""Completions that were drawn elsewhere: their token ids, and log-probabilities where nobody told any.

Told only a text, `canonical_ids` takes the tokens that data with that text would have. The model may have drawn the same text
as other tokens: log-probabilities are then of the canonical tokenisation, at most the text's own, and less where the model has
other ways of writing it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from polyref.data.encode import Encoder, render_prompt
from polyref.errors import ConfigError, ModelError
from polyref.samplers.engine import Completion, SamplingParameters
from polyref.samplers.tokens import laws
from polyref.types import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scorer = Callable[[Text, Sequence[Sequence[int]], SamplingParameters], list[tuple[float, float]]]
"""`logp` and `drawn_logp`, as a `Completion` has them, of completions of one prompt given as token ids."""


class Told(NamedTuple):
    """What is known of a completion: its text, its tokens, their log-probabilities in nats if told, and whether it ended."""

    text: str
    token_ids: tuple[int, ...]
    logps: tuple[float, ...] | None
    ended: bool


def completed(prompt: Text, told: Sequence[Told], parameters: SamplingParameters, scorer: Scorer | None) -> list[Completion]:
    """The completions of one prompt. Log-probabilities are those told where `parameters` leave the model's law as it is: who
    tells them need not say whether before or after temperature and top_p. Else the `scorer`'s; NaN without one.
    """
    plain = parameters.temperature == 1 and parameters.top_p == 1
    values = [(math.fsum(t.logps),) * 2 if plain and t.logps is not None else None for t in told]
    lacking = [i for i, value in enumerate(values) if value is None]
    if scorer is not None and lacking:
        for i, value in zip(lacking, scorer(prompt, [told[i].token_ids for i in lacking], parameters), strict=True):
            values[i] = value
    pairs = (value or (math.nan, math.nan) for value in values)
    return [Completion(t.token_ids, t.text, *pair, t.ended) for t, pair in zip(told, pairs, strict=True)]


def check_cut(tokens: int, most: int, ended: bool, where: str) -> None:
    """ModelError for a completion cut after fewer `tokens` than the `most` asked for: by a context, so of another law."""
    if not ended and tokens < most:
        what = f"a completion was cut after {tokens} tokens, not {most}: the context is full"
        raise ModelError(what, where=where, fix="shorten the prompt, or lower max_new_tokens")


def canonical_ids(
    prompt: Text, text: str, ended: bool, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None
) -> tuple[int, ...]:
    """The tokens that `text` has after `prompt`, and the tokenizer's end token if it `ended`. ModelError where it has none."""
    before = render_prompt(prompt, tokenizer, system_prompt)
    start, whole = (tuple(tokenizer(x, add_special_tokens=False, verbose=False)["input_ids"]) for x in (before, before + text))
    if whole[: len(start)] == start:
        ids = whole[len(start) :]
    else:  # the text's first characters would join the prompt's last token, which the model was given as it is
        ids = tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if not ended:
        return ids
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer names no token that ends a completion", fix="set eos_token_id")
    return (*ids, tokenizer.eos_token_id)


class LocalScorer:
    """A `Scorer` with a causal language model of transformers on this machine, `batch_size` completions at a time."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system_prompt: str | None = None,
        batch_size: int = 8,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}", fix="give at least 1")
        self.model, self.system_prompt, self.batch_size = model, system_prompt, batch_size
        self._encoder = Encoder(tokenizer)

    def __call__(
        self, prompt: Text, completions: Sequence[Sequence[int]], parameters: SamplingParameters
    ) -> list[tuple[float, float]]:
        """As `Scorer` says; ModelError for logits that are not numbers."""
        ids, found = self._encoder.encode_prompt(prompt, self.system_prompt), list[tuple[float, float]]()
        training = self.model.training
        self.model.eval()
        try:
            for i in range(0, len(completions), self.batch_size):
                found += self._scored(ids, completions[i : i + self.batch_size], parameters)
        finally:
            self.model.train(training)
        return found

    @torch.inference_mode()
    def _scored(
        self, prompt: Sequence[int], completions: Sequence[Sequence[int]], parameters: SamplingParameters
    ) -> list[tuple[float, float]]:
        """One pass over rows of prompt and completion, padded on the right, where no token sees the padding."""
        device = next(self.model.parameters()).device
        rows = torch.zeros(len(completions), len(prompt) + max(map(len, completions)), dtype=torch.long)
        mask = torch.zeros_like(rows)
        for row, completion in enumerate(completions):
            both = torch.tensor([*prompt, *completion])
            rows[row, : len(both)], mask[row, : len(both)] = both, 1
        model: Any = self.model
        logits = model(input_ids=rows.to(device), attention_mask=mask.to(device), use_cache=False).logits
        found = []
        for row, completion in enumerate(completions):
            if not completion:
                found.append((0.0, 0.0))
                continue
            of = logits[row, len(prompt) - 1 : len(prompt) - 1 + len(completion)]
            if not of.amax(-1).isfinite().all():
                raise ModelError("gives logits that are not numbers", where="scorer", fix="check the weights and the dtype")
            at = torch.tensor(completion, device=device)[:, None]
            own, law = (float(x.gather(-1, at).sum()) for x in laws(of, parameters))
            found.append((own, law))
        return found
