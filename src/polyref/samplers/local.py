"""Completions drawn with a language model on this machine: prompts read once, finished rows leave the batch.

Each sequence has its own stream of uniform numbers, made from the seed, the prompt's tokens, its place among equal prompts and
the number of the draw; each token is found in the cumulative distribution by one of them. What else is in the batch changes a
completion only where rounding moves a boundary across a uniform number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from polyref.data.encode import Encoder
from polyref.errors import ConfigError, DataError, ModelError
from polyref.samplers.engine import Completion, SamplingParameters
from polyref.types import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
"""Called as (completions done, completions in all)."""


class _Request(NamedTuple):
    """One completion to draw: which prompt, which of its draws, and the uniform numbers that its tokens are found by."""

    prompt: int
    draw: int
    uniforms: np.ndarray


class LocalEngine:
    """An `Engine` on a causal language model of transformers, `batch_size` sequences at a time.

    `model` is put in eval mode while it draws. A prompt is read once for all its completions. ConfigError for n < 1 or a batch
    below 1; DataError for an empty prompt, or one that leaves no room for `max_new_tokens` in the model's context; ModelError
    for logits that are not numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system_prompt: str | None = None,
        batch_size: int = 32,
        progress: Progress | None = None,
        name: str = "local",
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}", fix="give at least 1")
        self.model, self.tokenizer, self.system_prompt = model, tokenizer, system_prompt
        self.batch_size, self.progress, self.name = batch_size, progress, name
        self.ends = _end_tokens(model, tokenizer)
        self._encoder = Encoder(tokenizer)

    def __call__(self, prompts: Sequence[Text], n: int, parameters: SamplingParameters, *, seed: int) -> list[list[Completion]]:
        """`n` completions of each prompt, as the protocol says."""
        if n < 1:
            raise ConfigError(f"n is {n}", fix="draw at least one completion a prompt")
        ids = [self._encoder.encode_prompt(prompt, self.system_prompt) for prompt in prompts]
        self._check(ids, parameters)
        found: list[list[Completion | None]] = [[None] * n for _ in prompts]
        done, training = 0, self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                for batch in self._batches(ids, n, parameters, seed):
                    for request, completion in zip(batch, self._draw(batch, ids, parameters), strict=True):
                        found[request.prompt][request.draw] = completion
                    done += len(batch)
                    if self.progress is not None:
                        self.progress(done, n * len(prompts))
        finally:
            self.model.train(training)
        return cast(list[list[Completion]], found)

    def _check(self, ids: Sequence[Sequence[int]], parameters: SamplingParameters) -> None:
        room = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        for row, prompt in enumerate(ids, 1):
            if not prompt:
                raise DataError("has no token", where=f"prompt {row}", fix="give a prompt, or a tokenizer with a first token")
            if room is not None and len(prompt) + parameters.max_new_tokens > room:
                what = f"has {len(prompt)} tokens, with {parameters.max_new_tokens} new ones more than the context of {room}"
                raise DataError(what, where=f"prompt {row}", fix="shorten the prompt, or lower max_new_tokens")

    def _batches(self, ids: Sequence[Sequence[int]], n: int, parameters: SamplingParameters, seed: int) -> list[list[_Request]]:
        """All draws of one prompt side by side, prompts of like length together."""
        places: Counter[Sequence[int]] = Counter()
        streams = []
        for prompt in ids:
            streams.append((np.array([seed, places[prompt]], np.int64).tobytes(), np.array(prompt, np.int64).tobytes()))
            places[prompt] += 1
        requests = []
        for i in sorted(range(len(ids)), key=lambda i: len(ids[i])):
            for draw in range(n):
                key = xxhash.xxh3_128_intdigest(b"".join((*streams[i], np.int64(draw).tobytes())))
                uniforms = np.random.Generator(np.random.Philox(key=key)).random(parameters.max_new_tokens)
                requests.append(_Request(i, draw, uniforms))
        return [requests[i : i + self.batch_size] for i in range(0, len(requests), self.batch_size)]

    def _draw(
        self, batch: Sequence[_Request], ids: Sequence[Sequence[int]], parameters: SamplingParameters
    ) -> list[Completion]:
        device = next(self.model.parameters()).device
        prompts = list(dict.fromkeys(request.prompt for request in batch))
        of_prompt = torch.tensor([prompts.index(request.prompt) for request in batch], device=device)
        logits, cache, mask = self._read([ids[i] for i in prompts], device)
        logits, mask = logits[of_prompt], mask[of_prompt]
        cache.batch_select_indices(of_prompt)
        uniforms = torch.tensor(np.stack([request.uniforms for request in batch]), device=device)
        ends = torch.tensor(sorted(self.ends), device=device)
        alive = torch.arange(len(batch), device=device)
        tokens: list[list[int]] = [[] for _ in batch]
        logps, drawn = torch.zeros(2, len(batch), dtype=torch.float64, device=device)
        ended = torch.zeros(len(batch), dtype=torch.bool, device=device)
        for step in range(parameters.max_new_tokens):
            token, own, law = _next_tokens(logits, uniforms[alive, step], parameters)
            logps[alive] += own
            drawn[alive] += law
            for row, value in zip(alive.tolist(), token.tolist(), strict=True):
                tokens[row].append(value)
            over = torch.isin(token, ends)
            ended[alive] = over
            if step + 1 == parameters.max_new_tokens or over.all():
                break
            if over.any():
                keep = (~over).nonzero()[:, 0]
                alive, token, mask = alive[keep], token[keep], mask[keep]
                cache.batch_select_indices(keep)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits = self._step(token[:, None], mask, mask.sum(1, keepdim=True) - 1, cache)
        rows = zip(tokens, logps.tolist(), drawn.tolist(), ended.tolist(), strict=True)
        return [Completion(tuple(row), self._text(row, over), own, law, over) for row, own, law, over in rows]

    def _read(self, prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Any, Tensor]:
        """Next-token logits (P, V) after each prompt, padded on the left; the cache; and the mask (P, L)."""
        from transformers import DynamicCache

        length = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), length, dtype=torch.long, device=device)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, length - len(prompt) :] = 1
        cache = DynamicCache(config=cast(Any, self.model).config)
        return self._step(tokens, mask, (mask.cumsum(1) - 1).clamp(min=0), cache), cache, mask

    def _step(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        output = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        if logits.isnan().any():
            raise ModelError("gives logits that are not numbers", where=self.name, fix="check the weights and the dtype")
        return logits

    def _text(self, tokens: Sequence[int], ended: bool) -> str:
        kept = list(tokens[:-1] if ended else tokens)
        return str(self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What ends a completion: the tokenizer's end token and those of the model's generation settings."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    if not ends:
        raise ModelError("neither tokenizer nor model names a token that ends a completion", fix="set eos_token_id")
    return frozenset(cast(set[int], ends))


def _next_tokens(logits: Tensor, uniforms: Tensor, parameters: SamplingParameters) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (R,), their log-probabilities under the model and under the law drawn from, by inverting the distribution."""
    own = logits.to(torch.float64).log_softmax(-1)
    law = (own / parameters.temperature).log_softmax(-1) if parameters.temperature != 1 else own
    if parameters.top_p < 1:
        order = law.argsort(dim=-1, descending=True, stable=True)
        before = law.gather(-1, order).exp().cumsum(-1).roll(1, -1)
        before[:, 0] = 0  # the likeliest token is always kept
        outside = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= parameters.top_p)
        law = law.masked_fill(outside, -torch.inf).log_softmax(-1)
    cumulative = law.exp().cumsum(-1)
    token = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]
    last = (law > -torch.inf).long().cumsum(-1).argmax(-1)  # rounding must not step over the last token of the support
    token = torch.minimum(token, last)
    return token, own.gather(-1, token[:, None])[:, 0], law.gather(-1, token[:, None])[:, 0]
