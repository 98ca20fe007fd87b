"""Sequential Monte Carlo over independent runs, against enumeration."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from enumerable_lm import END, OnlyAllowed, enumerable, exact_laws, exact_logps, support
from fakes import tiny_llama
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.samplers import smc
from polyref.samplers.composed import draw_composed
from polyref.samplers.composed_values import Drawn
from polyref.samplers.engine import SamplingParameters
from polyref.samplers.members import Members, load_members
from polyref.samplers.smc import log_mean

WEIGHTS, PROMPT, LENGTH, RUNS = (0.5, 0.3, 0.2), "ab", 4, 150


@pytest.fixture(scope="module")
def members(tiny_tokenizer: PreTrainedTokenizerFast) -> Members:
    return enumerable(tiny_tokenizer, 1, 2, 1, weights=WEIGHTS)


@pytest.fixture(scope="module")
def runs(members: Members) -> list[Drawn]:
    """Independent runs: equal prompts have streams of their own."""
    return draw(members, [PROMPT] * RUNS, 24)


@pytest.fixture(scope="module")
def laws(members: Members) -> dict[str, np.ndarray]:
    return exact_laws(members, PROMPT, LENGTH)


def draw(members: Members, prompts: Any, n: int, length: int = LENGTH, **settings: Any) -> list[Drawn]:
    usual: dict[str, Any] = {"seed": 3, "batch_size": 600, "method": "smc"}
    return draw_composed(members, prompts, n, SamplingParameters(length), **usual | settings)


def z(values: list[float], expected: float) -> float:
    return abs(np.mean(values) - expected) / (np.std(values, ddof=1) / math.sqrt(len(values)))


def test_the_estimate_of_the_mass_is_unbiased_and_its_log_biased_low(runs, laws):
    mass = float(laws["mass"])
    assert z([run.mass.mean for run in runs], mass) < 3.3
    logs = [run.log_mass.mean for run in runs]
    assert np.mean(logs) < math.log(mass)
    assert all(run.mass.mean == pytest.approx(math.fsum(math.exp(s.log_weight) for s in run.samples) / 24) for run in runs)
    covered = np.mean([run.mass.low <= mass <= run.mass.high for run in runs])
    assert covered > 0.9, "95% intervals from four islands each"


def test_weighted_sums_have_the_mean_of_the_composition_and_of_no_other_law(runs, laws):
    index = {tokens: place for place, tokens in enumerate(support(LENGTH))}

    def mean(run: Drawn, f: np.ndarray) -> float:
        return math.fsum(math.exp(s.log_weight) * f[index[s.token_ids]] for s in run.samples) / run.proposals

    tests = {
        "length": np.array([len(tokens) for tokens in support(LENGTH)], dtype=float),
        "cut": np.array([tokens[-1] != END for tokens in support(LENGTH)], dtype=float),
        "first": np.array([tokens[0] == 40 for tokens in support(LENGTH)], dtype=float),
    }
    scores = {"geometric": [], "arithmetic": [], "tokens": []}
    for f in tests.values():
        values = [mean(run, f) for run in runs]
        for law, found in scores.items():
            found.append(z(values, float(laws["mass"]) * float(laws[law] @ f)))
    assert max(scores["geometric"]) < 3.3
    assert max(scores["arithmetic"]) > 6 and max(scores["tokens"]) > 6


def test_self_normalised_weights_converge(members, laws):
    (run,) = draw(members, [PROMPT], 2400)
    index = {tokens: place for place, tokens in enumerate(support(LENGTH))}
    found = np.zeros(len(index))
    for sample in run.samples:
        found[index[sample.token_ids]] += math.exp(sample.log_weight) / run.proposals / run.mass.mean
    assert abs(found - laws["geometric"]).sum() / 2 < 0.05 < abs(found - laws["tokens"]).sum() / 2
    assert 1200 < run.ess < 2400 and not run.exact and run.mass.low < laws["mass"] < run.mass.high


def test_particles_that_are_resampled_keep_their_own_past(members):
    (run,) = draw(members, [PROMPT], 60)
    exact = dict(zip(support(LENGTH), exact_logps(members, PROMPT, LENGTH).tolist(), strict=True))
    for sample in run.samples:
        assert sample.logps == pytest.approx(exact[sample.token_ids], abs=1e-9)
    assert {sample.ended for sample in run.samples} == {True, False}
    weights = torch.tensor([sample.log_weight for sample in run.samples])
    assert len(weights.unique()) < len(weights), "some were resampled to one weight"


def test_without_resampling_the_weights_are_the_products_of_all_increments(members, laws, monkeypatch):
    monkeypatch.setattr(smc, "THRESHOLD", 0.0)
    (run,) = draw(members, [PROMPT], 40)
    logps, a = exact_logps(members, PROMPT, LENGTH), torch.tensor(WEIGHTS, dtype=torch.float64)
    increments = np.exp((logps @ a).numpy()) / laws["tokens"]
    index = {tokens: place for place, tokens in enumerate(support(LENGTH))}
    for sample in run.samples:
        assert math.exp(sample.log_weight) == pytest.approx(increments[index[sample.token_ids]])


def test_neither_batch_nor_order_nor_company_changes_particles(members):
    prompts = ["a", "what is this", "a", ({"role": "user", "content": "hi"},)]

    def known(drawn: list[Drawn]) -> Any:
        return [[(s.token_ids, round(s.log_weight, 9)) for s in one.samples] for one in drawn]

    reference = draw(members, prompts, 8, 6)
    for size in (1, 5):
        assert known(draw(members, prompts, 8, 6, batch_size=size)) == known(reference)
    turned = draw(members, prompts[::-1], 8, 6)[::-1]
    assert known(turned)[1] == known(reference)[1] and known(turned)[3] == known(reference)[3]
    assert known(draw(members, prompts[3:], 8, 6)) == known(reference)[3:]
    assert known(reference)[0] != known(reference)[2]


def test_the_budget_sets_the_number_of_particles(members):
    for budget in (11, 12, 47, 48, 100):
        (run,) = draw(members, [PROMPT], 20, budget=budget)
        assert run.calls <= budget
        if budget < 12:
            assert run.samples == () and "does not cover one particle" in run.note and math.isnan(run.mass.mean)
        else:
            assert run.proposals == len(run.samples) >= budget // 12 - 3 and f"{run.proposals} of 20 particles" in run.note
    (run,) = draw(members, [PROMPT], 20)
    assert run.proposals == 20 and not run.note and run.acceptance == 1


def test_references_that_share_nothing_leave_no_particle(tiny_tokenizer):
    models = [OnlyAllowed(tiny_llama(tiny_tokenizer), (token,)) for token in (40, 41)]
    apart = load_members(ReferenceSet(tuple(Reference(model, tokenizer=tiny_tokenizer) for model in models)))
    (run,) = draw(apart, [PROMPT], 8)
    assert run.samples == () and run.mass == (0.0, 0.0, 1.0) and run.ess == 0 and "none of 8 particles is left" in run.note
    assert run.log_mass.mean == -math.inf


def test_the_interval_is_the_spread_among_islands():
    assert log_mean([-1.0]) == (-1.0, -math.inf, 0.0)
    assert log_mean([-2.0, -2.0]) == pytest.approx((-2.0, -2.0, -2.0))
    mean, low, high = log_mean([math.log(value) for value in (0.1, 0.2, 0.3, 0.2)])
    assert math.exp(mean) == pytest.approx(0.2) and mean - low == pytest.approx(high - mean)
    assert mean - low == pytest.approx(3.182 * 0.08165 / 0.2 / 2, rel=1e-3)
    assert log_mean([math.log(0.9), math.log(1.3)])[2] == 0
    assert log_mean([-2000.0, -2001.0])[0] == pytest.approx(-2000 + math.log((1 + math.exp(-1)) / 2)), (
        "far below what exp holds"
    )
