"""Steps of 1/beta: they add up, and an adapted one accepts as often as it was asked to."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyref.errors import ConfigError, DataError
from polyref.samplers.schedule import adapted_beta, equal_steps, step_beta


@given(st.floats(1e-6, 1e6), st.integers(1, 30))
def test_equal_steps_end_at_beta_and_each_is_the_same_tilt(beta: float, steps: int) -> None:
    betas = equal_steps(beta, steps)
    assert len(betas) == steps and betas[-1] == beta
    for previous, following in zip((None, *betas), betas, strict=False):
        assert step_beta(previous, following) == pytest.approx(steps * beta)


def test_steps_compose_to_the_whole_tilt() -> None:
    betas = (3.0, 1.1, 0.4)
    assert sum(1 / step_beta(a, b) for a, b in zip((None, *betas), betas, strict=False)) == pytest.approx(1 / 0.4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(-6, 6), st.floats(0.05, 0.9), st.booleans())
def test_an_adapted_step_accepts_as_asked_and_the_steps_end(seed: int, log_scale: float, target: float, known: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    beta = 0.1 * 10.0**log_scale
    rewards = [10.0**log_scale * torch.rand(n, generator=generator, dtype=torch.float64) for n in (3, 20, 8)]
    r_max = [10.0**log_scale] * 3 if known else None
    most = math.ceil(10 / -math.log(target))
    previous: float | None = None
    for _ in range(most):
        following = adapted_beta(rewards, previous, beta, target, r_max=r_max)
        step = step_beta(previous, following)
        best = [float(row.max()) if r_max is None else r_max[0] for row in rewards]
        rate = sum(float(((row - top) / step).exp().mean()) for row, top in zip(rewards, best, strict=True)) / 3
        if following == beta:
            assert rate >= target - 1e-6
            break
        assert following > beta and rate == pytest.approx(target, rel=1e-6)
        previous = following
    assert following == beta


def test_equal_rewards_go_all_the_way_at_once_and_so_does_a_target_that_is_met() -> None:
    assert adapted_beta([torch.ones(4)], None, 0.1, 0.5) == 0.1
    assert adapted_beta([torch.tensor([0.0, 1.0])], None, 1e-9, 0.4) == 1e-9, "half are the best"


def test_what_is_no_schedule_is_said_in_one_line() -> None:
    for call, message in (
        (lambda: equal_steps(0.1, 0), "multi-step schedule: steps is 0"),
        (lambda: equal_steps(0.0, 1), "beta is 0.0"),
        (lambda: step_beta(1.0, 1.0), "beta goes from 1 to 1; let beta fall"),
        (lambda: step_beta(None, math.nan), "beta is nan"),
        (lambda: adapted_beta([torch.ones(1)], None, 0.1, 1.0), "acceptance is 1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    with pytest.raises(DataError, match=r"prompt 2: rewards \(1,\) are none or not finite"):
        adapted_beta([torch.ones(1), torch.tensor([math.nan])], None, 0.1, 0.5)
    with pytest.raises(DataError, match="rewards of 0 prompts"):
        adapted_beta([], None, 0.1, 0.5)
