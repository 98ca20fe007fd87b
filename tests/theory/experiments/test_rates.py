"""The rates: what is measured is near what the theory says, from few replicates, and the same for the same seed."""

from __future__ import annotations

import math

import pytest
import torch

from polyref.theory.bandit import FiniteBandit
from polyref.theory.experiments import EXPERIMENTS, _rates
from polyref.theory.results import ExperimentResult, to_dict

REPLICATES = 40


@pytest.fixture(scope="module")
def results() -> dict[str, ExperimentResult]:
    return {name: EXPERIMENTS[name](REPLICATES, seed=3) for name in ("reverse-gap", "forward-gap", "unregularised-gap")}


def test_both_regularised_gaps_fall_as_one_over_n(results: dict[str, ExperimentResult]) -> None:
    for name, claimed, agreement in (("reverse-gap", -1.0, "agrees"), ("forward-gap", -0.5, "beats the claim")):
        slope = results[name].slopes[0]
        assert slope.claimed == claimed and slope.low < slope.slope < slope.high
        assert -1.1 < slope.slope < -0.92 and results[name].agreement == agreement


def test_the_unregularised_gap_falls_as_one_over_the_root_of_n_and_is_negative_half_the_time(
    results: dict[str, ExperimentResult],
) -> None:
    result = results["unregularised-gap"]
    assert -0.6 < result.slopes[0].slope < -0.42 and result.agreement == "agrees"
    assert 0.3 < float(result.table.rows[-1][-1]) < 0.7  # type: ignore[arg-type]


def test_the_finding_says_what_was_measured(results: dict[str, ExperimentResult]) -> None:
    for result in results.values():
        assert f"{result.slopes[0].slope:.2f} [{result.slopes[0].low:.2f}, {result.slopes[0].high:.2f}]" in result.finding


def test_constants_for_the_planner_rise_with_confidence(results: dict[str, ExperimentResult]) -> None:
    for name in ("reverse-gap", "forward-gap"):
        values = [one.value for one in results[name].measured]
        assert len(values) == 4 and 0 < values[0] < values[1] < values[2] < values[3] < 10


def test_one_seed_gives_one_result(results: dict[str, ExperimentResult]) -> None:
    again = to_dict(EXPERIMENTS["reverse-gap"](REPLICATES, seed=3))
    assert again == to_dict(results["reverse-gap"]) != to_dict(EXPERIMENTS["reverse-gap"](REPLICATES, seed=4))


def test_the_ball_holds_the_truth_and_data_only_grow() -> None:
    """The measure sees one problem at all sizes, and estimates that come nearer to its rewards."""
    distances = []

    def distance(rewards: torch.Tensor, bandit: FiniteBandit) -> torch.Tensor:
        centred = bandit.rewards - bandit.rewards.mean(-1, keepdim=True)
        assert (centred.norm(dim=-1) < _rates.RADIUS).all()
        distances.append((rewards - centred).norm(dim=(-2, -1)))
        return distances[-1]

    rates = _rates.measure_over_sizes(distance, lambda bandit: bandit.rewards.sum((-2, -1)), 30, 0, lambda done, total: None)
    assert rates.values.shape == (len(_rates.SIZES), 30) and rates.constants.shape == (30,)
    assert rates.values[-1].mean() < rates.values[0].mean() / math.sqrt(_rates.SIZES[-1] / _rates.SIZES[0]) * 1.5
