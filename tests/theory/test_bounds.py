"""Each step of the bounds against numerical integration and simulation, and measured gaps that must stay below the bound."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import expit

from polyref.errors import ConfigError
from polyref.theory import bounds
from polyref.theory.bandit import FiniteBandit, random_bandit
from polyref.theory.coverage import density_coverage
from polyref.theory.estimators import fit_linear, fit_tabular
from polyref.theory.gshf import offline_policy_level
from polyref.theory.preferences import bradley_terry, pair_law
from polyref.theory.sampling import draw_wins
from polyref.theory.solutions import forward_optimum, reverse_optimum, solve_forward_kl, solve_reverse_kl
from polyref.theory.values import forward_gap, reverse_gap


@pytest.mark.parametrize("reach", [0.1, 1.0, 3.0, 8.0])
def test_the_difference_constant_bounds_the_bernoulli_distance(reach: float) -> None:
    h, star = np.meshgrid(np.linspace(-reach, reach, 201), np.linspace(-reach, reach, 201))
    affinity = np.sqrt(expit(h) * expit(star)) + np.sqrt(expit(-h) * expit(-star))
    constant = bounds.difference_constant(reach)
    assert ((h - star) ** 2 <= constant * (1 - affinity + 1e-13)).all()
    assert 8 <= constant * bounds.least_slope(reach) <= 9
    slopes = minimize_scalar(lambda u: expit(u) * expit(-u), bounds=(-reach, reach), method="bounded").fun
    assert bounds.least_slope(reach) <= slopes * (1 + 1e-9)


def finite_class(seed: int, size: int, beta: float, reach: float) -> tuple[FiniteBandit, torch.Tensor, torch.Tensor]:
    """A problem whose reward is the first of a class (size, X, Y), the pairs' law being the anchor itself."""
    generator = torch.Generator().manual_seed(seed)
    bandit = random_bandit(generator, contexts=3, actions=4, references=2, beta=beta, reward_range=reach)
    others = reach * torch.rand(size - 1, 3, 4, generator=generator, dtype=torch.float64)
    rewards = torch.cat([bandit.rewards[None], 0.7 * bandit.rewards + 0.3 * others])
    return bandit, rewards, (rewards[:, :, :, None] - rewards[:, :, None, :]).sigmoid()


def best_of_class(chances: torch.Tensor, mu: torch.Tensor, pairs: int, runs: int, generator: torch.Generator) -> torch.Tensor:
    """The index of the likeliest reward of the class in each run: `pairs` pairs from rho x mu x mu, labels by the first."""
    law = (mu[:, :, None] * mu[:, None, :] / mu.shape[0]).flatten()
    cells = torch.multinomial(law, runs * pairs, replacement=True, generator=generator).view(runs, pairs)
    won = torch.rand(runs, pairs, generator=generator, dtype=torch.float64) < chances[0].flatten()[cells]
    scores = [torch.where(won, p.flatten().log()[cells], (1 - p).flatten().log()[cells]).sum(1) for p in chances]
    return torch.stack(scores).argmax(0)


@pytest.mark.parametrize("seed", range(3))
def test_measured_gaps_stay_below_the_bounds(seed: int) -> None:
    size, beta, reach, runs, delta = 16, 0.5, 1.0, 400, 0.1
    bandit, rewards, chances = finite_class(seed, size, beta, reach)
    steps = torch.linspace(0, 1, 11, dtype=torch.float64)[:, None, None, None]
    between = bandit.rewards + steps * (rewards - bandit.rewards)
    reverse_anchor, forward_anchor = bandit.geometric, bandit.mixture
    reverse = solve_reverse_kl(rewards, reverse_anchor, beta)
    reverse_coverage = float(density_coverage(solve_reverse_kl(between, reverse_anchor, beta), reverse_anchor).max())
    forward = solve_forward_kl(rewards, forward_anchor, beta).log_policy
    forward_coverage = float(density_coverage(forward, forward_anchor).max())
    assert reverse_coverage <= math.exp(reach / beta)
    generator = torch.Generator().manual_seed(100 + seed)
    for pairs in (50, 400):
        error = bounds.class_error(pairs, math.log(size), delta, reach)
        chosen = best_of_class(chances, reverse_anchor.exp(), pairs, runs, generator)
        gaps = reverse_gap(reverse[chosen], bandit)
        assert 0 < float(gaps.quantile(1 - delta)) <= bounds.reverse_gap_bound(error, reverse_coverage, beta)
        chosen = best_of_class(chances, forward_anchor.exp(), pairs, runs, generator)
        gaps = forward_gap(forward[chosen], bandit)
        assert 0 < float(gaps.quantile(1 - delta)) <= bounds.transfer_bound(error, forward_coverage)
        difference = rewards[chosen] - rewards[0]
        mu = forward_anchor.exp()
        spread = (difference[..., :, None] - difference[..., None, :]) ** 2
        squares = (spread * mu[:, :, None] * mu[:, None, :]).sum((-2, -1)).mean(-1)
        assert 0 < float(squares.quantile(1 - delta)) <= error


def test_the_gap_is_bounded_for_any_reward_of_given_error() -> None:
    """Steps 4 and 5 without any statistics: whatever the reward, gap against E D^2."""
    generator = torch.Generator().manual_seed(7)
    for beta in (0.2, 1.0, 5.0):
        bandit, rewards, _ = finite_class(11, 300, beta, 1.0)
        rewards = bandit.rewards + 2 * torch.rand(300, 1, 1, generator=generator, dtype=torch.float64) * (rewards - rewards[0])
        for anchor, name in ((bandit.geometric, "reverse"), (bandit.mixture, "forward")):
            mu, difference = anchor.exp(), rewards - bandit.rewards
            spread = (difference[..., :, None] - difference[..., None, :]) ** 2
            error = (spread * mu[:, :, None] * mu[:, None, :]).sum((-2, -1)).mean(-1)
            for index in range(0, 300, 7):
                if name == "reverse":
                    path = bandit.rewards + torch.linspace(0, 1, 21, dtype=torch.float64)[:, None, None] * difference[index]
                    coverage = float(density_coverage(solve_reverse_kl(path, anchor, beta), anchor).max())
                    gap = reverse_gap(solve_reverse_kl(rewards[index], anchor, beta), bandit)
                    assert float(gap) <= bounds.reverse_gap_bound(float(error[index]), coverage, beta) + 1e-12
                else:
                    policy = solve_forward_kl(rewards[index], anchor, beta).log_policy
                    both = torch.stack([policy, forward_optimum(bandit)])
                    limit = bounds.transfer_bound(float(error[index]), float(density_coverage(both, anchor).max()))
                    assert float(forward_gap(policy, bandit)) <= limit + 1e-12


@pytest.mark.parametrize(("contexts", "actions", "reach", "e"), [(1, 2, 1.0, 0.3), (1, 4, 1.0, 0.2), (2, 3, 2.0, 0.4)])
def test_the_cover_of_tables_holds_every_table_and_no_more_points_than_counted(
    contexts: int, actions: int, reach: float, e: float
) -> None:
    """Step 3 for tables, by drawing very many of them: what they are rounded to is near, inside the range, and not too many."""
    generator = torch.Generator().manual_seed(0)
    tables = reach * torch.rand(200_000, contexts, actions, generator=generator, dtype=torch.float64)
    tables = tables - tables.amin(-1, keepdim=True)
    points = 2 * e * (tables / (2 * e)).floor()
    differences = [one[..., :, None] - one[..., None, :] for one in (tables, points)]
    assert (differences[0] - differences[1]).abs().max() < 2 * e and differences[1].abs().max() <= reach
    counted = (actions * (1 + reach / (2 * e)) ** (actions - 1)) ** contexts
    assert 1 < len(points.round(decimals=9).flatten(1).unique(dim=0)) <= counted
    dimension = contexts * (actions - 1)
    pairs = dimension / e
    finite = bounds.class_error(pairs, math.log(counted) + dimension, 0.1, reach)
    assert bounds.table_error(pairs, contexts, actions, 0.1, reach) == pytest.approx((math.sqrt(finite) + 2 * e) ** 2)


@pytest.mark.parametrize("seed", range(3))
def test_tables_of_several_references_stay_below_the_bound_under_the_geometric_anchor(seed: int) -> None:
    """Pairs from the mixture, the anchor geometric: C is of all tilts by the mixture, at most exp(R/beta)/F, not exp(R/beta).

    Estimates inside the range R are the maximum likelihood over the tables of that range.
    """
    contexts, actions, reach, beta, pairs, runs, delta = 3, 4, 2.0, 0.5, 4000, 300, 0.1
    generator = torch.Generator().manual_seed(seed)
    bandit = random_bandit(
        generator, contexts=contexts, actions=actions, references=3, beta=beta, reward_range=reach / 2, spread=3.0
    )
    bandit = replace(bandit, logps=(0.7 * bandit.logps.exp() + 0.3 / actions).log())
    wins = draw_wins(pair_law(bandit.contexts, bandit.mixture), bradley_terry(bandit.rewards), pairs, runs, generator)
    found = fit_tabular(wins)
    inside = (found.amax(-1) - found.amin(-1)).amax(-1) <= reach
    assert inside.double().mean() > 0.95
    found = found[inside]
    steps = torch.linspace(0, 1, 11, dtype=torch.float64)[:, None, None, None]
    tilts = solve_reverse_kl(bandit.rewards + steps * (found - bandit.rewards), bandit.geometric, beta)
    coverage = float(density_coverage(tilts, bandit.mixture).max())
    assert coverage <= math.exp(reach / beta) / float(bandit.log_f.exp().min())
    error = bounds.table_error(pairs, contexts, actions, delta, reach)
    gaps = reverse_gap(solve_reverse_kl(found, bandit.geometric, beta), bandit)
    difference = (found - bandit.rewards)[..., :, None] - (found - bandit.rewards)[..., None, :]
    squares = torch.einsum("xij,rxij->r", pair_law(bandit.contexts, bandit.mixture), difference**2)
    assert 0 < float(squares.quantile(1 - delta)) <= error
    assert 0 < float(gaps.quantile(1 - delta)) <= bounds.reverse_gap_bound(error, coverage, beta)
    assert (gaps <= bounds.reverse_gap_bound(1.0, coverage, beta) * squares * (1 + 1e-9)).all()


@pytest.mark.parametrize("reach", [1e-300, 1e-8, 700.0, 1000.0, 1e300])
def test_constants_stay_numbers_at_any_range(reach: float) -> None:
    assert bounds.difference_constant(reach) >= 32 and 0 <= bounds.least_slope(reach) <= 0.25
    assert bounds.transfer_bound(math.inf, 1.0) == 0 and bounds.transfer_bound(math.inf, 2.0) == math.inf


def test_bounds_fall_with_pairs_at_their_rates() -> None:
    for error in (lambda n: bounds.class_error(n, 5.0, 0.05, 1.0), lambda n: bounds.linear_error(n, 10, 0.05, 1.0)):
        values = [error(10**k) for k in range(1, 9)]
        assert values == sorted(values, reverse=True)
        slope = math.log(error(1e9) / error(1e8)) / math.log(10)
        assert -1.001 <= slope <= -0.9
    assert bounds.transfer_bound(4e-4, 3.0) == pytest.approx(10 * bounds.transfer_bound(4e-6, 3.0))


def test_mixture_coverage() -> None:
    generator = torch.Generator().manual_seed(3)
    logps = torch.randn(50, 6, 4, generator=generator, dtype=torch.float64).log_softmax(1)
    target = torch.randn(50, 6, generator=generator, dtype=torch.float64).log_softmax(1)
    mixture = logps.exp().mean(-1).log()
    for problem in range(50):
        each = [float((target - logps[..., k])[problem].exp().max()) for k in range(4)]
        assert float((target - mixture)[problem].exp().max()) <= bounds.mixture_coverage(each) * (1 + 1e-12)
    assert bounds.mixture_coverage([3.0, math.inf, math.inf]) == pytest.approx(9)
    assert bounds.mixture_coverage([math.inf]) == math.inf


def test_pairs_needed_is_the_least_number() -> None:
    for target in (10.0, 0.3, 1e-4, 1e-9):
        needed = bounds.pairs_needed(lambda n: 7 / n, target)
        assert 7 / needed <= target and (needed == 1 or 7 / (needed - 1) > target)
    with pytest.raises(ConfigError, match="more than 10\\^18 pairs"):
        bounds.pairs_needed(lambda n: 1.0, 0.5)


@pytest.mark.parametrize("seed", range(2))
def test_linear_classes_and_pessimism_stay_below_their_bounds(seed: int) -> None:
    dimension, reach, beta, runs, delta = 3, 1.0, 0.5, 200, 0.1
    generator = torch.Generator().manual_seed(seed)
    bandit = random_bandit(
        generator, contexts=3, actions=5, references=2, beta=beta, features=dimension, reward_range=reach / 2, coverage=0.05
    )
    features, anchor = bandit.features, bandit.geometric
    assert features is not None
    law = pair_law(bandit.contexts, anchor, distinct=False)
    difference = features[:, :, None] - features[:, None, :]
    sigma = torch.einsum("xij,xijd,xije->de", law, difference, difference)
    coverage = float(density_coverage(reverse_optimum(bandit), anchor))
    for pairs in (100, 1600):
        wins = draw_wins(law, bradley_terry(bandit.rewards), pairs, runs, generator)
        theta = fit_linear(wins, features, radius=reach / 2)
        error = bounds.linear_error(pairs, dimension, delta, reach)
        off = theta - bandit.theta
        squares = torch.einsum("rd,de,re->r", off, sigma, off)
        assert 0 < float(squares.quantile(1 - delta)) <= error
        batch = replace(bandit, logps=bandit.logps.expand(runs, *bandit.logps.shape))
        careful = offline_policy_level(theta, pairs * sigma, batch, scale=math.sqrt(pairs * error))
        gaps = reverse_gap(careful, bandit)
        assert 0 < float(gaps.quantile(1 - delta)) <= bounds.transfer_bound(error, coverage)
