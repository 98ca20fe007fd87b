"""A composition as an engine, and its tilt: the optimum of reverse KL to every reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from enumerable_lm import END, enumerable, exact_laws, exact_logps, p_value, support
from polyref.errors import ConfigError, ModelError
from polyref.rewards.functions import from_function
from polyref.samplers.composed_engine import ComposedEngine
from polyref.samplers.composed_values import Sample
from polyref.samplers.engine import SamplingParameters
from polyref.samplers.members import Members
from polyref.samplers.proposals import draw_tilted

WEIGHTS, PROMPT, LENGTH, BETA = (0.5, 0.3, 0.2), "ab", 3, 0.7


@pytest.fixture(scope="module")
def members(tiny_tokenizer: PreTrainedTokenizerFast) -> Members:
    return enumerable(tiny_tokenizer, 1, 2, 1, weights=WEIGHTS)


def test_the_tilted_composition_is_the_optimum_of_reverse_kl_to_every_reference(members):
    """G_a exp(r/beta)/Z from end to end: K models with caches, composed, then rejected by a reward whose bound is known."""
    reward = from_function(lambda prompt, completion: completion.count("E") / LENGTH, "share of E")
    ((proposals, kept),) = draw_tilted(
        ComposedEngine(members, batch_size=600),
        reward,
        [PROMPT],
        700,
        SamplingParameters(LENGTH),
        beta=BETA,
        seed=0,
        budget=6000,
        a_round=1000,
        r_max=[1.0],
    )
    drawn = [Sample(c.token_ids, c.text, c.ended, ()) for c in proposals.of(kept)]
    laws = exact_laws(members, PROMPT, LENGTH)
    tilted = laws["geometric"] * np.exp([tokens.count(40) / LENGTH / BETA for tokens in support(LENGTH)])
    assert kept.exact and len(drawn) == 700
    assert p_value(drawn, tilted / tilted.sum(), LENGTH) > 0.001
    assert p_value(drawn, laws["geometric"], LENGTH) < 1e-6


@pytest.mark.parametrize("composition", ["geometric", "arithmetic"])
def test_completions_carry_what_the_composition_gives_them(members, composition):
    engine = ComposedEngine(replace(members, composition=composition))
    ((*drawn,),) = engine([PROMPT], 6, SamplingParameters(LENGTH), seed=0)
    logps = exact_logps(members, PROMPT, LENGTH).numpy()
    exact = logps @ WEIGHTS if composition == "geometric" else np.log(np.exp(logps) @ WEIGHTS)
    for completion in drawn:
        place = support(LENGTH).index(completion.token_ids)
        assert completion.logp == completion.drawn_logp == pytest.approx(exact[place], abs=1e-9)
        assert completion.ended == (completion.token_ids[-1] == END)


def test_progress_is_that_of_an_engine(members):
    told: list[tuple[int, int, float]] = []
    ComposedEngine(members, progress=lambda *at: told.append(at))([PROMPT], 3, SamplingParameters(LENGTH), seed=0)
    assert [at[:2] for at in told] == [(1, 3), (2, 3), (3, 3)] and all(at[2] > 0 for at in told)


def test_the_method_is_exact_and_fits_the_members(members):
    assert ComposedEngine(members).method == "tokens"
    assert ComposedEngine(replace(members, one_tokenizer=False)).method == "rejection"
    assert ComposedEngine(replace(members, composition="arithmetic")).method == "mixture"
    with pytest.raises(ConfigError, match="composition: the method is smc"):
        ComposedEngine(members, method="smc")
    with pytest.raises(
        ModelError, match="composition, prompt 1: .* of 20 completions: the budget of 40 calls is spent.*; raise"
    ):
        ComposedEngine(members, budget=40)([PROMPT], 20, SamplingParameters(LENGTH), seed=0)
