"""Completions drawn with vLLM in this process, for machines that have it: the extra `vllm`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import xxhash

from polyref.data.encode import Encoder
from polyref.errors import ConfigError, ModelError
from polyref.samplers.context import check_prompt
from polyref.samplers.engine import Collected, Completion, Finished, Progress, SamplingParameters
from polyref.samplers.rescore import Scorer, Told, check_cut, completed
from polyref.types import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class VllmEngine:
    """An `Engine` on `llm`, a `vllm.LLM`; `tokenizer` is its model's.

    Each completion is a request of its own with its own seed, so that it depends on neither n nor the other prompts, up to
    vLLM's rounding; vLLM batches them and reads a prompt once where its prefix cache is on. Prompts are given as token ids.
    Log-probabilities are vLLM's own where temperature and top_p are 1, else the `scorer`'s, NaN without one. Prompts go in
    `prompts_at_once` at a time: what is `finished` then is kept if the rest fails. ConfigError for n < 1 or less than one
    prompt at a time; DataError for an empty prompt; ModelError for a completion that is cut short for another reason than its
    length, or by vLLM's context. vLLM's own errors pass, as for a prompt longer than its context.
    """

    def __init__(
        self,
        llm: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        scorer: Scorer | None = None,
        system_prompt: str | None = None,
        prompts_at_once: int = 256,
        progress: Progress | None = None,
        finished: Finished | None = None,
        name: str = "vllm",
    ) -> None:
        if prompts_at_once < 1:
            raise ConfigError(f"prompts_at_once is {prompts_at_once}", fix="give at least 1")
        self.llm, self.scorer, self.system_prompt, self.prompts_at_once = llm, scorer, system_prompt, prompts_at_once
        self.progress, self.finished, self.name = progress, finished, name
        self._encoder = Encoder(tokenizer)

    @classmethod
    def load(cls, model: str, **options: Any) -> Self:
        """The engine on `vllm.LLM(model, ...)`; ModelError where vLLM is not installed."""
        try:
            from vllm import LLM
        except ImportError:
            raise ModelError("drawing with vLLM needs the package vllm", fix="pip install 'polyref[vllm]'") from None
        llm = LLM(model=model, **options)
        return cls(llm, llm.get_tokenizer(), name=model)

    def __call__(self, prompts: Sequence[Text], n: int, parameters: SamplingParameters, *, seed: int) -> list[list[Completion]]:
        """`n` completions of each prompt, as the protocol says."""
        if n < 1:
            raise ConfigError(f"n is {n}", fix="draw at least one completion a prompt")
        ids = [self._encoder.encode_prompt(prompt, self.system_prompt) for prompt in prompts]
        for row, prompt in enumerate(ids, 1):
            check_prompt(prompt, row, parameters.max_new_tokens, None)  # vLLM knows its context
        collected, firsts = Collected(len(prompts), n, self.progress, self.finished), _first_seeds(ids, seed)
        for start in range(0, len(prompts), self.prompts_at_once):
            rows = range(start, min(start + self.prompts_at_once, len(prompts)))
            told = iter(self._draw([(ids[row], firsts[row] + draw) for row in rows for draw in range(n)], parameters))
            for row in rows:
                completions = completed(prompts[row], [next(told) for _ in range(n)], parameters, self.scorer)
                collected.add((row, draw, completion) for draw, completion in enumerate(completions))
        return collected.completions()

    def _draw(self, requests: Sequence[tuple[Sequence[int], int]], parameters: SamplingParameters) -> list[Told]:
        from vllm import SamplingParams

        shared = {"n": 1, "temperature": parameters.temperature, "top_p": parameters.top_p, "logprobs": 0}
        options = [SamplingParams(seed=seed, max_tokens=parameters.max_new_tokens, **shared) for _, seed in requests]
        given = [{"prompt_token_ids": list(prompt)} for prompt, _ in requests]
        outputs = self.llm.generate(given, options, use_tqdm=False)
        return [self._told(output.outputs[0], parameters.max_new_tokens) for output in outputs]

    def _told(self, output: Any, most: int) -> Told:
        if output.finish_reason not in ("stop", "length"):
            raise ModelError(f"a completion was ended by {output.finish_reason}", where=self.name, fix="draw again")
        ids = tuple(output.token_ids)
        check_cut(len(ids), most, output.finish_reason == "stop", self.name)
        logps = tuple(float(said[token].logprob) for token, said in zip(ids, output.logprobs, strict=True))
        return Told(output.text, ids, logps, output.finish_reason == "stop")


def _first_seeds(ids: Sequence[tuple[int, ...]], seed: int) -> list[int]:
    """The seed of each prompt's first completion, of 62 bits, made of the seed, the prompt and its place among equal ones."""
    places, firsts = Counter[tuple[int, ...]](), []
    for prompt in ids:
        firsts.append(xxhash.xxh3_64_intdigest(f"{seed} {places[prompt]} {prompt}".encode()) >> 2)
        places[prompt] += 1
    return firsts
