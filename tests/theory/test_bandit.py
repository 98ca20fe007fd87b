"""Finite bandits: compositions with replicates and weights per context, removed members, coverage, and what is refused."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyref import theory
from polyref.errors import ConfigError, ReferenceSetError
from polyref.theory.bandit import FiniteBandit, random_bandit, with_coverage
from polyref.theory.coverage import chi_square_coverage, density_coverage, feature_coverage
from polyref.theory.solutions import forward_optimum, reverse_optimum
from polyref.theory.values import (
    forward_gap,
    forward_objective,
    kl_decomposition,
    mean_reward,
    reverse_gap,
    reverse_objective,
    reverse_value,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def references(*shape: int, seed: int = 0) -> torch.Tensor:
    """(..., X, Y, K), normalised over Y."""
    return doubles(*shape, seed=seed).log_softmax(-2)


def assert_one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    text = str(error.value)
    assert isinstance(error.value, ValueError) and "\n" not in text
    for part in parts:
        assert part in text, text


# Compositions.


@given(st.integers(0, 999), st.integers(1, 6), st.booleans())
def test_the_compositions_are_products_and_sums_action_by_action(seed, members, per_context):
    logps = references(2, 3, 4, members, seed=seed)
    weights = doubles(*((2, 3) if per_context else ()), members, seed=seed + 1).softmax(-1)
    bandit = FiniteBandit(doubles(3, 4), logps, weights, beta=1.0)
    for r, x in itertools.product(range(2), range(3)):
        a = (weights[r, x] if per_context else weights).tolist()
        p = logps[r, x].exp().tolist()
        mixture = [sum(w * q for w, q in zip(a, row, strict=True)) for row in p]
        product = [math.prod(q**w for w, q in zip(a, row, strict=True)) for row in p]
        torch.testing.assert_close(bandit.mixture[r, x].exp().tolist(), mixture)
        torch.testing.assert_close(bandit.geometric[r, x].exp().tolist(), [q / sum(product) for q in product])
        assert math.isclose(bandit.log_f[r, x].exp(), sum(product), rel_tol=1e-12) and sum(product) <= 1 + 1e-12


def test_rejection_accepts_at_the_rate_f_and_what_it_accepts_is_the_geometric_composition():
    """Proposals from M_a kept with prod pi_i^{a_i} / sum a_i pi_i: at most 1 (AM-GM); enumerated, then simulated."""
    bandit = random_bandit(seeded(3), contexts=1, actions=5, references=3, beta=1.0, weights=[0.5, 0.2, 0.3])
    keep = (bandit.log_product - bandit.mixture).exp()
    assert (keep <= 1 + 1e-12).all()
    torch.testing.assert_close((bandit.mixture.exp() * keep).sum(-1), bandit.log_f.exp())
    number, generator = 200_000, seeded(4)
    member = torch.multinomial(bandit.weights, number, replacement=True, generator=generator)
    cumulative = bandit.logps[0].exp().cumsum(0).T[member]
    uniform = torch.rand(number, 1, generator=generator, dtype=torch.float64)
    action = (uniform > cumulative).sum(-1).clamp(max=4)
    accepted = torch.rand(number, generator=generator, dtype=torch.float64) < keep[0, action]
    f = bandit.log_f.exp().item()
    assert abs(accepted.double().mean().item() - f) < 4 * math.sqrt(f * (1 - f) / number)
    counts = torch.bincount(action[accepted], minlength=5).double()
    expected = bandit.geometric[0].exp() * counts.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi-square with 4 degrees of freedom at 0.999


def test_each_replicate_and_context_stands_alone():
    weights = doubles(2, 3, 2, seed=5).softmax(-1)
    rewards, logps, rho = doubles(2, 3, 4), references(3, 4, 2), doubles(3, seed=9).softmax(-1)
    whole = FiniteBandit(rewards, logps, weights, 0.7, rho)
    assert whole.size == (3, 4, 2) and whole.replicates == (2,)
    values = []
    for r, x in itertools.product(range(2), range(3)):
        single = FiniteBandit(rewards[r, x : x + 1], logps[x : x + 1], weights[r, x], 0.7)
        torch.testing.assert_close(reverse_optimum(whole)[r, x], reverse_optimum(single)[0])
        torch.testing.assert_close(forward_optimum(whole)[r, x], forward_optimum(single)[0])
        values.append(rho[x] * reverse_value(single))
    torch.testing.assert_close(reverse_value(whole), torch.stack(values).view(2, 3).sum(-1))


@pytest.mark.parametrize("content", [-math.inf, math.nan, math.inf, 3.0])
@pytest.mark.parametrize("per_context", [False, True])
def test_members_of_weight_zero_are_removed_whatever_they_hold(content, per_context):
    logps, rewards, policy = references(2, 4, 3), doubles(2, 4), references(2, 4, 1, seed=7)[..., 0]
    kept = torch.tensor([0.4, 0.0, 0.6], dtype=torch.float64)
    weights = kept.expand(2, 3) if per_context else kept
    holding = logps.clone()
    holding[0, :, 1] = content
    with_it = FiniteBandit(rewards, holding, weights, 0.5)
    without = FiniteBandit(rewards, logps[..., [0, 2]], kept[[0, 2]], 0.5)
    functions = (reverse_objective, forward_objective, reverse_gap, forward_gap)
    for one, other in [(f(policy, with_it), f(policy, without)) for f in functions]:
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(reverse_optimum(with_it), reverse_optimum(without))
    torch.testing.assert_close(forward_optimum(with_it), forward_optimum(without))
    torch.testing.assert_close(reverse_value(with_it), reverse_value(without))


@pytest.mark.parametrize("padding", [math.nan, math.inf, 1e6])
def test_actions_that_no_reference_supports_change_nothing(padding):
    rewards, logps, weights = doubles(2, 3), references(2, 3, 2), [0.3, 0.7]
    wide_rewards = torch.cat([rewards, torch.full((2, 1), padding, dtype=torch.float64)], dim=-1)
    wide_logps = torch.cat([logps, torch.full((2, 1, 2), -math.inf, dtype=torch.float64)], dim=1)
    narrow = FiniteBandit.tabular(rewards, logps, weights, beta=0.5)
    wide = FiniteBandit.tabular(wide_rewards, wide_logps, weights, beta=0.5)
    for optimum in (reverse_optimum, forward_optimum):
        torch.testing.assert_close(optimum(wide)[:, :3], optimum(narrow))
        assert optimum(wide)[:, 3].isneginf().all()
    logits = doubles(2, 4, seed=2).requires_grad_()
    policy = logits.masked_fill(wide.mixture.isneginf(), -math.inf).log_softmax(-1)
    for function in (reverse_objective, forward_objective, reverse_gap, forward_gap, mean_reward):
        value = function(policy, wide)
        torch.testing.assert_close(value, function(policy[:, :3], narrow))
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        assert gradient.isfinite().all() and (gradient[:, 3] == 0).all()


def test_differing_supports_are_refused_by_the_geometric_composition_alone():
    logps = references(2, 3, 2)
    logps[1, 2, 1] = -math.inf
    logps[1, :, 1] = logps[1, :, 1].log_softmax(-1)
    bandit = FiniteBandit.tabular(doubles(2, 3), logps, beta=0.5)
    assert forward_optimum(bandit).isfinite().all()
    assert forward_objective(forward_optimum(bandit), bandit).isfinite()
    for refused in (
        lambda: bandit.geometric,
        lambda: bandit.log_f,
        lambda: reverse_optimum(bandit),
        lambda: reverse_value(bandit),
    ):
        with pytest.raises(ReferenceSetError) as error:
            refused()
        assert_one_line(error, "reference 1 has no mass", "(1, 2)", "(2, 3, 2)")
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    assert FiniteBandit(doubles(2, 3), logps, weights, 0.5).geometric.isfinite().all()


# Random problems and coverage.


def test_random_bandits_repeat_and_keep_their_promises():
    sizes = dict(replicates=(2,), contexts=3, actions=4, references=2, beta=0.5)
    one, other = (random_bandit(seeded(1), **sizes, features=3, reward_range=2.0) for _ in range(2))
    assert torch.equal(one.rewards, other.rewards) and torch.equal(one.logps, other.logps)
    assert one.features.shape == (2, 3, 4, 3) and one.theta.shape == (2, 3) and one.logps.shape == (2, 3, 4, 2)
    assert (one.features.norm(dim=-1) <= 1 + 1e-12).all()
    torch.testing.assert_close(one.theta.norm(dim=-1), torch.full((2,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(one.rewards, torch.einsum("rxyd,rd->rxy", one.features, one.theta))
    tabular = random_bandit(seeded(1), **sizes, reward_range=3.0).rewards
    assert tabular.min() >= 0 and 2 < tabular.max() <= 3


@given(st.integers(0, 999), st.floats(1e-8, 0.9))
def test_coverage_sets_the_mass_of_the_best_action_and_keeps_the_other_proportions(seed, mass):
    bandit = random_bandit(seeded(seed), replicates=(2,), contexts=3, actions=4, references=2, beta=0.1)
    covered = with_coverage(bandit, mass)
    best = bandit.rewards.argmax(-1, keepdim=True)
    for law in (covered.mixture, *covered.logps.unbind(-1)):
        chosen = law.gather(-1, best).exp()
        torch.testing.assert_close(chosen, torch.full_like(chosen, mass))
    ratio = (covered.logps - bandit.logps).scatter(-2, best[..., None].expand(2, 3, 1, 2), math.nan)
    assert (ratio.nan_to_num(-math.inf).amax(-2) - ratio.nan_to_num(math.inf).amin(-2)).abs().max() < 1e-9


def test_coverage_constants_against_sums_over_actions():
    target, sampling = references(3, 4, 1)[..., 0], references(3, 4, 1, seed=1)[..., 0]
    rho = doubles(3, seed=2).softmax(-1)
    pi, mu = target.exp(), sampling.exp()
    assert density_coverage(target, sampling) == max((pi[x, y] / mu[x, y]).item() for x in range(3) for y in range(4))
    expected = sum(rho[x] * pi[x, y] ** 2 / mu[x, y] for x in range(3) for y in range(4))
    torch.testing.assert_close(chi_square_coverage(target, sampling, rho), expected)
    torch.testing.assert_close(chi_square_coverage(target, target), torch.tensor(1.0, dtype=torch.float64))
    features, nu, root = doubles(3, 4, 2, seed=3), doubles(2, seed=4), doubles(2, 2, seed=5)
    covariance = root @ root.T + torch.eye(2, dtype=torch.float64)
    residual = sum(rho[x] * pi[x, y] * features[x, y] for x in range(3) for y in range(4)) - nu
    norm = (residual @ covariance.inverse() @ residual).sqrt()
    torch.testing.assert_close(feature_coverage(features, target, covariance, nu, rho), norm)
    replicated = feature_coverage(features, target.expand(5, 3, 4), covariance.expand(5, 2, 2), nu, rho)
    torch.testing.assert_close(replicated, norm.expand(5))


def test_coverage_constants_where_mass_is_missing():
    some = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    both = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    assert density_coverage(some, both) == pytest.approx(2) and chi_square_coverage(some, both) == pytest.approx(2)
    assert density_coverage(both, some) == math.inf and chi_square_coverage(both, some) == math.inf
    with pytest.raises(ConfigError) as error:
        feature_coverage(torch.zeros(1, 2, 2), both, torch.zeros(2, 2), torch.zeros(2))
    assert_one_line(error, "(2, 2)", "positive definite")


# What is refused.


def changed(**changes: object) -> FiniteBandit:
    given = {"rewards": doubles(3, 4), "logps": references(3, 4, 2), "weights": torch.tensor([0.5, 0.5]), "beta": 0.5}
    return FiniteBandit(**(given | changes))


def poisoned(value: float) -> torch.Tensor:
    rewards = doubles(3, 4)
    rewards[2, 1] = value
    return rewards


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite(value):
    with pytest.raises(ConfigError) as error:
        changed(rewards=poisoned(value))
    assert_one_line(error, "not finite", "(3, 4)", "(2, 1)")


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_beta_out_of_range(beta):
    with pytest.raises(ConfigError) as error:
        changed(beta=beta)
    assert_one_line(error, "beta", str(beta))


@pytest.mark.parametrize("weights", [[0.5, 0.6], [1.5, -0.5], [math.nan, 1.0]])
def test_weights_off_the_simplex(weights):
    with pytest.raises(ReferenceSetError) as error:
        changed(weights=torch.tensor(weights))
    assert_one_line(error, "simplex")
    with pytest.raises(ReferenceSetError) as error:
        changed(weights=torch.tensor([[0.5, 0.5], [0.5, 0.5], weights]))
    assert_one_line(error, "simplex", "row 2")


def test_empty_action_sets():
    for shape in [(3, 0), (0, 4)]:
        with pytest.raises(ConfigError) as error:
            changed(rewards=torch.zeros(shape), logps=torch.zeros(*shape, 2), contexts=torch.full(shape[:1], 1 / 3))
        assert_one_line(error, "empty", str(shape))
    logps = references(3, 4, 2)
    logps[1] = -math.inf
    with pytest.raises(ReferenceSetError) as error:
        changed(logps=logps)
    assert_one_line(error, "empty", "(1, 0)", "(3, 4, 2)")


def test_references_that_are_no_distributions():
    logps = references(3, 4, 2)
    logps[1, :, 1] += 0.1
    with pytest.raises(ReferenceSetError) as error:
        changed(logps=logps)
    assert_one_line(error, "sum to 1.10517", "(1, 1)")
    logps[1, 0, 1] = math.nan
    with pytest.raises(ReferenceSetError) as error:
        changed(logps=logps)
    assert_one_line(error, "sum to nan", "(1, 1)")


@pytest.mark.parametrize(
    "changes",
    [
        {"rewards": doubles(4)},
        {"rewards": doubles(4, 3)},
        {"logps": references(4, 2)},
        {"weights": torch.ones(3) / 3},
        {"weights": torch.ones(2, 2) / 2},
        {"contexts": torch.ones(2) / 2},
        {"features": doubles(3, 5, 2)},
        {"features": doubles(3, 4, 2), "theta": doubles(3)},
        {"rewards": doubles(2, 3, 4), "logps": references(5, 3, 4, 2)},
    ],
)
def test_shapes_that_do_not_fit(changes):
    with pytest.raises(ConfigError) as error:
        changed(**changes)
    assert_one_line(error, "shapes do not fit", "rewards (")


def test_a_problem_without_references_and_a_best_action_that_is_alone_are_refused():
    with pytest.raises(ConfigError) as error:
        FiniteBandit.tabular(doubles(3, 4), doubles(3, 4, 0), beta=1.0)
    assert_one_line(error, "shapes do not fit", "logps (3, 4, 0)")
    single = FiniteBandit.tabular(doubles(3, 1), torch.zeros(3, 1, 2), beta=1.0)
    with pytest.raises(ConfigError) as error:
        with_coverage(single, 0.3)
    assert_one_line(error, "coverage 0.3", "context and reference (0, 0)", "at least two actions")
    point = torch.tensor([[[0.3, 1.0], [0.7, 0.0]]], dtype=torch.float64).log()
    rewards = torch.tensor([[1.0, 0.0]])
    with pytest.raises(ConfigError) as error:
        with_coverage(FiniteBandit.tabular(rewards, point, beta=1.0), 0.3)
    assert_one_line(error, "context and reference (0, 1)")
    removed = with_coverage(FiniteBandit.tabular(rewards, point, [1.0, 0.0], beta=1.0), 0.3)
    torch.testing.assert_close(removed.mixture.exp(), torch.tensor([[0.3, 0.7]]).double())


def test_lists_and_arrays_make_the_same_problem_as_tensors():
    rewards, logps = doubles(3, 4), references(3, 4, 2)
    made = FiniteBandit.tabular(rewards, logps, [0.3, 0.7], beta=1.0)
    for other in (
        FiniteBandit.tabular(rewards.tolist(), logps.tolist(), [0.3, 0.7], beta=1.0, contexts=[1 / 3] * 3),
        FiniteBandit.tabular(rewards.numpy(), logps.numpy(), numpy.array([0.3, 0.7]), beta=1.0),
        FiniteBandit.linear(rewards[..., None].tolist(), [1.0], logps.tolist(), [0.3, 0.7], beta=1.0),
    ):
        torch.testing.assert_close(reverse_optimum(other), reverse_optimum(made))


def test_contexts_off_the_simplex_and_coverage_out_of_range():
    with pytest.raises(ConfigError) as error:
        changed(contexts=torch.ones(3))
    assert_one_line(error, "contexts (3,)", "simplex")
    for mass in (0.0, 1.0, math.nan):
        with pytest.raises(ConfigError) as error:
            with_coverage(changed(), mass)
        assert_one_line(error, "coverage", str(mass))
    with pytest.raises(ConfigError) as error:
        FiniteBandit.linear(doubles(3, 4, 2), doubles(3), references(3, 4, 2), beta=1.0)
    assert_one_line(error, "(3, 4, 2)", "(3,)")


def test_a_policy_that_is_a_member_costs_the_kl_to_the_others():
    bandit = changed()
    member = bandit.logps[..., 0]
    parts = kl_decomposition(member, bandit)
    direct = 0.5 * (member.exp() * (member - bandit.logps[..., 1])).sum(-1)
    torch.testing.assert_close(parts.to_members, direct)


def test_the_room_lists_every_name_it_gives_and_none_waits_for_torch():
    assert all(getattr(theory, name) is not None for name in theory.__all__)
    assert set(theory.__all__) <= set(dir(theory)) and theory.FiniteBandit is FiniteBandit
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = theory.absent
    code = "import sys, polyref.theory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
