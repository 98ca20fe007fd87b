"""The experiments on coverage, pessimism, exploration, settings and steps: small runs repeat and say what they found."""

from __future__ import annotations

import pytest
import torch

from polyref.theory.experiments import EXPERIMENTS, _linear, _words, multistep
from polyref.theory.experiments.coverage import first_order
from polyref.theory.experiments.pessimism import _over_sizes
from polyref.theory.preferences import pair_law
from polyref.theory.results import Cell, Estimate, ExperimentResult, agreement_of, from_dict, to_dict
from polyref.theory.solutions import reverse_optimum, solve_reverse_kl
from polyref.theory.values import reverse_gap


def value(cell: Cell) -> float:
    assert isinstance(cell, Estimate)
    return cell.value


@pytest.fixture(scope="module")
def pessimism() -> ExperimentResult:
    return EXPERIMENTS["pessimism"](60, seed=1)


def test_pessimism_pays_where_only_the_optimum_is_covered(pessimism: ExperimentResult) -> None:
    assert pessimism.agreement == "agrees"
    ratios = {
        row[0]: [cell.value for cell in row[-2:] if isinstance(cell, Estimate)] for row in pessimism.table.rows if row[1] == 200
    }
    assert max(ratios["bad coverage, the optimum covered"]) < 0.9
    assert min(ratios["bad coverage of the optimum"]) > 0.95


def test_the_joint_ratio_is_the_mean_of_the_ratios_and_the_sentence_counts_the_table(pessimism: ExperimentResult) -> None:
    generator = torch.Generator().manual_seed(0)
    gaps, greedy = (torch.rand(30, 4, generator=generator, dtype=torch.float64) + level for level in (0.0, 2.0))
    one = _over_sizes(gaps, greedy)
    assert one.value == pytest.approx(float((gaps.mean(0) / greedy.mean(0)).mean())) and one.low < one.value < one.high
    rows = [row for row in pessimism.table.rows if row[0] == "bad coverage, the optimum covered"]
    ratios = [cell for row in rows for cell in row[-2:] if isinstance(cell, Estimate)]
    sides = [_words.side(ratio) for ratio in ratios]
    counted, *_ = pessimism.notes
    assert f"Of {len(ratios)} comparisons where the optimum is covered" in counted
    assert f"smaller than the greedy one in {sides.count(-1)} and larger in {sides.count(1)} beyond" in counted
    for column in (-2, -1):
        assert f"{sum(value(row[column]) for row in rows) / len(rows):.2f} [" in pessimism.finding


def test_a_worse_covered_optimum_costs_more_as_first_order_theory_foretells() -> None:
    first, again, other = (EXPERIMENTS["coverage"](20, seed=seed) for seed in (3, 3, 4))
    assert to_dict(first) == to_dict(again) == to_dict(from_dict(to_dict(first)))
    assert to_dict(first) != to_dict(other)
    for result in (first, other):
        gaps, theory = ([value(row[column]) for row in result.table.rows] for column in (3, 4))
        assert gaps[-1] > 3 * gaps[0] and all(0.4 < gap / told < 2.5 for gap, told in zip(gaps, theory, strict=True))
        assert result.agreement == agreement_of(result.slopes[0]) in ("agrees", "beats the claim")
        assert f"{_words.shown(result.slopes[0])} from" in result.finding
        assert "First-order theory foretells n times the gap" in result.notes[0]
        assert ("as claimed (to 0.05)" in result.finding) == (result.agreement == "agrees")


@pytest.mark.slow
def test_an_enhancer_learns_and_the_sentence_is_the_table() -> None:
    result = EXPERIMENTS["online"](20, seed=2)
    assert to_dict(from_dict(to_dict(result))) == to_dict(result)
    agents = {row[0]: row for row in result.table.rows if row[1] == 25}
    main, greedy, random = (agents[name] for name in ("enhancer, c = 3", "greedy", "random pair"))
    assert value(main[3]) < value(greedy[3]) and value(main[4]) < value(random[4])
    for column, note in ((3, result.notes[0]), (4, result.notes[1])):
        assert f"greedy: {value(main[column]) / value(greedy[column]):.2f} [" in note
    sizes = {row[1]: row for row in result.table.rows[-3:]}
    assert value(sizes[250][3]) > value(sizes[10][3])
    assert f"for {value(sizes[250][3]) / value(sizes[10][3]):.2f} [" in result.finding
    assert f"at {value(sizes[250][2]) / value(sizes[10][2]):.2f} [" in result.finding
    assert result.agreement == agreement_of(result.slopes[0]) and _words.shown(result.slopes[0]) in result.finding


@pytest.mark.slow
def test_bad_offline_data_fall_behind_and_hybrid_learning_mends_them() -> None:
    result = EXPERIMENTS["settings"](20, seed=2)
    assert to_dict(from_dict(to_dict(result))) == to_dict(result) and result.agreement == "agrees"
    rows = {row[:2]: row for row in result.table.rows}
    bad, online = "bad offline data", value(rows["none", "online"][2])
    assert value(rows[bad, "offline, greedy"][2]) > 2 * max(online, value(rows[bad, "hybrid"][2]))
    for key, row in rows.items():
        if isinstance(row[3], Estimate):
            assert row[3].value == pytest.approx(value(row[2]) / online)
            assert f"{key[1]} {_words.told(row[3])}" in result.notes[0]
    assert f"{_words.told(rows[bad, 'offline, greedy'][3])} times the gap of online" in result.finding  # type: ignore[arg-type]


@pytest.mark.slow
def test_steps_hold_the_floor_pay_where_good_is_rare_and_imitation_adds_errors_up() -> None:
    result = EXPERIMENTS["multistep"](20, seed=2)
    assert to_dict(from_dict(to_dict(result))) == to_dict(result)
    assert result.agreement == "agrees" and "floor holds in every step" in result.finding
    proposals: dict[str, list[float]] = {}
    for kind, _, exact, check, least, floor, worst in result.table.rows:
        assert value(least) >= float(floor) > 0 and value(exact) <= float(worst)  # type: ignore[arg-type]
        assert check is None or abs(value(check) - 1) < 0.1
        proposals.setdefault(str(kind), []).append(value(exact))
    for kind, numbers in proposals.items():
        saved = numbers[0] / min(numbers)
        assert saved > (1e4 if kind == "rare" else 1.5)
        assert f"{saved:,.0f} [" in result.finding or f"{saved:,.3g} [" in result.finding
        assert f"the proposals of {multistep.STEPS[numbers.index(min(numbers))]} (" in result.finding
    anchored, imitated, _ = result.slopes
    assert abs(anchored.slope) < 0.3 and 0.7 < imitated.slope < 1.5
    assert all(_words.shown(fit) in result.notes[1] for fit in result.slopes)


def test_each_kind_of_problem_has_a_floor_of_its_own() -> None:
    drawn = multistep._chunk(torch.Generator().manual_seed(0), 1)
    for kind in multistep.RARITY:
        assert (drawn[f"{kind}/least"] >= drawn[f"{kind}/floor"] - 1e-12).all()
        assert drawn[f"{kind}/floor"].shape == (1, len(multistep.STEPS))


def test_first_order_theory_is_the_expected_gap_of_small_normal_errors() -> None:
    """Errors drawn from the inverse information, by hand for one context, have the mean gap that the formula foretells."""
    generator = torch.Generator().manual_seed(0)
    bandit = _linear.problems(generator, 1)
    law, optimum = pair_law(bandit.contexts, bandit.mixture), reverse_optimum(bandit)
    size, draws = 1e6, 20_000
    errors = torch.empty(draws, *bandit.rewards.shape[1:], dtype=torch.float64)
    for x in range(bandit.rewards.shape[1]):
        information = torch.zeros(8, 8, dtype=torch.float64)
        for i in range(8):
            for j in range(8):
                step = torch.zeros(8, dtype=torch.float64)
                step[i], step[j] = (0, 0) if i == j else (1, -1)
                p = torch.sigmoid(bandit.rewards[0, x, i] - bandit.rewards[0, x, j])
                information += size * law[0, x, i, j] * p * (1 - p) * torch.outer(step, step)
        values, vectors = torch.linalg.eigh(information)
        normal = torch.randn(draws, 7, generator=generator, dtype=torch.float64)
        errors[:, x] = (normal / values[1:].sqrt()) @ vectors[:, 1:].T
    policies = solve_reverse_kl(bandit.rewards + errors, bandit.geometric, bandit.beta)
    gaps = size * reverse_gap(policies, bandit)
    spread = float(gaps.std()) / draws**0.5
    assert float(gaps.mean()) == pytest.approx(float(first_order(bandit, law, optimum)[0]), abs=4 * spread, rel=0.01)
