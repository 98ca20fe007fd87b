"""Optima in both directions against brute force, the normaliser against exact arithmetic, gaps against differences."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from polyref.errors import ConfigError, ReferenceSetError
from polyref.theory.bandit import FiniteBandit, random_bandit
from polyref.theory.solutions import forward_optimum, reverse_optimum, solve_forward_kl, solve_reverse_kl
from polyref.theory.values import (
    disagreement,
    forward_gap,
    forward_objective,
    kl,
    kl_decomposition,
    mean_reward,
    reverse_gap,
    reverse_objective,
    reverse_value,
    unregularised_gap,
)

DIRECTIONS = pytest.mark.parametrize("direction", ["reverse", "forward"])
OBJECTIVES = {"reverse": reverse_objective, "forward": forward_objective}
OPTIMA = {"reverse": reverse_optimum, "forward": forward_optimum}
GAPS = {"reverse": reverse_gap, "forward": forward_gap}
problems = {
    "seed": st.integers(0, 10_000),
    "members": st.integers(1, 6),
    "actions": st.integers(2, 6),
    "beta": st.floats(0.05, 5.0),
    "per_context": st.booleans(),
}


def problem(
    seed: int, members: int, actions: int, beta: float, per_context: bool, replicates: tuple[int, ...] = ()
) -> FiniteBandit:
    generator = torch.Generator().manual_seed(seed)
    rows = (3,) if per_context else ()
    weights = torch.randn(*rows, members, generator=generator, dtype=torch.float64).softmax(-1)
    sizes = dict(contexts=3, actions=actions, references=members, replicates=replicates)
    return random_bandit(generator, **sizes, beta=beta, weights=weights, reward_range=2.0)


def direct_objective(direction: str, pi: np.ndarray, bandit: FiniteBandit, x: int) -> float:
    """E_pi r - beta sum_i a_i KL, member by member, of the probabilities pi in context x."""
    weights = bandit.weights.expand(3, -1)[x].numpy()
    members, rewards = bandit.logps[x].exp().numpy(), bandit.rewards[x].numpy()
    total = pi @ rewards
    for a, p in zip(weights, members.T, strict=True):
        ratio = pi * np.log(pi / p) if direction == "reverse" else p * np.log(p / pi)
        total -= bandit.beta * a * ratio.sum()
    return float(total)


@DIRECTIONS
@settings(max_examples=15)
@given(**problems)
def test_the_optimum_is_what_a_search_over_the_simplex_finds(direction, seed, members, actions, beta, per_context):
    """Brute force: sequential quadratic programming on probabilities, which knows the objective by its definition alone."""
    bandit = problem(seed, members, actions, beta, per_context)
    optimum = OPTIMA[direction](bandit).exp().numpy()
    found = []
    for x in range(3):
        search = minimize(
            lambda pi, x=x: -direct_objective(direction, pi, bandit, x) / beta,
            np.full(actions, 1 / actions),
            method="SLSQP",
            bounds=[(1e-12, 1)] * actions,
            constraints={"type": "eq", "fun": lambda pi: pi.sum() - 1, "jac": np.ones_like},
            options={"ftol": 1e-15, "maxiter": 500},
        )
        pi = np.abs(search.x) / np.abs(search.x).sum()
        found.append(direct_objective(direction, pi, bandit, x))
        own = direct_objective(direction, optimum[x], bandit, x)
        assert found[-1] <= own + 1e-12 and own - found[-1] < 1e-8 * max(1, beta)
        np.testing.assert_allclose(optimum[x], pi, atol=2e-4)
    own = OBJECTIVES[direction](OPTIMA[direction](bandit), bandit)
    assert own.item() == pytest.approx(np.mean(found), abs=1e-8 * max(1, beta))
    if direction == "reverse":
        assert reverse_value(bandit).item() == pytest.approx(np.mean(found), abs=1e-8 * max(1, beta))


@DIRECTIONS
@given(**problems)
def test_a_gap_is_the_difference_of_two_objectives(direction, seed, members, actions, beta, per_context):
    bandit = problem(seed, members, actions, beta, per_context, replicates=(2,))
    noise = torch.randn(5, 2, 3, actions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    optimum, objective = OPTIMA[direction](bandit), OBJECTIVES[direction]
    policies = (optimum + noise * torch.tensor([0.01, 0.1, 1.0, 3.0, 10.0]).double()[:, None, None, None]).log_softmax(-1)
    gap = GAPS[direction](policies, bandit)
    assert gap.shape == (5, 2) and (gap > 0).all()
    torch.testing.assert_close(gap, objective(optimum, bandit) - objective(policies, bandit), rtol=1e-8, atol=1e-12)
    if direction == "reverse":
        plain = (policies.exp() * (policies - optimum)).sum(-1)
        torch.testing.assert_close(gap, beta * plain.mean(-1), rtol=1e-8, atol=1e-12)
    assert GAPS[direction](optimum, bandit).abs().max() < 1e-25


@DIRECTIONS
@given(**problems)
def test_the_gap_keeps_its_digits_where_differences_of_objectives_lose_them(
    direction, seed, members, actions, beta, per_context
):
    """A step of 1e-6 halved quarters the gap, though both gaps are near 1e-12 and the objectives near 1."""
    bandit = problem(seed, members, actions, beta, per_context)
    noise = torch.randn(3, actions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    one, half = (GAPS[direction]((OPTIMA[direction](bandit) + e * noise).log_softmax(-1), bandit) for e in (1e-6, 5e-7))
    assert one.item() == pytest.approx(4 * half.item(), rel=1e-4)


@given(**problems)
def test_the_forward_objective_against_its_definition(seed, members, actions, beta, per_context):
    bandit = problem(seed, members, actions, beta, per_context)
    policy = torch.randn(3, actions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)
    for direction, objective in OBJECTIVES.items():
        direct = np.mean([direct_objective(direction, policy[x].exp().numpy(), bandit, x) for x in range(3)])
        assert objective(policy, bandit).item() == pytest.approx(direct, rel=1e-10, abs=1e-12)
    if members == 1:
        assert disagreement(bandit).abs().max() < 1e-14


@given(**problems)
def test_the_weighted_sum_of_kl_terms_is_one_kl_and_log_f(seed, members, actions, beta, per_context):
    bandit = problem(seed, members, actions, beta, per_context)
    policy = torch.randn(3, actions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)
    parts = kl_decomposition(policy, bandit)
    torch.testing.assert_close(parts.to_members, parts.to_geometric + parts.minus_log_f)
    weights = bandit.weights.expand(3, -1)
    direct = sum(weights[:, i] * (policy.exp() * (policy - bandit.logps[..., i])).sum(-1) for i in range(members))
    torch.testing.assert_close(parts.to_members, direct)


# The forward normaliser.


def exact_normaliser(gaps: list[float], masses_log: list[float]) -> tuple[Decimal, Decimal, Decimal]:
    """log s, by bisection in 60 digits, of sum M/(s + gap) = 1; and theory's bracket (lower, upper) of s."""
    with localcontext() as context:
        context.prec = 60
        g, m = [Decimal(v) for v in gaps], [Decimal(v).exp() for v in masses_log]
        m = [v / sum(m) for v in m]
        lower, upper = max(a - b for a, b in zip(m, g, strict=True)), Decimal(1)
        low, high = lower.ln(), Decimal(0)
        for _ in range(180):
            middle = (low + high) / 2
            s = middle.exp()
            low, high = (middle, high) if sum(a / (s + b) for a, b in zip(m, g, strict=True)) > 1 else (low, middle)
        return low, lower, upper


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    actions=st.integers(1, 5),
    log_scale=st.floats(-6, 6),
    spread=st.sampled_from([0.0, 1.0, 10.0, 100.0, 1000.0]),
    log_beta=st.floats(-3, 3),
)
@example(seed=0, actions=4, log_scale=6.0, spread=1000.0, log_beta=0.0)
@example(seed=0, actions=4, log_scale=-6.0, spread=1000.0, log_beta=0.0)
def test_the_forward_root_over_twelve_orders_of_magnitude_and_any_mass(seed, actions, log_scale, spread, log_beta):
    """Rewards from 1e-6 to 1e6 beta, masses down to exp(-thousands): unique, in the bracket, to 1e-12 in exact arithmetic.

    The tolerance grows with 1/slope, slope = -d log F/d log s at the root: an equation flat there fixes s no better than its
    own coefficients, rounded to 2^-53, do.
    """
    generator = torch.Generator().manual_seed(seed)
    beta = 10.0**log_beta
    rewards = beta * 10.0**log_scale * torch.randn(actions, generator=generator, dtype=torch.float64)
    mixture = (spread * torch.randn(actions, generator=generator, dtype=torch.float64)).log_softmax(-1)
    solution = solve_forward_kl(rewards[None], mixture[None], beta)
    gaps = (rewards.max() - rewards) / beta
    log_s, lower, upper = exact_normaliser(gaps.tolist(), mixture.tolist())
    found = solution.log_normaliser.item() - math.log(beta)
    share = (mixture - torch.logaddexp(torch.tensor(float(log_s)).double(), gaps.log())).exp()
    slope = (share * torch.exp(float(log_s) - torch.logaddexp(torch.tensor(float(log_s)).double(), gaps.log()))).sum().item()
    tolerance = 1e-12 + 1e-14 / slope + 4e-16 * abs(float(log_s))
    assert abs(found - float(log_s)) <= tolerance
    assert float(lower.ln()) - tolerance <= found <= tolerance
    normaliser = solution.normaliser.item()
    assert 0 <= normaliser <= beta * (1 + 1e-12) and normaliser == pytest.approx(beta * math.exp(found), rel=1e-10)
    assert abs(solution.log_policy.exp().sum().item() - 1) < 1e-12 + 4e-16 * abs(float(log_s))


@pytest.mark.parametrize("shift", [1e10, -1e300])
@pytest.mark.parametrize("beta", [1e-300, 1e-10, 0.5])
def test_only_the_range_of_the_rewards_over_beta_has_to_fit_into_a_float(shift, beta):
    """A reward added to all changes no policy, and a value by itself, whatever it is over beta."""
    generator = torch.Generator().manual_seed(0)
    logps = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64).log_softmax(-2)
    equal = FiniteBandit.tabular(torch.full((2, 4), shift, dtype=torch.float64), logps, beta=beta)
    torch.testing.assert_close(reverse_optimum(equal), equal.geometric)
    torch.testing.assert_close(forward_optimum(equal), equal.mixture)
    assert float(reverse_value(equal)) == pytest.approx(shift + beta * float(equal.log_f.mean()))
    assert abs(float(reverse_gap(reverse_optimum(equal), equal))) <= 1e-15 * beta
    steep = FiniteBandit.tabular(torch.tensor([[0.0, 1.0, 2.0, 3.0]]) * 1e10, logps[:1], beta=beta)
    if beta > 1e-300:
        assert reverse_optimum(steep).isfinite().all() and forward_optimum(steep).isfinite().all()
        assert float(reverse_value(steep)) == pytest.approx(3e10)
        return
    for function in (reverse_optimum, forward_optimum, reverse_value):
        with pytest.raises(ConfigError, match=r"action \(0, 0\), over beta 1e-300, is beyond float64"):
            function(steep)


def test_the_forward_root_is_unique_because_the_equation_falls():
    """One sign change on a fine grid of the bracket, for every scale at once."""
    generator = torch.Generator().manual_seed(0)
    rewards = 10.0 ** torch.linspace(-6, 6, 25).double()[:, None] * torch.randn(25, 6, generator=generator, dtype=torch.float64)
    mixture = (3 * torch.randn(25, 6, generator=generator, dtype=torch.float64)).log_softmax(-1)
    root = solve_forward_kl(rewards, mixture, 1.0).log_normaliser
    gaps, mass = rewards.amax(-1, keepdim=True) - rewards, mixture.exp()
    low = (mass - gaps).amax(-1).log()
    grid = low[:, None] * torch.linspace(1, 0, 2001).double()
    total = (mass[:, None] / (grid.exp()[..., None] + gaps[:, None])).sum(-1)
    assert (total.diff(dim=-1) <= 1e-12).all() and (total[:, 0] >= 1 - 1e-9).all() and (total[:, -1] <= 1 + 1e-9).all()
    away = (grid - root[:, None]).abs() > 1e-6
    assert (((total > 1) == (grid < root[:, None])) | ~away | ((total - 1).abs() < 1e-12)).all()


@pytest.mark.parametrize("log_mass", [-30.0, -300.0, -800.0, -5000.0])
def test_the_best_action_may_hold_almost_no_mass(log_mass):
    """Two actions, m the mass of the best, g the gap: s^2 + s (g - 1) - m g = 0, so s = m g/(g - 1) to first order."""
    mixture = torch.tensor([[log_mass, math.log1p(-math.exp(log_mass))]], dtype=torch.float64)
    for gap in (1.5, 10.0, 1e6):
        solution = solve_forward_kl(torch.tensor([[0.0, -gap]], dtype=torch.float64), mixture, 1.0)
        expected = log_mass + math.log(gap / (gap - 1))
        assert solution.log_normaliser.item() == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(solution.log_policy.exp()[0], torch.tensor([1 - 1 / gap, 1 / gap]).double())
    tie = solve_forward_kl(torch.tensor([[0.0, -1.0]], dtype=torch.float64), mixture, 1.0)
    # At g = 1 the sum is 1 to rounding for every s from m to 2^-53: any of them gives the policy.
    assert log_mass <= tie.log_normaliser.item() < math.log(1e-6)
    torch.testing.assert_close(tie.log_policy.exp()[0], torch.tensor([0.0, 1.0]).double(), atol=1e-6, rtol=0)


def test_equal_rewards_return_the_anchor_and_one_action_takes_all():
    mixture = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    solution = solve_forward_kl(torch.full((4, 5), 3.0, dtype=torch.float64), mixture, 0.5)
    torch.testing.assert_close(solution.log_policy, mixture)
    torch.testing.assert_close(solution.normaliser, torch.full((4,), 0.5, dtype=torch.float64))
    alone = solve_forward_kl(torch.tensor([[7.0]]), torch.zeros(1, 1), 0.5)
    assert alone.log_policy.item() == 0 and alone.normaliser.item() == 0.5


# Shapes, supports and refusals of the solvers themselves.


@pytest.mark.parametrize("solve", [solve_reverse_kl, lambda *given: solve_forward_kl(*given).log_policy])
def test_solvers_broadcast_ignore_unsupported_actions_and_refuse_bad_input(solve):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(7, 3, 4, generator=generator, dtype=torch.float64)
    anchor = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    anchor[1, 2] = -math.inf
    anchor = anchor.log_softmax(-1)
    rewards[:, 1, 2] = math.nan
    policy = solve(rewards, anchor, 0.3)
    assert policy.shape == (7, 3, 4) and policy[:, 1, 2].isneginf().all()
    torch.testing.assert_close(policy.exp().sum(-1), torch.ones(7, 3, dtype=torch.float64))
    torch.testing.assert_close(policy[4, 2], solve(rewards[4, 2], anchor[2], 0.3))
    rewards[5, 0, 3] = math.inf
    refusals = [
        (rewards, anchor, 0.3, "(5, 0, 3)"),
        (torch.zeros(3, 4), anchor, 0.0, "beta is 0"),
        (torch.zeros(3, 4), torch.full((3, 4), -math.inf), 0.3, "action set"),
        (torch.zeros(4), torch.full((4,), -math.inf), 0.3, "action set"),
        (torch.zeros(3, 0), torch.zeros(3, 0), 0.3, "action set"),
        (torch.zeros(3, 4), torch.full((3, 4), math.nan), 0.3, "not a log-probability"),
    ]
    for *given_, part in refusals:
        with pytest.raises(ConfigError) as error:
            solve(*given_)
        assert part in str(error.value) and "\n" not in str(error.value)


def test_the_reverse_solution_is_differentiable_in_the_rewards():
    bandit = problem(0, 2, 4, 0.5, False)
    rewards = bandit.rewards.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda r: solve_reverse_kl(r, bandit.geometric, 0.5), (rewards,))


@DIRECTIONS
def test_gaps_and_objectives_are_differentiable_and_flat_at_the_optimum(direction):
    bandit = problem(1, 3, 4, 0.5, True)
    logits = OPTIMA[direction](bandit).clone().requires_grad_()
    elsewhere = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for function in (GAPS[direction], OBJECTIVES[direction]):
        assert torch.autograd.gradcheck(lambda z, f=function: f(z.log_softmax(-1), bandit), (elsewhere,))
        (slope,) = torch.autograd.grad(function(logits.log_softmax(-1), bandit), logits)
        assert slope.abs().max() < 1e-14


# Values at the edges.


def test_kl_where_mass_is_missing_or_minute():
    half = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    one = torch.tensor([0.0, -math.inf], dtype=torch.float64)
    assert kl(one, half).item() == pytest.approx(math.log(2)) and kl(half, one).item() == math.inf
    assert kl(one, one).item() == 0
    minute = torch.tensor([0.0, -5000.0], dtype=torch.float64)
    assert kl(half, minute).item() == pytest.approx(2500 - math.log(2)) and kl(minute, half).item() == pytest.approx(
        math.log(2)
    )
    assert kl(minute, one).item() == 0 and kl(torch.full((2,), math.nan).double(), half).isnan()


def test_the_unregularised_gap_is_signed():
    bandit = problem(2, 2, 4, 0.5, False)
    optimum = reverse_optimum(bandit)
    sharper = solve_reverse_kl(bandit.rewards, bandit.geometric, 0.1)
    for policy, sign in ((bandit.geometric, 1), (sharper, -1)):
        gap = unregularised_gap(policy, bandit)
        torch.testing.assert_close(gap, mean_reward(optimum, bandit) - mean_reward(policy, bandit))
        assert gap * sign > 0 and reverse_gap(policy, bandit) > 0
    assert unregularised_gap(forward_optimum(bandit), bandit, forward_optimum(bandit)) == 0


@DIRECTIONS
def test_no_random_policy_beats_the_optimum(direction):
    bandit = problem(3, 4, 5, 0.3, True)
    generator = torch.Generator().manual_seed(0)
    scales = 10 ** torch.linspace(-4, 1.5, 2000, dtype=torch.float64)[:, None, None]
    noise = scales * torch.randn(2000, 3, 5, generator=generator, dtype=torch.float64)
    optimum, objective = OPTIMA[direction](bandit), OBJECTIVES[direction]
    best = objective(optimum, bandit)
    rivals = torch.cat([(optimum + noise).log_softmax(-1), noise.log_softmax(-1), bandit.logps.movedim(-1, 0)])
    assert (objective(rivals, bandit) < best).all()


def test_reverse_kl_to_differing_supports_is_refused_and_forward_kl_is_not():
    logps = torch.tensor([[0.5, 0.0], [0.5, 1.0]], dtype=torch.float64).log()[None]
    bandit = FiniteBandit.tabular(torch.tensor([[1.0, 0.0]]), logps, [0.5, 0.5], beta=1.0)
    with pytest.raises(ReferenceSetError, match="reference 1 has no mass"):
        reverse_gap(forward_optimum(bandit), bandit)
    assert forward_gap(bandit.mixture, bandit) > 0
