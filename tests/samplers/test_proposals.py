"""Rejection over an engine: the law of what is kept, budgets, and independence of other prompts."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from scipy.stats import chisquare

from fakes import byte_tokenizer, tiny_llama
from polyref.errors import ConfigError, DataError, ModelError
from polyref.rewards.functions import NamedReward, from_function
from polyref.samplers.engine import Completion, SamplingParameters
from polyref.samplers.local import LocalEngine
from polyref.samplers.pairing import PAIRINGS
from polyref.samplers.pairs import Scored, make_pairs
from polyref.samplers.proposals import draw_tilted, propose, refuse_empty
from polyref.types import Text

LAW = {"a": 0.5, "b": 0.3, "c": 0.2}
REWARDS = {"a": 0.0, "b": 0.5, "c": 1.0}
PARAMETERS = SamplingParameters(4)


@dataclass
class Urn:
    """An engine whose completions are letters of one law, whatever the prompt."""

    name: str = "urn"
    calls: list[tuple[int, int]] = field(default_factory=list)

    def __call__(self, prompts: Sequence[Text], n: int, parameters: SamplingParameters, *, seed: int) -> list[list[Completion]]:
        self.calls.append((len(prompts), n))
        rows = []
        for prompt in prompts:
            stream = np.random.default_rng(xxhash.xxh3_64_intdigest(f"{seed} {prompt}".encode()))
            texts = stream.choice(list(LAW), p=list(LAW.values()), size=n)
            rows.append([Completion((1, 2), str(text), 0.0, 0.0, True) for text in texts])
        return rows


def letters(prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
    return [REWARDS[text if isinstance(text, str) else text[0]["content"]] for text in completions]


REWARD = NamedReward("letters", letters)


def draw(prompts: Sequence[Text], **changes: Any) -> Any:
    settings = {"wanted": 5, "beta": 0.5, "seed": 0, "budget": 200, "a_round": 8, "r_max": [1.0] * len(prompts)} | changes
    return draw_tilted(settings.pop("engine", Urn()), REWARD, prompts, settings.pop("wanted"), PARAMETERS, **settings)


def test_what_is_kept_has_the_law_of_the_tilt_over_rounds() -> None:
    prompts = [str(i) for i in range(400)]
    results = draw(prompts)
    kept = [completion.text for proposals, some in results for completion in proposals.of(some)]
    assert len(kept) == 2000 and all(some.exact for _, some in results)
    tilt = {text: p * math.exp(REWARDS[text] / 0.5) for text, p in LAW.items()}
    z = sum(tilt.values())
    observed = [Counter(kept)[text] for text in LAW]
    assert chisquare(observed, [2000 * w / z for w in tilt.values()]).pvalue > 0.001
    assert chisquare(observed, [2000 * p for p in LAW.values()]).pvalue < 1e-9


class ThreeTokens(torch.nn.Module):
    """A model whose tokens are its end and two bytes, and no other."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.generation_config = model, model.config, model.generation_config

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        barred = torch.ones(output.logits.shape[-1], dtype=torch.bool)
        barred[[2, 40, 41]] = False
        output.logits = (3 * output.logits).masked_fill(barred, -torch.inf)
        return output


def test_a_language_model_is_tilted_exactly_ended_and_cut_completions_alike() -> None:
    tokenizer = byte_tokenizer()
    model = ThreeTokens(tiny_llama(tokenizer, seed=1).double())
    engine, beta = LocalEngine(model, tokenizer, batch_size=500), 0.5
    reward = from_function(lambda _, text: float(str(text).count(tokenizer.decode([40]))) / 2, "count")
    found = draw_tilted(
        engine, reward, ["ab"], 1000, SamplingParameters(2), beta=beta, seed=2, budget=6000, a_round=2000, r_max=[1.0]
    )
    refuse_empty(found)
    kept = [completion.token_ids for proposals, some in found for completion in proposals.of(some)]
    prompt = engine.prompt_ids("ab")
    base = {}
    for tokens in [(2,), *itertools.product((40, 41), (2, 40, 41))]:
        with torch.no_grad():
            law = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].softmax(-1)
        base[tokens] = float(law[range(len(tokens)), list(tokens)].prod())
    assert sum(base.values()) == pytest.approx(1)
    tilt = np.array([p * math.exp(tokens.count(40) / 2 / beta) for tokens, p in base.items()])
    observed = [Counter(kept)[tokens] for tokens in base]
    assert len(kept) == 1000 == sum(observed)
    assert chisquare(observed, 1000 * tilt / tilt.sum()).pvalue > 0.001
    assert chisquare(observed, 1000 * np.array(list(base.values()))).pvalue < 1e-9
    log_z = found[0][1].log_z
    assert log_z is not None and log_z.low < math.log(tilt.sum()) < log_z.high


def test_completions_that_end_at_once_are_part_of_the_law_and_no_pair() -> None:
    tokenizer = byte_tokenizer()
    model = ThreeTokens(tiny_llama(tokenizer, seed=1).double())
    reward = from_function(lambda _, text: float(len(text)), "length")
    (one,) = propose(LocalEngine(model, tokenizer), reward, ["ab"], 40, SamplingParameters(2), seed=0)
    empty = [i for i, completion in enumerate(one.completions) if completion.token_ids == (2,)]
    assert 0 < len(empty) < 40
    for i in empty:
        assert one.completions[i].text == "" and one.completions[i].ended and one.rewards[i] == 0
    texts = tuple(one.completions[i].text for i in empty)
    with pytest.raises(DataError, match="^pairs: none of 1 prompts gives a pair: texts are equal"):
        make_pairs([Scored("ab", texts, (0.0,) * len(texts))], PAIRINGS["random"], seed=0)


def test_what_a_prompt_gets_depends_on_it_alone_and_equal_prompts_have_draws_of_their_own() -> None:
    def texts(results: Any) -> list[list[str]]:
        return [[completion.text for completion in proposals.of(kept)] for proposals, kept in results]

    chat = ({"role": "user", "content": "x"},)
    together, turned = texts(draw(["x", "y", "x", chat])), texts(draw([chat, "x", "x", "y"]))
    assert turned == [together[3], together[0], together[2], together[1]]
    assert texts(draw(["x"])) == together[:1]
    assert together[0] != together[2] and texts(draw(["x"], seed=1)) != together[:1]


def test_a_budget_is_never_exceeded_and_who_has_enough_draws_no_more() -> None:
    urn = Urn()
    results = draw([str(i) for i in range(20)], engine=urn, budget=20, wanted=8)
    assert all(kept.proposals <= 20 for _, kept in results)
    assert [n for _, n in urn.calls] == [8, 8, 4] and urn.calls[0][0] == 20 > urn.calls[-1][0]
    short = [kept for _, kept in results if len(kept.indices) < 8]
    assert short and all(kept.proposals == 20 for kept in short)
    refuse_empty(results)
    none = draw(["who\nknows", "b"], beta=1e-3, budget=5, wanted=1, r_max=[9.0, 9.0])
    with pytest.raises(DataError, match="^prompt 1 .'who knows'.: none of 5 proposals was accepted, nor for 1 other"):
        refuse_empty(none)


def test_a_bound_that_is_exceeded_or_missing_makes_a_result_approximate() -> None:
    found = draw(["x", "y"], r_max=[0.4, 1.0], budget=100, wanted=20)
    assert [kept.exact for _, kept in found] == [False, True] and "above the r_max of 0.4" in found[0][1].note
    assert not draw(["x"], r_max=None)[0][1].exact


def test_proposals_come_with_their_rewards_and_a_reward_that_is_none_is_named() -> None:
    (one, other) = propose(Urn(), REWARD, ["x", "x"], 6, PARAMETERS, seed=0)
    assert one.rewards.tolist() == [REWARDS[completion.text] for completion in one.completions]
    assert one.completions != other.completions

    class Broken:
        name = "broken"

        def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> torch.Tensor:
            return torch.arange(len(prompts), dtype=torch.float64).where(torch.arange(len(prompts)) != 4, torch.nan)

    with pytest.raises(ModelError, match=r"^broken, prompt 2 \('y'\), completion 2: gave nan as reward; a reward is"):
        propose(Urn(), Broken(), ["x", "y"], 3, PARAMETERS, seed=0)
    with pytest.raises(ConfigError, match="wanted is 3, a_round 8 and budget 2"):
        draw(["x"], wanted=3, budget=2)
    with pytest.raises(ConfigError, match="2 r_max for 1 prompts"):
        draw(["x"], r_max=[1.0, 2.0])
