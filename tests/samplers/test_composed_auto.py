"""The method that a pilot chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from enumerable_lm import OnlyAllowed, enumerable, exact_laws, p_value
from fakes import tiny_llama
from polyref import Reference, ReferenceSet
from polyref.errors import ConfigError
from polyref.samplers.composed import draw_composed
from polyref.samplers.composed_values import Drawn
from polyref.samplers.engine import SamplingParameters
from polyref.samplers.members import Members, load_members

WEIGHTS, PROMPT, LENGTH = (0.5, 0.3, 0.2), "ab", 3


@pytest.fixture(scope="module")
def members(tiny_tokenizer: PreTrainedTokenizerFast) -> Members:
    return enumerable(tiny_tokenizer, 1, 2, 1, weights=WEIGHTS)


def draw(members: Members, prompts: Any, n: int, **settings: Any) -> list[Drawn]:
    return draw_composed(members, prompts, n, SamplingParameters(LENGTH), **{"seed": 0, "batch_size": 600} | settings)


def test_an_ample_budget_draws_exactly_and_a_small_one_weighs_particles(members):
    (exact,) = draw(members, [PROMPT], 100)
    assert exact.method == "tokens" and exact.exact and len(exact.samples) == 100 and not exact.note
    (weighted,) = draw(members, [PROMPT], 100, budget=600)
    assert weighted.method == "smc" and not weighted.exact and 0 < len(weighted.samples) < 100
    assert "particles: a budget of" in weighted.note and weighted.calls <= 600


def test_references_that_hardly_agree_are_drawn_as_particles_within_the_usual_budget(tiny_tokenizer):
    models = [tiny_llama(tiny_tokenizer, seed=seed).double() for seed in (1, 2)]
    for model in models:
        model.lm_head.weight.data *= 40
    members = load_members(ReferenceSet(tuple(Reference(model, tokenizer=tiny_tokenizer) for model in models)))
    (drawn,) = draw_composed(members, [PROMPT], 4, SamplingParameters(6), seed=0)
    assert drawn.method == "smc" and len(drawn.samples) >= 4


def test_exact_draws_that_take_a_dozen_proposals_are_seen_and_made(tiny_tokenizer):
    """F is about 0.075: three pilots of sixteen in ten accept nothing, and are asked for more."""
    models = [OnlyAllowed(tiny_llama(tiny_tokenizer, seed=seed).double(), spread=12.0) for seed in (1, 2)]
    members = load_members(ReferenceSet(tuple(Reference(model, tokenizer=tiny_tokenizer) for model in models)))
    assert 0.04 < exact_laws(members, PROMPT, 4)["mass"] < 0.12
    drawn = draw_composed(members, [PROMPT] * 60, 1, SamplingParameters(4), seed=0, batch_size=400)
    assert sum(one.method == "tokens" and one.exact and len(one.samples) == 1 for one in drawn) >= 57


@pytest.mark.parametrize("budget", [1, 8, 9, 35, 36, 80, 150, 400])
def test_no_budget_is_exceeded_the_pilot_included(members, budget):
    for drawn in draw(members, [PROMPT, "a", "b"], 12, budget=budget):
        assert drawn.calls <= budget
        assert len(drawn.samples) >= 12 or drawn.note
        assert drawn.samples or drawn.note.startswith("n")


def test_choosing_by_a_pilot_bends_nothing(members):
    """The budget is such that pilots disagree; what is then drawn is what would have been drawn without one."""
    prompts = [PROMPT] * 150
    chosen = [(i, some) for i, some in enumerate(draw(members, prompts, 6, budget=150)) if some.method == "tokens"]
    assert 30 < len(chosen) < 135
    without = draw(members, prompts, 6, method="tokens")
    for i, some in chosen:
        assert ids(some) == ids(without[i])[: len(some.samples)]
        assert some.note or (some.proposals, some.log_mass) == (without[i].proposals, without[i].log_mass)
    law = exact_laws(members, PROMPT, LENGTH)["geometric"]
    assert p_value([sample for _, some in chosen for sample in some.samples], law, LENGTH) > 0.001


def ids(drawn: Drawn) -> list[tuple[int, ...]]:
    return [sample.token_ids for sample in drawn.samples]


def test_neither_batch_nor_company_changes_the_choice(members):
    prompts = [PROMPT, "a", "what is this", "a"]
    reference = draw(members, prompts, 6, budget=260)
    for other in (draw(members, prompts, 6, budget=260, batch_size=3), draw(members, prompts[:3], 6, budget=260)):
        for some, before in zip(other, reference, strict=False):
            assert ids(some) == ids(before)
            assert (some.method, some.calls, some.note) == (before.method, before.calls, before.note)


def test_what_a_pilot_cannot_help_with_has_one_method(members):
    (mixture,) = draw(replace(members, composition="arithmetic"), [PROMPT], 5)
    assert mixture.method == "mixture"
    (rejection,) = draw(replace(members, one_tokenizer=False), [PROMPT], 5)
    assert rejection.method == "rejection"
    with pytest.raises(ConfigError, match="fixed is set"):
        draw(members, [PROMPT], 5, fixed=True)
