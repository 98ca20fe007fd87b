"""The temperature is the minimiser it claims to be, and a model that tells the truth lies on the diagonal."""

from __future__ import annotations

import math

import pytest
import torch

from polyref.errors import ConfigError, DataError
from polyref.objectives.calibration import calibration_error, fit_temperature, negative_log_likelihood, reliability


def pairs(n: int = 4000, temperature: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Reward differences `temperature` times too large, and labels drawn at the true ones."""
    generator = torch.Generator().manual_seed(seed)
    h = 1.5 * torch.randn(n, generator=generator, dtype=torch.float64)
    z = torch.bernoulli(torch.sigmoid(h), generator=generator)
    return temperature * h, z


@pytest.mark.parametrize("temperature", [0.25, 1.0, 8.0])
def test_the_temperature_of_labels_is_found(temperature: float) -> None:
    h, z = pairs(temperature=temperature)
    found = fit_temperature(h, z)
    assert found == pytest.approx(temperature, rel=0.1)
    best = negative_log_likelihood(h / found, z)
    for factor in (0.5, 0.9, 0.999, 1.001, 1.1, 2.0):
        assert best < negative_log_likelihood(h / (found * factor), z)
    assert fit_temperature(-h, 1 - z) == pytest.approx(found, rel=1e-9), "the order of a pair does not matter"
    p = torch.sigmoid(h / temperature)
    assert fit_temperature(h, p) == pytest.approx(temperature, rel=1e-6), "soft labels that are the truth"


def test_where_no_temperature_is_best_there_is_none() -> None:
    h = torch.tensor([0.5, 2.0, -1.0])
    assert fit_temperature(h, (h > 0).float()) is None, "every label as ranked: ever colder is ever better"
    assert fit_temperature(h, (h < 0).float()) is None, "ranked against every label: never better than chance"
    assert fit_temperature(torch.zeros(3), torch.tensor([0.0, 1.0, 0.5])) is None
    assert fit_temperature(h, torch.full((3,), 0.5)) is None


def test_extreme_differences_stay_finite() -> None:
    h, p = torch.tensor([1e4, 1e4, -1e4, 1e-3]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    found = fit_temperature(h, p)
    assert found is not None and math.isfinite(found)
    assert math.isfinite(negative_log_likelihood(h / found, p))


@pytest.mark.parametrize("unit", [5e-324, 1e-310, 1e-30, 1.0, 1e30, 1e300])
def test_the_unit_of_the_rewards_is_that_of_the_temperature(unit: float) -> None:
    h, p = torch.tensor([1.0, 2.0, -1.0, 3.0], dtype=torch.float64), torch.tensor([1.0, 0.0, 0.0, 1.0])
    found, usual = fit_temperature(h * unit, p), fit_temperature(h, p)
    assert found is not None and usual is not None
    assert found / unit == pytest.approx(usual, rel=1e-9 if unit > 1e-300 else 0.5)  # what denormal numbers can tell
    assert math.isfinite(negative_log_likelihood(h * unit / found, p))


def test_equal_barely_ranked_and_unlike_differences_have_a_temperature_or_none() -> None:
    three, one = torch.full((4,), 3.0), torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert fit_temperature(three, one) == pytest.approx(3 / math.log(3)), "s(3/T) = 3/4"
    assert fit_temperature(three, torch.ones(4)) is None and fit_temperature(three, torch.full((4,), 0.5)) is None
    barely = torch.tensor([0.5 + 2e-16] * 4, dtype=torch.float64)
    assert fit_temperature(three, barely) == pytest.approx(3 / 8e-16, rel=0.5), "no root is taken for 0"
    mixed = torch.tensor([1.0, 1e-320], dtype=torch.float64)
    found = fit_temperature(mixed, torch.tensor([1.0, 0.0]))
    assert found is not None and 0 < found < 0.01
    assert fit_temperature(mixed, torch.ones(2)) is None


def test_the_truth_lies_on_the_diagonal_and_too_large_rewards_below_it() -> None:
    h, z = pairs(20000)
    bins = reliability(h, z, seed=0)
    assert sum(each.count for each in bins) == 20000 and len(bins) == 10
    assert all(each.accuracy.low - 0.01 < each.confidence < each.accuracy.high + 0.01 for each in bins)
    sure = reliability(4 * h, z, seed=0)
    assert sure[-1].confidence > 0.98 > 0.95 > sure[-1].accuracy.mean
    assert calibration_error(bins) < 0.02 < 0.1 < calibration_error(sure)


def test_bins_count_pairs_once_whichever_way_they_are_written_and_keep_soft_labels() -> None:
    h, p = torch.tensor([0.3, -0.3, 3.0]), torch.tensor([0.8, 0.2, 0.9])
    low, high = reliability(h, p, ["a", "a", "b"], bins=2, seed=0)
    assert (low.count, high.count) == (2, 1)
    assert low.accuracy.mean == pytest.approx(0.8) and high.accuracy.mean == pytest.approx(0.9)
    assert math.isnan(low.accuracy.low), "one prompt gives no interval"
    assert low.confidence == pytest.approx(float(torch.sigmoid(torch.tensor(0.3))))


def test_what_is_no_pair_is_refused() -> None:
    for h, p in (([], []), ([math.nan], [1.0]), ([1.0], [1.0, 0.0]), ([1.0], [1.5])):
        with pytest.raises(DataError):
            fit_temperature(torch.tensor(h), torch.tensor(p))
    with pytest.raises(ConfigError, match="bins is 0"):
        reliability(torch.tensor([1.0]), torch.tensor([1.0]), bins=0, seed=0)
