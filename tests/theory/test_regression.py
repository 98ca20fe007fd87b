"""Slopes and intervals against populations whose rate is known, numpy's own fits, and awkward data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from polyref.errors import ConfigError
from polyref.theory import regression
from polyref.theory.regression import Statistic, estimates, fit_slope, mean, quantile, ratio, rms

SIZES = np.array([100.0, 200.0, 400.0, 800.0, 1600.0, 3200.0])


def gamma_runs(seed: int, slope: float, replicates: int, *, shared: bool) -> np.ndarray:
    """Runs of mean 3 n^slope; shared ones keep their luck from size to size."""
    rng = np.random.default_rng(seed)
    noise = rng.gamma(2.0, 0.5, size=(1 if shared else len(SIZES), replicates))
    return 3 * SIZES[:, None] ** slope * noise


@pytest.mark.parametrize("slope", [-1.0, -0.5, 0.5])
@pytest.mark.parametrize("statistic", [mean, rms, quantile(0.9)], ids=lambda s: s.name)
def test_a_known_rate_is_found_and_its_interval_is_small(slope: float, statistic: Statistic) -> None:
    fit = fit_slope(SIZES, gamma_runs(0, slope, 2000, shared=False), statistic, shared=False, claimed=slope, name="runs")
    assert fit.low <= slope <= fit.high and fit.high - fit.low < 0.1 and abs(fit.slope - slope) < 0.05
    assert (fit.name, fit.statistic, fit.claimed, fit.used, fit.note) == ("runs", statistic.name, slope, tuple(SIZES), "")


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    hits = [
        fit.low <= -1 <= fit.high
        for seed in range(200)
        for fit in [fit_slope(SIZES, gamma_runs(seed, -1.0, 100, shared=False), shared=False, resamples=200, seed=seed)]
    ]
    assert 0.88 <= np.mean(hits) <= 0.99


def test_shared_replicates_know_that_luck_is_shared() -> None:
    runs = gamma_runs(1, -1.0, 300, shared=True)
    together, apart = fit_slope(SIZES, runs, shared=True), fit_slope(SIZES, runs, shared=False)
    assert together.high - together.low < 1e-9 and abs(together.slope + 1) < 1e-9
    assert apart.high - apart.low > 0.02


def test_weights_follow_the_precision_of_each_point() -> None:
    rng = np.random.default_rng(3)
    spread = np.array([0.02, 0.02, 0.02, 0.02, 0.02, 3.0])
    runs = SIZES[:, None] ** -1.0 * np.exp(rng.normal(size=(6, 400)) * spread[:, None])
    fit = fit_slope(SIZES, runs, shared=False)
    logs = np.log(runs.mean(1))
    weights = 1 / np.array([np.var(np.log(rng.choice(row, size=(400, 400)).mean(1))) for row in runs])
    by_numpy = np.polyfit(np.log(SIZES), logs, 1, w=np.sqrt(weights))
    assert fit.slope == pytest.approx(by_numpy[0], abs=2e-3) and fit.intercept == pytest.approx(by_numpy[1], abs=2e-2)
    unweighted = np.polyfit(np.log(SIZES), logs, 1)[0]
    assert abs(fit.slope + 1) < 0.01 < abs(unweighted + 1)


def test_points_before_the_knee_are_left_out() -> None:
    rng = np.random.default_rng(4)
    level = 1 / (1 + (300 / SIZES) ** 4) / SIZES
    runs = level[:, None] * rng.gamma(20.0, 0.05, size=(6, 3000))
    all_points, chosen = fit_slope(SIZES, runs, shared=False), fit_slope(SIZES, runs, shared=False, drop=None)
    by_hand = fit_slope(SIZES, runs, shared=False, drop=len(SIZES) - len(chosen.used))
    assert abs(all_points.slope + 1) > 0.05 > abs(chosen.slope + 1)
    assert chosen.used == by_hand.used and len(chosen.used) >= 3 and chosen.note.endswith("left out")
    assert by_hand.slope == pytest.approx(chosen.slope, abs=0.01)
    straight = fit_slope(SIZES, gamma_runs(5, -1.0, 500, shared=False), shared=False, drop=None)
    assert straight.used == tuple(SIZES)


def test_each_resample_chooses_its_knee_as_the_data_do() -> None:
    """A resample that is the data itself chooses as they do; the interval is of lines from several knees, so it is wider."""
    rng = np.random.default_rng(1)
    runs = (1 + 150 / SIZES)[:, None] / SIZES[:, None] * rng.gamma(2.0, 0.5, size=(6, 200))
    drawn = np.log(regression._resampled(runs, mean, False, 400, 0))
    logs, x = np.log(runs.mean(1)), np.log(SIZES)
    knee, knees = regression._knees(x, logs, np.column_stack([drawn, logs]), np.ones(6), 3)
    assert knees[-1] == knee and len(np.unique(knees)) > 1 and knees.max() <= 3
    chosen = fit_slope(SIZES, runs, shared=False, drop=None)
    given = fit_slope(SIZES, runs, shared=False, drop=len(SIZES) - len(chosen.used))
    assert given.slope == pytest.approx(chosen.slope, abs=0.02) and chosen.high - chosen.low > 1.1 * (given.high - given.low)


def test_signed_quantities() -> None:
    rng = np.random.default_rng(6)
    signed = rng.normal(size=(6, 500)) * SIZES[:, None] ** -0.5
    nothing = fit_slope(SIZES, signed)
    assert np.isnan([nothing.slope, nothing.low, nothing.high]).all() and "holds zero" in nothing.note
    size = fit_slope(SIZES, signed, rms, shared=False)
    assert size.low <= -0.5 <= size.high and not size.note
    positive = gamma_runs(7, -1.0, 500, shared=False)
    upright, negative = fit_slope(SIZES, positive, shared=False), fit_slope(SIZES, -positive, shared=False)
    assert negative.note == "of minus the statistic" and replace(negative, note="") == upright
    turning = gamma_runs(8, -1.0, 500, shared=False) * np.array([1, 1, 1, -1, -1, -1])[:, None]
    assert np.isnan(fit_slope(SIZES, turning).slope) and "sign changes" in fit_slope(SIZES, turning).note
    assert np.isnan(fit_slope(SIZES, np.zeros((6, 10))).slope)


def test_replicates_that_agree_exactly_do_no_harm() -> None:
    fit = fit_slope(SIZES, np.repeat(SIZES[:, None] ** -2.0, 5, axis=1))
    assert fit.slope == pytest.approx(-2) and fit.low == pytest.approx(-2) == fit.high


def test_estimates_and_ratios() -> None:
    runs = torch.from_numpy(gamma_runs(9, -1.0, 4000, shared=False))
    found = estimates(runs, shared=False)
    error = runs.numpy().std(1) / np.sqrt(4000)
    np.testing.assert_allclose(found.high - found.low, 2 * 1.96 * error, rtol=0.15)
    assert ((found.low < found.value) & (found.value < found.high)).all()
    half = ratio(runs, 2 * runs)
    np.testing.assert_allclose([half.value, half.low, half.high], 0.5)
    apart = ratio(runs[:, :1000], 2 * runs[:, 1000:], paired=False)
    np.testing.assert_allclose(apart.high - apart.low, 2 * 1.96 * 0.5 * np.sqrt(0.5 / 1000 + 0.5 / 3000), rtol=0.2)
    assert ((apart.low < 0.5) & (apart.high > 0.5)).sum() >= 4


def test_large_data_are_resampled_in_pieces_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = gamma_runs(10, -1.0, 50, shared=False)
    monkeypatch.setattr(regression, "_AT_ONCE", 1000)
    pieces = fit_slope(SIZES, runs)
    assert pieces.low < pieces.slope < pieces.high
    assert fit_slope(SIZES, runs) == pieces


@pytest.mark.parametrize(
    ("sizes", "values", "what"),
    [
        ([1.0, 2.0], np.ones((2, 1)), "replicates of shape"),
        ([1.0, 2.0], [[1.0, 2.0], [np.nan, 1.0]], "value nan of replicate 0 at size 1"),
        ([1.0, -2.0], np.ones((2, 3)), "sizes"),
        ([1.0, 1.0], np.ones((2, 3)), "sizes"),
        ([1.0, 2.0, 3.0], np.ones((2, 3)), "sizes"),
        ([1.0], np.ones((1, 3)), "drop is 0 of 1 points"),
    ],
)
def test_bad_data_are_refused(sizes: list[float], values: object, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        fit_slope(sizes, values)  # type: ignore[arg-type]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="quantile level is 1.5"):
        quantile(1.5)
    with pytest.raises(ConfigError, match="drop is 5 of 6"):
        fit_slope(SIZES, np.ones((6, 3)), drop=5)
    with pytest.raises(ConfigError, match="no ratio"):
        ratio(np.ones((2, 3)), np.ones((2, 4)))
