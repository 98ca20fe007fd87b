"""Completions drawn with a language model on this machine: prompts read once, a batch that stays full.

Each sequence has its own stream of randomness, made from the seed, the prompt's tokens, its place among equal prompts and the
number of the draw. What else is in the batch changes a completion only where rounding does: how rarely is a matter of the
coupling (`polyref.samplers.tokens`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import xxhash
from torch import nn

from polyref.data.encode import Encoder
from polyref.errors import ConfigError, ModelError
from polyref.samplers.context import check_prompt, context_of
from polyref.samplers.engine import Collected, Completion, Finished, Progress, SamplingParameters
from polyref.samplers.rows import Rows
from polyref.samplers.running import Draft, Request, Running
from polyref.samplers.tokens import RACE, Coupling
from polyref.types import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LocalEngine:
    """An `Engine` on a causal language model of transformers, `batch_size` sequences at a time.

    `model` is put in eval mode while it draws. A prompt is read once for all its completions; those that are done make room for
    those that wait. `progress` and `finished` are told as it goes; `coupling` is how randomness chooses tokens. ConfigError for
    n < 1 or a batch below 1; DataError for an empty prompt, or one that leaves no room for `max_new_tokens` in the model's
    context; ModelError for logits that are not numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system_prompt: str | None = None,
        batch_size: int = 32,
        progress: Progress | None = None,
        finished: Finished | None = None,
        coupling: Coupling = RACE,
        name: str = "local",
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}", fix="give at least 1")
        self.model, self.tokenizer, self.system_prompt = model, tokenizer, system_prompt
        self.batch_size, self.progress, self.finished, self.name = batch_size, progress, finished, name
        self.coupling, self.ends = coupling, end_tokens(model, tokenizer)
        self._encoder = Encoder(tokenizer)

    def __call__(self, prompts: Sequence[Text], n: int, parameters: SamplingParameters, *, seed: int) -> list[list[Completion]]:
        """`n` completions of each prompt, as the protocol says."""
        if n < 1:
            raise ConfigError(f"n is {n}", fix="draw at least one completion a prompt")
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        context = context_of(getattr(self.model, "config", None))
        for row, tokens in enumerate(ids, 1):
            check_prompt(tokens, row, parameters.max_new_tokens, context)
        running = Running(self._read, ids, self._requests(ids, n, seed), parameters, self.ends, self.batch_size, self.coupling)
        collected, training = Collected(len(prompts), n, self.progress, self.finished), self.model.training
        self.model.eval()
        try:
            while running:
                collected.add(
                    (draft.request.prompt, draft.request.draw, self._completion(draft)) for draft in running.advance()
                )
        finally:
            self.model.train(training)
        return collected.completions()

    def prompt_ids(self, prompt: Text) -> tuple[int, ...]:
        """The tokens that completions of `prompt` are drawn after."""
        return self._encoder.encode_prompt(prompt, self.system_prompt)

    def _requests(self, ids: Sequence[Sequence[int]], n: int, seed: int) -> list[Request]:
        """All draws of one prompt side by side, prompts of like length together."""
        places: Counter[Sequence[int]] = Counter()
        streams = []
        for prompt in ids:
            streams.append((np.array([seed, places[prompt]], np.int64).tobytes(), np.array(prompt, np.int64).tobytes()))
            places[prompt] += 1
        return [
            Request(i, draw, xxhash.xxh3_128_intdigest(b"".join((*streams[i], np.int64(draw).tobytes()))))
            for i in sorted(range(len(ids)), key=lambda i: len(ids[i]))
            for draw in range(n)
        ]

    def _read(self, prompts: Sequence[Sequence[int]]) -> Rows:
        return Rows.read(self.model, prompts, self.name)

    def _completion(self, draft: Draft) -> Completion:
        kept = draft.token_ids[:-1] if draft.ended else draft.token_ids
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return Completion(tuple(draft.token_ids), text, draft.logp, draft.drawn_logp, draft.ended)


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What ends a completion: the tokenizer's end token and those of the model's generation settings."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    if not ends:
        raise ModelError("neither tokenizer nor model names a token that ends a completion", fix="set eos_token_id")
    return frozenset(cast(set[int], ends))
