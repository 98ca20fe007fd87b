"""Weights of samples: sizes, means with intervals, resampling, against enumeration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, nbinom

from polyref.errors import ConfigError, DataError
from polyref.samplers.weights import acceptance_rate, effective_size, log_mean, mean_one, systematic

LOG_WEIGHTS = st.lists(st.floats(-700, 700), min_size=1, max_size=30).map(lambda some: torch.tensor(some, dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(LOG_WEIGHTS, st.floats(-1e3, 1e3))
def test_the_effective_size_is_between_one_and_all_whatever_the_scale(log_weights: torch.Tensor, shift: float) -> None:
    size = float(effective_size(log_weights))
    assert 1 - 1e-9 <= size <= len(log_weights) * (1 + 1e-9)
    assert size == pytest.approx(float(effective_size(log_weights + shift)), rel=1e-6)
    assert float(mean_one(log_weights).exp().mean()) == pytest.approx(1)


def test_the_effective_size_of_equal_weights_is_their_number() -> None:
    assert float(effective_size(torch.tensor([3.0, 3.0, -math.inf]))) == pytest.approx(2)
    assert float(effective_size(torch.full((4,), -math.inf))) == 0


@settings(max_examples=25, deadline=None)
@given(LOG_WEIGHTS, st.integers(1, 40), st.floats(0, 1, exclude_max=True))
def test_systematic_resampling_takes_each_as_often_as_its_weight_says(
    log_weights: torch.Tensor, n: int, uniform: float
) -> None:
    counts = torch.bincount(systematic(log_weights, n, uniform), minlength=len(log_weights))
    expected = n * log_weights.softmax(-1)
    assert int(counts.sum()) == n and ((counts - expected).abs() < 1 + 1e-9).all()


def test_systematic_resampling_is_unbiased_and_never_takes_a_weight_of_zero() -> None:
    log_weights = torch.tensor([-math.inf, 0.3, -1.0, -math.inf, 0.0, -math.inf], dtype=torch.float64)
    grid = (np.arange(400) + 0.5) / 400
    counts = torch.stack([torch.bincount(systematic(log_weights, 7, u), minlength=6) for u in grid])
    torch.testing.assert_close(counts.double().mean(0), 7 * log_weights.softmax(-1), atol=5e-3, rtol=0)
    for u in (0.0, math.nextafter(1, 0)):
        assert log_weights[systematic(log_weights, 7, u)].isfinite().all()


@pytest.mark.parametrize("rate", [0.03, 0.5, 0.97])
@pytest.mark.parametrize("stopped", [False, True])
def test_an_acceptance_rate_is_unbiased_and_its_interval_holds_it(rate: float, stopped: bool) -> None:
    if stopped:
        outcomes = [(4, n, nbinom.pmf(n - 4, 4, rate)) for n in range(4, 800)]
    else:
        outcomes = [(k, 20, binom.pmf(k, 20, rate)) for k in range(21)]
    found = [(acceptance_rate(k, n, stopped=stopped), mass) for k, n, mass in outcomes]
    assert sum(one.mean * mass for one, mass in found) == pytest.approx(rate, rel=1e-6)
    assert sum(mass for one, mass in found if one.low <= rate <= one.high) >= 0.95
    assert all(one.low <= one.mean <= one.high for one, _ in found)


def test_the_interval_of_a_log_mean_holds_it() -> None:
    """Lognormal weights of spread 1, mean exp(1/2); with 200 of them the normal interval is nearly honest."""
    draws = torch.randn(500, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = [log_mean(row) for row in draws]
    assert np.mean([one.low <= 0.5 <= one.high for one in found]) > 0.9
    alone = log_mean(torch.tensor([2.0]))
    assert alone.mean == 2 and math.isnan(alone.low) and math.isnan(alone.high)
    assert log_mean(torch.zeros(3) - 800).mean == pytest.approx(-800), "logs throughout: no weight underflows"


def test_what_is_no_weight_is_said_in_one_line() -> None:
    with pytest.raises(DataError, match=r"log-weight 2: is nan; give -inf or finite numbers"):
        log_mean(torch.tensor([0.0, math.nan]))
    with pytest.raises(DataError, match="all 2 weights are 0"):
        systematic(torch.full((2,), -math.inf), 1, 0.0)
    with pytest.raises(DataError, match=r"log-weights have shape \(0,\)"):
        log_mean(torch.zeros(0))
    with pytest.raises(ConfigError, match="systematic: n is 0, uniform 0.5"):
        systematic(torch.zeros(2), 0, 0.5)
    for wrong in ((3, 2, False), (0, 0, False), (0, 5, True)):
        with pytest.raises(ConfigError, match="proposals accepted"):
            acceptance_rate(wrong[0], wrong[1], stopped=wrong[2])
    with pytest.raises(ConfigError, match="level is 1"):
        acceptance_rate(1, 2, level=1)
