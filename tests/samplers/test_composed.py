"""Mixture, rejection and token proposals against enumeration, other batches and other company."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from transformers import PreTrainedTokenizerFast

from enumerable_lm import END, OnlyAllowed, enumerable, exact_laws, exact_logps, p_value, support
from fakes import tiny_llama
from polyref.errors import ConfigError, DataError, ReferenceSetError
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.samplers.composed import draw_composed
from polyref.samplers.composed_values import Drawn, Plan, Sample, Task
from polyref.samplers.engine import SamplingParameters
from polyref.samplers.geometric_tokens import propose_tokens
from polyref.samplers.members import Members, load_members

WEIGHTS, PROMPT, LENGTH = (0.5, 0.3, 0.2), "ab", 3
EXACT = pytest.mark.parametrize("method", ["rejection", "tokens"])


@pytest.fixture(scope="module")
def members(tiny_tokenizer: PreTrainedTokenizerFast) -> Members:
    """Two models, one of them under two prompts: F is 0.46."""
    return enumerable(tiny_tokenizer, 1, 2, 1, weights=WEIGHTS)


@pytest.fixture(scope="module")
def laws(members: Members) -> dict[str, np.ndarray]:
    return exact_laws(members, PROMPT, LENGTH)


def draw(members: Members, prompts: Any = (PROMPT,), n: int = 1500, length: int = LENGTH, **settings: Any) -> list[Drawn]:
    usual: dict[str, Any] = {"seed": 0, "batch_size": 600, "method": "tokens"}
    return draw_composed(members, prompts, n, SamplingParameters(length), **usual | settings)


def mixed(members: Members) -> Members:
    return replace(members, composition="arithmetic")


@EXACT
def test_exact_samples_follow_the_geometric_composition_and_no_other_law(members, laws, method):
    (drawn,) = draw(members, method=method)
    assert len(drawn.samples) == 1500 == drawn.ess and drawn.exact and not drawn.note
    assert p_value(drawn.samples, laws["geometric"], LENGTH) > 0.001
    assert p_value(drawn.samples, laws["arithmetic"], LENGTH) < 1e-6
    assert p_value(drawn.samples, laws["tokens"], LENGTH) < 1e-6
    assert drawn.mass.low < laws["mass"] < drawn.mass.high
    assert drawn.mass.mean == pytest.approx((drawn.accepted - 1) / (drawn.proposals - 1))


@EXACT
def test_the_rate_of_acceptance_is_the_mass(members, laws, method):
    (drawn,) = draw(members, n=1500, method=method, fixed=True, seed=1)
    assert drawn.proposals == 1500 and drawn.accepted == len(drawn.samples)
    assert drawn.mass.mean == pytest.approx(drawn.acceptance) and drawn.acceptance == drawn.accepted / 1500
    assert binomtest(drawn.accepted, 1500, float(laws["mass"])).pvalue > 0.001


def test_the_mixture_is_the_arithmetic_composition(members, laws):
    (drawn,) = draw(mixed(members), method="mixture")
    assert drawn.acceptance == drawn.mass.mean == 1 and len(drawn.samples) == 1500
    assert p_value(drawn.samples, laws["arithmetic"], LENGTH) > 0.001
    assert p_value(drawn.samples, laws["geometric"], LENGTH) < 1e-6


def test_composing_tokens_is_another_law_and_the_test_can_tell(members, laws):
    group = [member for member in members.members if member is not None]
    task = Task(PROMPT, tuple(member.prompt_ids(PROMPT, LENGTH, 1) for member in group), WEIGHTS, "")
    plan = Plan(1500, LENGTH, 0, 600, False, False)
    rows = propose_tokens(group, [task], [(0, draw) for draw in range(1500)], plan, coins=False)
    assert all(row.kept for row in rows)
    samples = [Sample(tuple(row.token_ids), "", row.ended, row.logps) for row in rows]
    assert p_value(samples, laws["geometric"], LENGTH) < 1e-6
    assert p_value(samples, laws["tokens"], LENGTH) > 0.001


@pytest.mark.parametrize("method", ["rejection", "tokens", "mixture"])
def test_samples_carry_what_every_member_gives_them(members, tiny_tokenizer, method):
    some = mixed(members) if method == "mixture" else members
    (drawn,) = draw(some, n=30, method=method)
    exact = dict(zip(support(LENGTH), exact_logps(members, PROMPT, LENGTH).tolist(), strict=True))
    assert {sample.ended for sample in drawn.samples} == {True, False}, "completions that end and that are cut"
    for sample in drawn.samples:
        assert sample.logps == pytest.approx(exact[sample.token_ids], abs=1e-9)
        assert sample.ended == (sample.token_ids[-1] == END) and sample.log_weight == 0
        body = sample.token_ids[:-1] if sample.ended else sample.token_ids
        assert sample.text == tiny_tokenizer.decode(list(body))


@pytest.mark.parametrize("method", ["rejection", "tokens"])
def test_neither_batch_nor_order_nor_company_changes_what_is_drawn(members, method):
    prompts = ["a", "what is this", "a", ({"role": "user", "content": "hi"},)]
    rows = [None, (0.2, 0.8, 0.0), None, (0.0, 0.0, 1.0)]
    reference = draw(members, prompts, 4, 5, weights=rows, method=method)
    for size in (1, 3):
        assert same(draw(members, prompts, 4, 5, weights=rows, batch_size=size, method=method), reference)
    turned = draw(members, prompts[::-1], 4, 5, weights=rows[::-1], method=method)[::-1]
    assert same(turned[1:2] + turned[3:], reference[1:2] + reference[3:])
    assert same(draw(members, prompts[1:2], 4, 5, weights=rows[1:2], method=method), reference[1:2])
    assert not same(reference[:1], reference[2:3]), "equal prompts have draws of their own"
    assert not same(draw(members, prompts, 4, 5, weights=rows, seed=1, method=method), reference)


def same(some: list[Drawn], others: list[Drawn]) -> bool:
    """Whether all numbers and tokens agree; log-probs up to what batching rounds."""

    def known(drawn: Drawn) -> Any:
        return [(s.token_ids, s.text, s.ended) for s in drawn.samples], drawn.proposals, drawn.calls, drawn.mass, drawn.note

    def logps(drawn: list[Drawn]) -> torch.Tensor:
        return torch.tensor([sample.logps for one in drawn for sample in one.samples])

    if [known(drawn) for drawn in some] != [known(drawn) for drawn in others]:
        return False
    torch.testing.assert_close(logps(some), logps(others), equal_nan=True)
    return True


def test_prompts_have_weights_of_their_own_and_members_without_are_not_asked(members):
    rows = [(0.1, 0.9, 0.0), None]
    drawn = draw(members, [PROMPT, PROMPT], 800, weights=rows)
    for some, weights in zip(drawn, ((0.1, 0.9, 0.0), WEIGHTS), strict=True):
        assert p_value(some.samples, exact_laws(members, PROMPT, LENGTH, weights)["geometric"], LENGTH) > 0.001
    assert all(math.isnan(s.logps[2]) and math.isfinite(s.logps[1]) for s in drawn[0].samples)
    (alone,) = draw(members, weights=[(0.0, 1.0, 0.0)], n=20)
    assert alone.acceptance == 1, "one member is its own composition"


@EXACT
def test_a_budget_is_not_exceeded_and_a_short_result_says_so(members, method):
    (whole,) = draw(members, n=20, method=method)
    for budget in (8, 9, 60):
        (drawn,) = draw(members, n=20, budget=budget, method=method)
        assert drawn.calls <= budget and len(drawn.samples) < 20
        assert tokens(drawn) == tokens(whole)[: len(drawn.samples)], "the first of those without a budget"
        (fixed,) = draw(members, n=20, budget=budget, method=method, fixed=True)
        assert fixed.calls <= budget and fixed.note
        if budget < 9:
            assert drawn.proposals == 0 and "does not cover one proposal" in drawn.note
            assert math.isnan(drawn.acceptance) and drawn.ess == 0
        else:
            assert f"budget of {budget} calls is spent" in drawn.note and drawn.calls > budget - 9


@pytest.mark.parametrize("method", ["rejection", "tokens", "auto", "smc"])
def test_progress_counts_completions_and_tokens_a_second(members, method):
    told: list[tuple[int, int, float]] = []
    drawn = draw(members, ["a", "b"], 5, batch_size=2, method=method, progress=lambda *at: told.append(at))
    done = [at[0] for at in told]
    assert all(len(some.samples) >= 5 for some in drawn) and done == sorted(set(done)) and len(done) > 1
    assert told[-1][:2] == (10, 10) and all(total == 10 and rate > 0 for _, total, rate in told)


def tokens(drawn: Drawn) -> list[tuple[int, ...]]:
    return [sample.token_ids for sample in drawn.samples]


def test_a_budget_does_not_bend_the_law(members, laws):
    """A budget that looked at lengths would prefer short completions: what is returned for many prompts is still G_a."""
    drawn = draw(members, [PROMPT] * 500, 3, budget=15)
    assert {len(some.samples) for some in drawn} >= {0, 1, 2}
    assert p_value([sample for some in drawn for sample in some.samples], laws["geometric"], LENGTH) > 0.001


def test_references_that_share_nothing_give_an_empty_result_that_says_so(tiny_tokenizer):
    models = [OnlyAllowed(tiny_llama(tiny_tokenizer), (token,)) for token in (40, 41)]
    members = load_members(ReferenceSet(tuple(Reference(model, tokenizer=tiny_tokenizer) for model in models)))
    for method in ("rejection", "tokens"):
        (drawn,) = draw(members, n=2, method=method, budget=200)
        assert drawn.samples == () and drawn.acceptance == 0 == drawn.mass.mean == drawn.mass.low < drawn.mass.high < 0.2
        assert "none of" in drawn.note and "F is below" in drawn.note and drawn.log_mass.mean == -math.inf


def test_what_cannot_be_drawn_is_refused_in_one_line(members):
    with pytest.raises(ConfigError, match="unknown method 'tokenwise'; use one of auto, mixture, rejection, tokens, smc"):
        draw(members, method="tokenwise")
    with pytest.raises(ConfigError, match="mixture draws from a composition that is arithmetic.*; use one of rejection"):
        draw(members, method="mixture")
    with pytest.raises(ReferenceSetError, match="different tokenizers; use rejection"):
        draw(replace(members, one_tokenizer=False))
    with pytest.raises(ConfigError, match="temperature is 0.5"):
        draw_composed(members, [PROMPT], 1, SamplingParameters(2, temperature=0.5), seed=0, method="tokens")
    for wrong in ({"n": 0}, {"batch_size": 0}, {"budget": 0}):
        with pytest.raises(ConfigError, match="at least 1 of each"):
            draw(members, **wrong)
    with pytest.raises(ConfigError, match="2 rows of weights for 1 prompts"):
        draw(members, weights=[None, None])
    with pytest.raises(ReferenceSetError, match="not on the simplex"):
        draw(members, weights=[(0.5, 0.1, 0.1)])
    with pytest.raises(ReferenceSetError, match="reference 2 has weight for a prompt, but is not loaded"):
        draw(replace(members, members=(*members.members[:2], None)))
    with pytest.raises(DataError, match="prompt 2: has .* tokens for .*, with 3 new ones more than the context of 256"):
        draw(members, ["a", "b" * 250])
