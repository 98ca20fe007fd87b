"""Variance reduction and doubly robust win rates: measured shares agree with the exact prediction, which no run enters."""

from __future__ import annotations

import pytest

from polyref.theory.experiments import EXPERIMENTS
from polyref.theory.experiments.auxiliary_pairs import AUXILIARY
from polyref.theory.experiments.doubly_robust import CASES
from polyref.theory.results import Estimate, ExperimentResult, to_dict


@pytest.fixture(scope="module")
def reduction() -> ExperimentResult:
    return EXPERIMENTS["variance-reduction"](30, seed=1)


def test_what_is_measured_is_what_is_predicted(reduction: ExperimentResult) -> None:
    """Where the estimates have moderate tails: a wrong g may push groups' fits to the ball, where no asymptotics hold."""
    rows = [row for row in reduction.table.rows if row[0] != "groups"]
    assert len(rows) == 4 * 7
    for _, _, error, predicted, _ in rows:
        assert isinstance(error, Estimate) and isinstance(predicted, float)
        width = error.high - error.low
        assert abs(error.value - predicted) < 2 * width + 0.05


def test_a_true_g_helps_where_no_reward_explains_the_labels_and_an_arbitrary_one_hurts(reduction: ExperimentResult) -> None:
    by_name = {row[:2]: row[2] for row in reduction.table.rows}
    true, arbitrary = by_name["intransitive", "true"], by_name["bradley-terry", "arbitrary"]
    assert isinstance(true, Estimate) and isinstance(arbitrary, Estimate)
    assert true.high < 1 < arbitrary.low
    assert "arbitrary" in reduction.notes[0] and f"{true.value:.2f} [" in reduction.finding


def test_one_auxiliary_pair_gains_nothing_and_its_control_coefficient_does() -> None:
    result = EXPERIMENTS["auxiliary-pairs"](60, seed=0)
    m, plain_one, predicted_one, halved, _ = result.table.rows[0]
    assert m == AUXILIARY[0] == 1 and predicted_one == pytest.approx(1, abs=1e-6)
    assert isinstance(plain_one, Estimate) and plain_one.low < 1 < plain_one.high
    assert isinstance(halved, Estimate) and halved.high < 1
    predictions = [[float(row[column]) for row in result.table.rows] for column in (2, 4)]  # type: ignore[arg-type]
    assert all(values == sorted(values, reverse=True) for values in predictions)


def test_the_doubly_robust_rate_needs_one_right_model() -> None:
    result = EXPERIMENTS["doubly-robust"](60, seed=0)
    slopes = {fit.name: fit for fit in result.slopes}
    for case in CASES:
        fit = slopes[f"doubly robust, {case}"]
        assert (-0.62 < fit.slope < -0.4) == (case != "neither right")
    assert slopes["direct, neither right"].slope > -0.2
    assert result.agreement == "agrees"
    assert to_dict(result) == to_dict(EXPERIMENTS["doubly-robust"](60, seed=0))
