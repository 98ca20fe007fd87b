"""Tilts against enumeration of a small language model: laws, acceptance, Z; a wrong sampler fails the same tests."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from polyref.errors import ConfigError, DataError
from polyref.samplers.tilt import accepted, best_of_n, best_of_n_kl, forward_weights, importance, reject, resample
from polyref.theory.solutions import solve_forward_kl
from toy_lm import World

BETA = 0.4


class Base:
    """The completions of a language model and a reward of each: 15 atoms, ended and cut, of one prompt."""

    def __init__(self) -> None:
        world = World(members=1, vocabulary=3, length=3, seed=2, prompts=1)
        self.law = world.logps[0, :, 0].exp()
        self.rewards = world.reward[0]
        self.tilt = (self.law.log() + self.rewards / BETA).softmax(-1)
        self.log_z = float((self.law.log() + self.rewards / BETA).logsumexp(-1))
        self.r_max = float(self.rewards.max())

    def draw(self, *shape: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Atoms, their rewards, and uniforms, all of `shape`."""
        generator = torch.Generator().manual_seed(seed)
        atoms = torch.multinomial(self.law, math.prod(shape), True, generator=generator).view(shape)
        return atoms, self.rewards[atoms], torch.rand(shape, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def base() -> Base:
    return Base()


def p_value(atoms: Tensor, law: Tensor) -> float:
    """Of the chi-square test that `atoms` are independent draws of `law`."""
    return float(chisquare(torch.bincount(atoms, minlength=len(law)), len(atoms) * law / law.sum()).pvalue)


def check_z(values: Tensor, truth: float | Tensor, sigmas: float = 4.0) -> None:
    """Independent runs (R, ...) have mean `truth`."""
    error = (values.mean(0) - truth) / (values.std(0) / math.sqrt(len(values)))
    assert (error.abs() < sigmas).all(), error


@pytest.mark.parametrize("slack", [0.0, 0.3])
def test_rejection_with_a_known_bound_is_exact(base: Base, slack: float) -> None:
    atoms, rewards, uniforms = base.draw(40_000, seed=0)
    kept = reject(rewards, uniforms, BETA, r_max=base.r_max + slack)
    assert kept.exact and kept.note.startswith("exact")
    assert p_value(atoms[kept.indices], base.tilt) > 0.001
    assert p_value(atoms, base.tilt) < 1e-9, "the test can tell the base from the tilt"
    doubled = reject(rewards, uniforms, 2 * BETA, r_max=base.r_max)
    assert p_value(atoms[doubled.indices], base.tilt) < 1e-9, "and another beta"
    rate = math.exp(base.log_z - (base.r_max + slack) / BETA)
    assert kept.acceptance is not None and kept.acceptance.low < rate < kept.acceptance.high
    assert kept.log_z is not None and kept.log_z.low < base.log_z < kept.log_z.high
    assert kept.log_z.high - kept.log_z.low < 0.1
    assert kept.ess == len(kept.indices) and not kept.log_weights.any()


def test_the_first_few_accepted_are_exact_and_their_log_z_knows_of_the_stop(base: Base) -> None:
    atoms, rewards, uniforms = base.draw(1500, 150, seed=1)
    runs = [reject(r, u, BETA, r_max=base.r_max, wanted=3) for r, u in zip(rewards, uniforms, strict=True)]
    assert all(len(kept.indices) == 3 and kept.proposals == 150 for kept in runs)
    firsts = torch.cat([row[kept.indices] for row, kept in zip(atoms, runs, strict=True)])
    assert p_value(firsts, base.tilt) > 0.001
    rates = torch.tensor([kept.acceptance.mean for kept in runs if kept.acceptance], dtype=torch.float64)
    check_z(rates, math.exp(base.log_z - base.r_max / BETA))
    held = [kept.log_z.low <= base.log_z <= kept.log_z.high for kept in runs if kept.log_z]
    assert np.mean(held) > 0.94


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_a_budget_of_proposals_leaves_the_acceptance_unbiased(rate: float) -> None:
    """Over every outcome of 8 coins: (k - 1)/(N - 1) where the third acceptance comes in time, k/8 where it does not."""
    rewards, total = torch.full((8,), BETA * math.log(rate), dtype=torch.float64), 0.0
    for coins in itertools.product((0.0, 0.99), repeat=8):
        kept = reject(rewards, torch.tensor(coins, dtype=torch.float64), BETA, r_max=0.0, wanted=3)
        assert kept.acceptance is not None and kept.exact
        total += rate ** coins.count(0.0) * (1 - rate) ** coins.count(0.99) * kept.acceptance.mean
    assert total == pytest.approx(rate, abs=1e-12)


def test_a_new_maximum_thins_the_accepted_again(base: Base) -> None:
    """Kept under one bound, then with probability exp((old - new)/beta) under a higher."""
    uniforms = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards = torch.full_like(uniforms, 0.1)
    before = accepted(rewards, uniforms, BETA, torch.tensor([0.3]))
    after = accepted(rewards, uniforms, BETA, torch.tensor([0.7]))
    assert not (after & ~before).any()
    share = float(after.double().sum() / before.double().sum())
    assert share == pytest.approx(math.exp(-0.4 / BETA), abs=4 * math.sqrt(share / float(before.sum())))


def test_a_running_maximum_is_consistent_biased_at_few_proposals_and_says_so(base: Base) -> None:
    rare = base.law * (base.rewards == base.r_max)
    assert rare.sum() < 0.2, "the best completion is often not proposed"

    def law(n: int, runs: int) -> Tensor:
        atoms, rewards, uniforms = base.draw(runs, n, seed=n)
        kept = accepted(rewards, uniforms, BETA, rewards.amax(-1, keepdim=True))
        counts = torch.zeros(runs, len(base.law), dtype=torch.float64).scatter_add_(-1, atoms, kept.double())
        return counts / counts.sum(-1, keepdim=True)

    check_z(law(4000, 200)[:, base.tilt > 1e-3], base.tilt[base.tilt > 1e-3], sigmas=4.5)
    few = law(3, 20_000).mean(0)
    assert (few - base.tilt).abs().sum() > 0.1
    _, rewards, uniforms = base.draw(50, seed=0)
    kept = reject(rewards, uniforms, BETA, wanted=2)
    assert not kept.exact and kept.note.startswith("approximate: r_max is not known") and len(kept.indices) == 2


def test_a_reward_above_the_claimed_bound_is_found_and_the_rest_thinned_again(base: Base) -> None:
    atoms, rewards, uniforms = base.draw(40_000, seed=3)
    claimed = float(base.rewards.sort().values[-3])
    kept = reject(rewards, uniforms, BETA, r_max=claimed)
    assert not kept.exact
    assert kept.note == f"approximate: a reward of {base.r_max:g} is above the r_max of {claimed:g} that was claimed"
    assert p_value(atoms[kept.indices], base.tilt) > 0.001
    believed = accepted(rewards, uniforms, BETA, torch.tensor([claimed]))
    assert p_value(atoms[believed], base.tilt) < 1e-9, "without thinning the test fails"
    assert kept.log_z is not None and kept.log_z.low < base.log_z < kept.log_z.high


def test_importance_weights_are_consistent_and_z_is_unbiased(base: Base) -> None:
    atoms, rewards, _ = base.draw(300, 2000, seed=4)
    runs = [importance(row, BETA) for row in rewards]
    check_z(torch.tensor([math.exp(kept.log_z.mean) for kept in runs if kept.log_z]), math.exp(base.log_z))
    assert np.mean([kept.log_z.low <= base.log_z <= kept.log_z.high for kept in runs if kept.log_z]) > 0.92
    shares = torch.stack([kept.log_weights.exp() for kept in runs]) / 2000
    laws = torch.zeros(300, len(base.law), dtype=torch.float64).scatter_add_(-1, atoms, shares)
    check_z(laws, base.tilt, sigmas=4.5)
    assert not runs[0].exact and 1 < runs[0].ess < 2000 and runs[0].acceptance is None
    again = resample(runs[0], 500, 0.3)
    torch.testing.assert_close(torch.bincount(again.indices, minlength=2000).double(), 500 * shares[0], atol=1.0, rtol=0.0)
    assert again.ess <= 500 and not again.log_weights.any() and again.proposals == 2000


def test_weights_that_proposals_bring_are_part_of_the_target(base: Base) -> None:
    """Uniform proposals with log-weights of the base: exp(r/beta) on top gives its tilt."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randint(len(base.law), (20_000,), generator=generator)
    brought = (base.law * len(base.law)).log()[atoms]
    kept = importance(base.rewards[atoms], BETA, log_weights=brought)
    assert kept.log_z is not None and kept.log_z.low < base.log_z < kept.log_z.high
    law = torch.zeros(len(base.law), dtype=torch.float64).scatter_add_(0, atoms, kept.log_weights.exp() / len(atoms))
    torch.testing.assert_close(law, base.tilt, atol=0.02, rtol=0.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 50), st.booleans())
def test_the_kl_of_best_of_n_never_exceeds_its_bound(seed: int, actions: int, n: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    law = (3 * torch.randn(actions, generator=generator, dtype=torch.float64)).softmax(-1)
    rewards = torch.randint(3 if ties else 10_000, (actions,), generator=generator)
    best = best_law(law, rewards, n)
    assert float(best.sum()) == pytest.approx(1)
    kl = float(torch.special.xlogy(best, best / law).sum())
    assert -1e-12 <= kl <= best_of_n_kl(n) + 1e-12


def best_law(law: Tensor, rewards: Tensor, n: int) -> Tensor:
    """P(best of n is y): P(the best level is y's) law(y)/P(level)."""
    below = (law * (rewards[None, :] < rewards[:, None])).sum(-1)
    level = (law * (rewards[None, :] == rewards[:, None])).sum(-1)
    return ((below + level) ** n - below**n) * law / level


def test_best_of_n_draws_its_law_ties_included_and_reaches_the_bound_without_ties(base: Base) -> None:
    for rewards in (base.rewards, (2 * base.rewards).round()):
        atoms, _, _ = base.draw(20_000, seed=5)
        kept = best_of_n(rewards[atoms], 4)
        assert p_value(atoms[kept.indices], best_law(base.law, rewards, 4)) > 0.001
        assert p_value(atoms[kept.indices], base.tilt) < 1e-9, "best of n is no tilt"
        assert len(kept.indices) == 5000 and kept.exact and kept.log_z is None
    many = torch.full((100_000,), 1e-5, dtype=torch.float64)
    best = best_law_sorted(many, 4)
    assert float(torch.special.xlogy(best, best / many).sum()) == pytest.approx(best_of_n_kl(4), abs=1e-3)
    assert best_of_n_kl(1) == 0


def best_law_sorted(law: Tensor, n: int) -> Tensor:
    """As `best_law` where rewards ascend."""
    up_to = law.cumsum(0)
    return up_to**n - (up_to - law) ** n


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.floats(-6, 6), st.floats(-3, 3))
def test_forward_weights_have_mean_one_and_a_root_in_its_bracket(seed: int, n: int, log_scale: float, log_beta: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    beta = 10.0**log_beta
    rewards = beta * 10.0**log_scale * torch.randn(3, n, generator=generator, dtype=torch.float64)
    weights, t = forward_weights(rewards, beta)
    torch.testing.assert_close(weights.mean(-1), torch.ones(3, dtype=torch.float64), rtol=1e-9, atol=0)
    assert ((t >= beta / n * (1 - 1e-9)) & (t <= beta * (1 + 1e-9))).all(), "max(r + beta/n) <= lambda <= max r + beta"
    gaps = rewards.amax(-1, keepdim=True) - rewards
    torch.testing.assert_close(weights, beta / (t[:, None] + gaps), rtol=1e-9, atol=0)
    torch.testing.assert_close(forward_weights(rewards[1], beta).weights, weights[1])


def test_forward_weights_are_consistent_with_a_bias_that_falls_with_n(base: Base) -> None:
    exact = solve_forward_kl(base.rewards, base.law.log(), BETA).log_policy.exp()

    def laws(n: int, runs: int) -> Tensor:
        atoms, rewards, _ = base.draw(runs, n, seed=6)
        weights = forward_weights(rewards, BETA).weights / n
        return torch.zeros(runs, len(base.law), dtype=torch.float64).scatter_add_(-1, atoms, weights)

    check_z(laws(4000, 100), exact, sigmas=4.5)
    bias = [float((laws(n, 200_000 // n).mean(0) - exact).abs().sum()) for n in (5, 50)]
    assert bias[1] < bias[0] / 3


def test_what_cannot_be_tilted_is_said_in_one_line() -> None:
    rewards, uniforms = torch.tensor([0.0, math.nan]), torch.tensor([0.1, 0.2])
    for call in (
        lambda: reject(rewards, uniforms, 1.0),
        lambda: importance(rewards, 1.0),
        lambda: best_of_n(rewards, 1),
        lambda: forward_weights(rewards, 1.0),
    ):
        with pytest.raises(DataError, match="^reward 2: is nan; a reward is a finite number$"):
            call()
    good = torch.tensor([0.0, 1.0])
    with pytest.raises(DataError, match=r"rewards have shape \(0,\)"):
        importance(torch.zeros(0), 1.0)
    for beta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="beta is"):
            importance(good, beta)
    with pytest.raises(ConfigError, match="a reward over beta 1e-310 is beyond float64"):
        importance(good, 1e-310)
    with pytest.raises(ConfigError, match=r"uniforms \(1,\) for 2 rewards"):
        reject(good, uniforms[:1], 1.0)
    with pytest.raises(ConfigError, match="wanted is 0"):
        reject(good, uniforms, 1.0, wanted=0)
    with pytest.raises(ConfigError, match="r_max is nan"):
        reject(good, uniforms, 1.0, r_max=math.nan)
    with pytest.raises(ConfigError, match=r"log-weights \(1,\) for 2 rewards"):
        importance(good, 1.0, log_weights=good[:1])
    with pytest.raises(ConfigError, match="best of 3 out of 2 proposals"):
        best_of_n(good, 3)
    with pytest.raises(ConfigError, match="n is 0"):
        best_of_n_kl(0)
    nothing = reject(good - 1e6, torch.tensor([0.5, 0.5]), 1.0, r_max=0.0)
    assert not len(nothing.indices) and nothing.exact and nothing.log_z is not None and nothing.log_z.low == -math.inf
    assert nothing.acceptance is not None and nothing.acceptance.mean == 0 < nothing.acceptance.high < 1
