"""The vLLM engine against a fake of the part of vLLM's interface that it uses: vLLM itself runs nowhere in these tests."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fakes import byte_tokenizer, tiny_llama
from polyref.errors import ConfigError, DataError, ModelError
from polyref.samplers.engine import Completion, SamplingParameters
from polyref.samplers.rescore import LocalScorer
from polyref.samplers.vllm import VllmEngine

PARAMETERS = SamplingParameters(6)


@dataclass
class FakeParams:
    """The fields of vllm.SamplingParams that the engine gives; another name is an error, as there."""

    n: int
    temperature: float
    top_p: float
    seed: int
    max_tokens: int
    logprobs: int


class FakeLLM:
    """vllm.LLM as far as it goes: generate(prompts, sampling_params, use_tqdm), one RequestOutput a request, in order."""

    def __init__(self, model: str, **options: Any) -> None:
        self.tokenizer = byte_tokenizer()
        self.options, self.network = options, tiny_llama(self.tokenizer, seed=3).double()
        self.batches: list[int] = []
        self.reason: str | None = None
        self.context = 64

    def get_tokenizer(self) -> PreTrainedTokenizerFast:
        return self.tokenizer

    def generate(self, prompts: list[dict[str, Any]], sampling_params: list[FakeParams], *, use_tqdm: bool) -> list[Any]:
        assert len(prompts) == len(sampling_params) and not use_tqdm
        assert all(given.keys() == {"prompt_token_ids"} and type(given["prompt_token_ids"]) is list for given in prompts)
        self.batches.append(len(prompts))
        return [self._one(p["prompt_token_ids"], options) for p, options in zip(prompts, sampling_params, strict=True)]

    @torch.no_grad()
    def _one(self, prompt: list[int], options: FakeParams) -> Any:
        assert options.n == 1 and 0 <= options.seed < 2**63
        generator, ids, logprobs = torch.Generator().manual_seed(options.seed), list[int](), []
        while len(ids) < min(options.max_tokens, self.context - len(prompt)) and (not ids or ids[-1] != 2):
            logps = self.network(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1].log_softmax(-1)
            ids.append(int(torch.multinomial((logps / options.temperature).softmax(-1), 1, generator=generator)))
            logprobs.append({ids[-1]: SimpleNamespace(logprob=float(logps[ids[-1]]), rank=1, decoded_token="x")})
        reason = self.reason or ("stop" if ids[-1] == 2 else "length")
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        output = SimpleNamespace(index=0, text=text, token_ids=ids, logprobs=logprobs, finish_reason=reason)
        return SimpleNamespace(outputs=[output], finished=True)


@pytest.fixture(autouse=True)
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, FakeParams
    monkeypatch.setitem(sys.modules, "vllm", module)


def tokens(drawn: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in row] for row in drawn]


def test_completions_and_log_probabilities_are_those_of_vllm() -> None:
    engine = VllmEngine.load("some/model", max_model_len=64)
    assert engine.name == "some/model" and engine.llm.options == {"max_model_len": 64}
    [drawn] = engine([({"role": "user", "content": "hi"},)], 12, PARAMETERS, seed=0)
    scorer = LocalScorer(engine.llm.network, engine.llm.tokenizer)
    scored = scorer(({"role": "user", "content": "hi"},), [completion.token_ids for completion in drawn], PARAMETERS)
    for completion, (logp, _) in zip(drawn, scored, strict=True):
        assert completion.logp == completion.drawn_logp == pytest.approx(logp)
        assert completion.ended == (completion.token_ids[-1] == 2) and 1 <= len(completion.token_ids) <= 6
    assert len({completion.token_ids for completion in drawn}) > 6


def test_neither_order_nor_company_nor_n_changes_a_completion() -> None:
    engine = VllmEngine.load("m")
    drawn = tokens(engine(["a", "b", "a"], 3, PARAMETERS, seed=5))
    assert tokens(engine(["b", "a"], 2, PARAMETERS, seed=5)) == [drawn[1][:2], drawn[0][:2]]
    assert drawn[0] != drawn[2] and tokens(engine(["a"], 3, PARAMETERS, seed=6))[0] != drawn[0]


def test_what_vllm_does_not_say_is_the_scorers() -> None:
    engine, warm = VllmEngine.load("m"), SamplingParameters(6, temperature=0.5)
    [[unknown]] = engine(["a"], 1, warm, seed=0)
    assert math.isnan(unknown.logp) and math.isnan(unknown.drawn_logp)
    engine.scorer = LocalScorer(engine.llm.network, engine.llm.tokenizer)
    [[known]] = engine(["a"], 1, warm, seed=0)
    assert known.token_ids == unknown.token_ids
    assert (known.logp, known.drawn_logp) == engine.scorer("a", [known.token_ids], warm)[0]


def test_finished_prompts_are_kept_and_told() -> None:
    kept, told = dict[int, Any](), list[Any]()
    llm = FakeLLM("m")
    options: dict[str, Any] = {"finished": kept.__setitem__, "progress": lambda *at: told.append(at[:2])}
    engine = VllmEngine(llm, llm.tokenizer, prompts_at_once=2, system_prompt="be kind", **options)
    drawn = engine(["a", "b", "c"], 2, PARAMETERS, seed=0)
    assert llm.batches == [4, 2] and kept == dict(enumerate(drawn)) and told == [(2, 6), (4, 6), (6, 6)]


def test_what_cannot_be_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VllmEngine.load("m")
    with pytest.raises(ConfigError, match="n is 0"):
        engine(["a"], 0, PARAMETERS, seed=0)
    with pytest.raises(ConfigError, match="prompts_at_once is 0"):
        VllmEngine(engine.llm, engine.llm.tokenizer, prompts_at_once=0)
    with pytest.raises(DataError, match="prompt 1: has no token"):
        VllmEngine(engine.llm, byte_tokenizer(bos=False))([""], 1, PARAMETERS, seed=0)
    engine.llm.reason = "abort"
    with pytest.raises(ModelError, match="^m: a completion was ended by abort"):
        engine(["a"], 1, PARAMETERS, seed=0)
    engine.llm.reason, engine.llm.context = None, 4
    with pytest.raises(ModelError, match="^m: a completion was cut after 2 tokens, not 6: the context is full"):
        engine(["a"], 8, PARAMETERS, seed=0)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelError, match=r"needs the package vllm; pip install 'polyref\[vllm\]'"):
        VllmEngine.load("m")
