"""Log-probabilities of completions that were drawn elsewhere, against those of the engine that drew them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fakes import byte_tokenizer, tiny_llama
from polyref.errors import ConfigError, ModelError
from polyref.samplers.engine import SamplingParameters
from polyref.samplers.local import LocalEngine
from polyref.samplers.rescore import LocalScorer, Told, canonical_ids, completed

HI = ({"role": "user", "content": "hi"},)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer([("a", "b")])


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Any:
    return tiny_llama(tokenizer, seed=3).double()


@pytest.mark.parametrize("parameters", [SamplingParameters(6), SamplingParameters(6, temperature=0.7, top_p=0.9)])
def test_a_scorer_agrees_with_the_engine_that_drew(
    tokenizer: PreTrainedTokenizerFast, model: Any, parameters: SamplingParameters
) -> None:
    model.train()
    for prompt in ("some text", HI):
        engine, scorer = (kind(model, tokenizer, system_prompt="be kind") for kind in (LocalEngine, LocalScorer))
        [drawn] = engine([prompt], 11, parameters, seed=0)
        scored = scorer(prompt, [completion.token_ids for completion in drawn], parameters)
        for completion, (logp, drawn_logp) in zip(drawn, scored, strict=True):
            assert (logp, drawn_logp) == (pytest.approx(completion.logp), pytest.approx(completion.drawn_logp))
    assert model.training and scorer("x", [], parameters) == [] and scorer("x", [()], parameters) == [(0.0, 0.0)]
    model.eval()


def test_canonical_tokens_never_touch_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    joined = tokenizer("b", add_special_tokens=False)["input_ids"]
    assert canonical_ids("xa", "b", False, tokenizer) == tuple(joined), "though a and b would be one token"
    assert canonical_ids("x", "ab", False, tokenizer) == tuple(tokenizer("ab", add_special_tokens=False)["input_ids"])
    assert len(canonical_ids("x", "ab", False, tokenizer)) == 1
    assert canonical_ids(HI, "ab", True, tokenizer, "be kind")[-1] == tokenizer.eos_token_id
    assert canonical_ids("x", "", True, tokenizer) == (tokenizer.eos_token_id,)
    with pytest.raises(ModelError, match="names no token that ends"):
        canonical_ids("x", "a", True, byte_tokenizer(eos=False))


def test_told_log_probabilities_count_where_no_parameter_changes_the_law() -> None:
    told = [Told("a", (5, 2), (-1.0, -0.5), True), Told("b", (6,), None, False)]
    calls: list[Any] = []

    def scorer(prompt: Any, completions: Any, parameters: Any) -> list[tuple[float, float]]:
        calls.append(completions)
        return [(-7.0, -8.0)] * len(completions)

    plain = completed("x", told, SamplingParameters(2), scorer)
    assert [(c.logp, c.drawn_logp) for c in plain] == [(-1.5, -1.5), (-7.0, -8.0)] and calls == [[(6,)]]
    warm = completed("x", told, SamplingParameters(2, top_p=0.5), scorer)
    assert [c.logp for c in warm] == [-7.0, -7.0] and calls[1] == [(5, 2), (6,)]
    assert [c.logp == c.logp for c in completed("x", told, SamplingParameters(2), None)] == [True, False]


def test_what_cannot_be_scored_is_one_line(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="batch_size is 0"):
        LocalScorer(tiny_llama(tokenizer), tokenizer, batch_size=0)
    broken = tiny_llama(tokenizer)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="scorer: gives logits that are not numbers"):
        LocalScorer(broken, tokenizer)("x", [(5, 6)], SamplingParameters(2))
