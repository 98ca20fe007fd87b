"""Plans answer with what the bounds and the lab's constants say, label each, and refuse what cannot be planned."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from polyref.errors import ConfigError
from polyref.theory import bounds
from polyref.theory.bandit import FiniteBandit
from polyref.theory.coverage import density_coverage
from polyref.theory.estimators import fit_tabular
from polyref.theory.experiments import EXPERIMENTS
from polyref.theory.planner import (
    CONFIDENCES,
    SOURCES,
    Plan,
    answers,
    constants_of,
    load_constants,
    measured_constants,
)
from polyref.theory.preferences import bradley_terry, pair_law
from polyref.theory.results import ExperimentResult, Measured, Table
from polyref.theory.sampling import draw_wins
from polyref.theory.solutions import reverse_optimum, solve_reverse_kl
from polyref.theory.values import reverse_gap

SETTINGS = {"replicates": 9, "seed": 1, "pairs": [1000, 2000], "reward_range": 2.0}


def constants(*measured: Measured, name: str = "reverse-gap") -> dict[str, Any]:
    result = ExperimentResult(name, "t", "q", "c", "f", "agrees", (), Table((), ()), settings=SETTINGS, measured=measured)
    return load_constants(json.dumps(constants_of([result], command="polyref lab", version="0")))


def test_the_bound_is_met_at_its_number_of_pairs_and_not_before() -> None:
    plan = Plan(gap=0.01, beta=0.1, d=10, coverage=4.0)
    fast, slow, _ = answers(plan)
    assert [fast.kind, slow.kind] == ["bound", "bound"] and fast.pairs and slow.pairs
    for pairs, held in ((fast.pairs, True), (fast.pairs - 1, False)):
        error = bounds.linear_error(pairs, 10, 0.05, 1.0)
        assert (bounds.reverse_gap_bound(error, 4.0, 0.1) <= 0.01) is held
    assert "[MR]" in fast.why and "[IT]" in slow.why and "C = 4" in fast.why


def test_what_makes_more_pairs_necessary() -> None:
    def pairs(**changes: Any) -> int:
        return answers(Plan(**({"gap": 0.01, "beta": 0.1, "class_size": 100, "coverage": 4.0} | changes)))[0].pairs or 0

    base = pairs()
    for harder in ({"gap": 0.001}, {"beta": 0.05}, {"class_size": 1e6}, {"coverage": 8}, {"confidence": 0.999}):
        assert pairs(**harder) > base, harder
    assert pairs(reward_range=2.0) > base
    assert pairs(beta=0.05) == pytest.approx(2 * base, rel=1e-3)
    assert pairs(references=3) == base
    assert pairs(references=3, coverage=[4.0, math.inf, math.inf]) == pytest.approx(3 * base, rel=1e-3)
    unknown = pairs(beta=0.5, reward_range=1.5, coverage=None)
    assert unknown == pytest.approx(math.exp(1.5 / 0.5) / 4 * pairs(beta=0.5, reward_range=1.5), rel=1e-4)
    assert pairs(kl="forward", gap=0.001) == pytest.approx(100 * pairs(kl="forward"), rel=1e-3)


def test_the_measured_constant_is_used_as_it_was_measured() -> None:
    known = constants(Measured("reverse-gap", 0.9, 0.5, 0.4, 0.6), Measured("reverse-gap", 0.99, 2.0, 1.8, 2.2))
    plan = Plan(gap=0.01, beta=0.1, d=10, coverage=4.0, confidence=0.9)
    at = answers(plan, known)[-1]
    assert (at.kind, at.pairs, at.low, at.high) == ("extrapolated", 20_000, 16_000, 24_000)
    assert "90% of the runs of reverse-gap (9 replicates, reward range 2, seed 1)" in at.why and "0.5 [0.4, 0.6]" in at.why
    assert "fewer pairs" not in at.why and "wider" not in at.why and "features stand in" in at.why
    table = answers(Plan(gap=0.01, beta=0.1, contexts=5, actions=3, coverage=4.0, confidence=0.9), known)[-1]
    assert (table.pairs, table.low, table.high) == (at.pairs, at.low, at.high) and "stand in" not in table.why
    easy = answers(Plan(gap=1.0, beta=0.1, d=10, coverage=4.0, confidence=0.9, reward_range=3.0), known)[-1]
    assert easy.pairs == 200 and "fewer pairs than the lab's least, 1,000" in easy.why and "wider reward range" in easy.why
    above = answers(Plan(gap=0.01, beta=0.1, d=10, coverage=4.0, confidence=0.95), known)[-1]
    assert above.pairs == 80_000
    beyond = answers(Plan(gap=0.01, beta=0.1, d=10, coverage=4.0, confidence=0.999), known)[-1]
    assert beyond.pairs is None and "measured up to confidence 0.99, not 0.999" in beyond.why
    classes = answers(Plan(gap=0.01, beta=0.1, class_size=math.e**10, coverage=4.0, confidence=0.9), known)[-1]
    assert classes.pairs == pytest.approx(20_000, abs=1) and "log size stands in" in classes.why
    forward = answers(Plan(gap=0.01, beta=0.1, d=10, coverage=4.0, kl="forward"), known)[-1]
    assert forward.pairs is None and "not measured; polyref lab forward-gap" in forward.why


LAB = {"contexts": 5, "actions": 5, "references": 3, "reward_range": 2.0, "beta": 0.5}
HERE = LAB | {"gap": 0.05, "coverage": 4.0}


def test_measured_is_what_the_lab_measured_and_all_else_is_extrapolated() -> None:
    known = load_constants()
    settings = known["experiments"]["reverse-gap"]["settings"]
    assert {name: settings[name] for name in LAB} == LAB
    here = answers(Plan(**HERE), known)[-1]
    assert (here.kind, here.label) == ("measured", "measured, 1/n") and "extrapolated" not in here.why
    for told, changes in {
        "contexts 6": {"contexts": 6},
        "actions 4": {"actions": 4},
        "references 1": {"references": 1},
        "beta 0.4": {"beta": 0.4},
        "reward range 1": {"reward_range": 1.0},
        "reward range 3; a wider reward range than the lab's 2, which needs more": {"reward_range": 3.0},
        "fewer pairs than the lab's least, 500": {"gap": 1.0},
        "more pairs than the lab's most, 128,000": {"gap": 1e-5},
        "contexts 2, beta 1": {"contexts": 2, "beta": 1.0},
        "a linear reward, whose features stand in for d": {"contexts": None, "actions": None, "d": 20},
        "a finite class, whose log size stands in for d": {"contexts": None, "actions": None, "class_size": 1e6},
    }.items():
        there = answers(Plan(**(HERE | changes)), known)[-1]
        assert (there.kind, there.label) == ("extrapolated", "extrapolated, 1/n"), told
        assert f"; extrapolated to {told}" in there.why
        assert there.pairs and there.low and there.high


def test_a_bound_says_whose_rate_it_has_and_whose_constants() -> None:
    fast, slow, _ = answers(Plan(**HERE))
    forward = answers(Plan(**HERE, kl="forward"))[0]
    for bound, paper in ((fast, "[MR]"), (slow, "[IT]"), (forward, "[MR]")):
        assert bound.kind == "bound" and f"rate of {paper}, constants derived here, with probability 0.95" in bound.why


def test_constants_are_quantiles_of_scaled_gaps() -> None:
    generator = torch.Generator().manual_seed(0)
    exponential = torch.empty(20_000, dtype=torch.float64).exponential_(generator=generator)
    gaps = exponential * 3 * 7 / (0.5 * 1000)
    found = measured_constants("reverse-gap", gaps, pairs=1000, beta=0.5, dimension=3, coverage=torch.full((20_000,), 7.0))
    assert tuple(one.confidence for one in found) == CONFIDENCES
    for one in found:
        assert one.low < one.value < one.high and one.value == pytest.approx(-math.log(1 - one.confidence), rel=0.05)
    again = measured_constants("reverse-gap", gaps, pairs=1000, beta=0.5, dimension=3, coverage=7.0)
    assert np.allclose([one.value for one in again], [one.value for one in found])


def test_the_packaged_constants_are_those_that_the_code_reads() -> None:
    packaged = load_constants()
    assert packaged["command"].startswith("polyref lab ") and "--constants" in packaged["command"]
    assert set(packaged["experiments"]) <= set(SOURCES.values()) <= set(EXPERIMENTS)
    for name, entry in packaged["experiments"].items():
        assert {"replicates", "seed"} <= entry["settings"].keys()
        found = [Measured(**one) for one in entry["constants"]]
        assert found and all(one.name == name and 0 < one.low <= one.value <= one.high for one in found)
        values = [one.value for one in sorted(found, key=lambda one: one.confidence)]
        assert values == sorted(values)


NUMBERS = {"confidence": 0.9, "value": 0.5, "low": 0.4, "high": 0.6}


def entry(settings: Any = SETTINGS, **numbers: Any) -> str:
    """A file of one constant, with `numbers` changed."""
    found = {"settings": settings, "constants": [{"name": "a", **NUMBERS, **numbers}]}
    return json.dumps({"experiments": {"reverse-gap": found}})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"experiments": 3}',
        '{"experiments": {"a": {"constants": [{}]}}}',
        json.dumps({"experiments": {"reverse-gap": {"constants": [{"name": "a", **NUMBERS}]}}}),
        json.dumps({"experiments": {"reverse-gap": {"settings": SETTINGS}}}),
        json.dumps({"experiments": {"reverse-gap": {"settings": SETTINGS, "constants": [3]}}}),
        entry({"pairs": [1000]}),
        entry({"reward_range": 2.0}),
        entry(SETTINGS | {"pairs": []}),
        entry(SETTINGS | {"pairs": ["many"]}),
        entry(SETTINGS | {"pairs": 1000}),
        entry(SETTINGS | {"beta": "low"}),
        entry(SETTINGS | {"replicates": 10**400}),
        entry(value="x"),
        entry(value=None),
        entry(value=math.nan),
        entry(value=0.7),
        entry(low=0.0),
        entry(high=math.inf),
        entry(confidence=90),
        entry(more=1),
    ],
)
def test_a_file_of_something_else_is_refused(text: str) -> None:
    assert answers(Plan(0.01, 0.5, 9, confidence=0.9), load_constants(entry()))[-1].pairs
    with pytest.raises(ConfigError, match="^mine.json: holds no measured constants"):
        load_constants(text, where="mine.json")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"gap": 0.0}, "gap is 0"),
        ({"beta": -1.0}, "beta is -1"),
        ({"reward_range": math.nan}, "reward_range is nan"),
        ({"d": None}, "no size, or more"),
        ({"class_size": 3}, "no size, or more"),
        ({"contexts": 3, "actions": 3}, "no size, or more"),
        ({"d": None, "contexts": 3}, "no size, or more"),
        ({"d": None, "contexts": 3, "actions": 1}, "actions is 1"),
        ({"d": None, "contexts": 0, "actions": 2}, "contexts is 0"),
        ({"d": 10**400}, "d is 1000"),
        ({"reward_range": 1000.0}, "more than 10\\^18 pairs"),
        ({"reward_range": 1e300, "beta": 1e300}, "more than 10\\^18 pairs"),
        ({"coverage": None, "references": 2}, "2 references have no coverage constant"),
        ({"d": 0}, "d is 0"),
        ({"d": None, "class_size": 1}, "class_size is 1"),
        ({"references": 0}, "references is 0"),
        ({"confidence": 1.0}, "confidence is 1"),
        ({"kl": "sideways"}, "kl is 'sideways'"),
        ({"coverage": 0.5}, "coverage is 0.5"),
        ({"coverage": [2.0, 3.0]}, "2 coverage constants for 1 references"),
        ({"coverage": math.inf}, "no reference covers"),
        ({"kl": "forward", "coverage": None}, "forward KL has no coverage constant"),
        ({"beta": 1e-5, "coverage": None}, "more than 10\\^18 pairs"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what) as refusal:
        answers(Plan(**({"gap": 0.01, "beta": 0.1, "d": 10, "coverage": 4.0} | changes)))
    assert "\n" not in str(refusal.value)


def test_rewards_that_hardly_differ_need_hardly_any_pairs() -> None:
    found = [answers(Plan(gap=0.01, beta=0.5, d=2, coverage=4.0, reward_range=1e-200, kl=kl)) for kl in ("reverse", "forward")]
    assert all(answer.pairs for answer in sum(found, []))


def test_pairs_of_two_references_under_their_geometric_anchor_need_a_coverage_constant() -> None:
    """Two references that agree on the best and the worst action alone: exp(R/beta) would promise what no run keeps.

    The pairs come from the mixture, which hardly ever shows the actions that the geometric anchor is made of.
    """
    rare, gap, beta = 1e-8, 0.05, 0.5
    first = torch.tensor([1 - 2 * rare, 1e-20, rare, rare], dtype=torch.float64)
    logps = torch.stack([first, first[[1, 0, 2, 3]]], -1).log()[None].log_softmax(-2)
    bandit = FiniteBandit.tabular(torch.tensor([[0.5, 0.5, 1.0, 0.0]]), logps, beta=beta)
    sizes: dict[str, Any] = {"gap": gap, "beta": beta, "contexts": 1, "actions": 4}
    with pytest.raises(ConfigError, match="2 references have no coverage constant"):
        Plan(**sizes, references=2)
    promised = answers(Plan(**sizes, coverage=math.exp(1 / beta)))[0].pairs or 0
    true = float(density_coverage(reverse_optimum(bandit), bandit.mixture))
    limit = math.exp(1 / beta) / float(bandit.log_f.exp())
    assert math.exp(1 / beta) < 1e-6 * true and true <= limit
    kept = answers(Plan(**sizes, coverage=limit, references=2))[0].pairs or 0
    assert kept > 1e5 * promised
    law, preference = pair_law(bandit.contexts, bandit.mixture), bradley_terry(bandit.rewards)
    wins = draw_wins(law, preference, promised, 50, torch.Generator().manual_seed(0))
    fitted = solve_reverse_kl(fit_tabular(wins, radius=1.0), bandit.geometric, beta)
    assert (reverse_gap(fitted, bandit) > gap).double().mean() > 0.9


def test_a_table_gets_the_bound_of_tables() -> None:
    fast, slow, measured = answers(Plan(gap=0.05, beta=0.5, contexts=7, actions=3, coverage=4.0))
    assert fast.pairs and slow.pairs and measured.pairs
    for pairs, held in ((fast.pairs, True), (fast.pairs - 1, False)):
        error = bounds.table_error(pairs, 7, 3, 0.05, 1.0)
        assert (bounds.reverse_gap_bound(error, 4.0, 0.5) <= 0.05) is held
    assert "knows the law of the pairs" in slow.why
