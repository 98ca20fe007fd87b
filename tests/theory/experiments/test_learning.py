"""The experiments on coverage, pessimism, exploration, settings and steps: small runs repeat and say what they found."""

from __future__ import annotations

import pytest
import torch

from polyref.theory.experiments import EXPERIMENTS, _linear
from polyref.theory.experiments.coverage import first_order
from polyref.theory.experiments.pessimism import _agreement, _verdict
from polyref.theory.preferences import pair_law
from polyref.theory.results import Estimate, ExperimentResult, from_dict, to_dict
from polyref.theory.solutions import reverse_optimum, solve_reverse_kl
from polyref.theory.values import reverse_gap

BELOW, ABOVE, AROUND = Estimate(0.5, 0.4, 0.6), Estimate(2.0, 1.5, 3.0), Estimate(1.0, 0.9, 1.1)


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


@pytest.mark.parametrize("name", ["coverage", "pessimism"])
def test_a_run_repeats_from_its_seed_and_survives_json(name: str) -> None:
    first, again, other = (EXPERIMENTS[name](4, seed=seed) for seed in (3, 3, 4))
    assert to_dict(first) == to_dict(again) == to_dict(from_dict(to_dict(first)))
    assert to_dict(first) != to_dict(other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["online", "settings", "multistep"])
def test_the_longer_ones_run_and_survive_json(name: str) -> None:
    result = EXPERIMENTS[name](3, seed=2)
    assert to_dict(from_dict(to_dict(result))) == to_dict(result)
    assert result.agreement in ("agrees", "beats the claim", "misses the claim", "no claim")


def test_the_verdict_follows_the_intervals() -> None:
    assert _agreement([BELOW, AROUND]) == "agrees"
    assert _agreement([ABOVE, AROUND]) == "misses the claim"
    assert _agreement([BELOW, ABOVE]) == _agreement([AROUND]) == "no claim"
    assert "smaller gap in 1 of 3" in _verdict([BELOW, ABOVE, AROUND])


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
