"""Multi-step rejection sampling: exact laws, worst-case acceptance, simulation, and what fit errors do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from polyref.errors import ConfigError
from polyref.theory.bandit import FiniteBandit, random_bandit
from polyref.theory.multistep import enumerate_steps, fit_pairs, ladder, least_acceptance, simulate_steps
from polyref.theory.solutions import reverse_optimum
from polyref.theory.values import kl


def bandit(beta: float = 0.25, replicates: tuple[int, ...] = ()) -> FiniteBandit:
    generator = torch.Generator().manual_seed(5)
    return random_bandit(generator, replicates=replicates, contexts=3, actions=6, references=2, beta=beta)


def errors(steps: int, size: float = 0.3) -> Tensor:
    return size * torch.randn(steps - 1, 3, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 5, 16])
def test_the_last_law_is_the_optimum_and_no_step_falls_below_the_worst_case(steps: int) -> None:
    own = bandit(replicates=(4,))
    path = enumerate_steps(own, steps)
    torch.testing.assert_close(path.accepted[..., -1, :, :], reverse_optimum(own))
    torch.testing.assert_close(path.accepted[..., :-1, :, :], ladder(own, steps)[..., 1:-1, :, :])
    assert path.acceptance.shape == (4, steps, 3)
    assert (path.acceptance >= least_acceptance(own, steps).unsqueeze(-2)).all()


def test_one_step_is_plain_rejection_and_acceptances_multiply_to_it() -> None:
    own = bandit()
    best = own.rewards.amax(-1, keepdim=True)
    plain = (own.geometric.exp() * ((own.rewards - best) / own.beta).exp()).sum(-1)
    torch.testing.assert_close(enumerate_steps(own, 1).acceptance[0], plain)
    for steps in (3, 10):
        torch.testing.assert_close(enumerate_steps(own, steps).acceptance.prod(0), plain)


def test_many_steps_pay_where_the_best_is_rare_and_not_where_one_step_accepts_much() -> None:
    """One step never needs more than 1/G_a(best) proposals: only rare good completions are worth a ladder."""
    easy = bandit(5.0)
    assert (enumerate_steps(easy, 8).proposals > enumerate_steps(easy, 1).proposals).all()
    levels = torch.linspace(0, 1, 40, dtype=torch.float64).expand(2, 40)
    rare = FiniteBandit.tabular(levels, (-20 * levels).log_softmax(-1).unsqueeze(-1), beta=0.04)
    one, many = (enumerate_steps(rare, steps).proposals for steps in (1, 8))
    assert (one > 5000).all()
    assert (many < 0.02 * one).all()
    limit = (-rare.geometric[..., -1]).exp()
    assert (one <= limit).all()


def test_simulated_acceptance_and_law_match_enumeration() -> None:
    own, steps, proposals, replicates = bandit(), 4, 500, 200
    path = enumerate_steps(own, steps)
    run = simulate_steps(own, steps, torch.Generator().manual_seed(1), proposals=proposals, replicates=replicates)
    error = (path.acceptance * (1 - path.acceptance) / (proposals * replicates)).sqrt()
    assert (((run.acceptance.mean(0) - path.acceptance) / error).abs() < 4.5).all()
    counts = run.accepted.sum(0)
    expected = path.accepted.exp() * counts.sum(-1, keepdim=True)
    chi_square = ((counts - expected) ** 2 / expected).sum(-1)
    assert (chi_square < 25.7).all()  # the 99.99% point at 5 degrees of freedom


def test_errors_stay_the_last_one_when_anchored_and_add_up_when_not_and_reweighting_undoes_them() -> None:
    own, steps = bandit(), 6
    optimum = reverse_optimum(own)
    path = {
        name: enumerate_steps(own, steps, errors=errors(steps), **options).accepted[-1]
        for name, options in {
            "anchored": {"anchored": True},
            "imitated": {"anchored": False},
            "reweighted": {"anchored": False, "reweight": True},
        }.items()
    }
    torch.testing.assert_close(path["anchored"], (optimum + errors(steps)[-1]).log_softmax(-1))
    torch.testing.assert_close(path["imitated"], (optimum + errors(steps).sum(0)).log_softmax(-1))
    torch.testing.assert_close(path["reweighted"], optimum)
    worst = enumerate_steps(own, steps, errors=errors(steps, 3.0), anchored=False)
    assert (worst.acceptance >= least_acceptance(own, steps)).all()


def test_fits_to_labelled_pairs_of_accepted_draws_end_near_the_optimum() -> None:
    own, steps = bandit(), 4
    generator = torch.Generator().manual_seed(3)
    optimum = reverse_optimum(own)
    divergence = []
    for pairs in (1_000, 30_000):
        fit = fit_pairs(own, steps, generator, pairs=pairs, radius=5.0)
        run = simulate_steps(own, steps, generator, proposals=400, replicates=40, fit=fit)
        last = (run.accepted[:, -1].sum(0)).log().log_softmax(-1)
        divergence.append(float(kl(last, optimum).mean()))
        assert (run.acceptance >= least_acceptance(own, steps) - 0.15).all()
    assert divergence[1] < 0.02 and divergence[1] < divergence[0]


def test_unsupported_actions_are_never_proposed_and_do_not_set_the_maximum() -> None:
    own = bandit()
    logps = own.logps.clone()
    logps[:, 2] = -math.inf
    rewards = own.rewards.clone()
    rewards[:, 2] = 50.0
    narrow = FiniteBandit.tabular(rewards, logps.log_softmax(-2), beta=own.beta)
    path = enumerate_steps(narrow, 3)
    assert (path.accepted[..., 2] == -math.inf).all()
    assert path.acceptance.isfinite().all()
    run = simulate_steps(narrow, 3, torch.Generator().manual_seed(0), proposals=50, replicates=5)
    assert float(run.accepted[..., 2].sum()) == 0
    assert float(run.acceptance.mean()) > 0.1


def test_bad_input_is_one_line() -> None:
    with pytest.raises(ConfigError, match="steps is 0"):
        enumerate_steps(bandit(), 0)
    with pytest.raises(ConfigError, match="proposals 0"):
        simulate_steps(bandit(), 1, torch.Generator(), proposals=0, replicates=1)
