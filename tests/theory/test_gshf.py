"""Offline learners: optimality by duality and by brute force, limits in the scale, and the enhancer against all directions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor

from polyref.errors import ConfigError
from polyref.theory import gshf
from polyref.theory.bandit import FiniteBandit, random_bandit
from polyref.theory.enhancer import enhance
from polyref.theory.solutions import reverse_optimum
from polyref.theory.values import reverse_gap

REPLICATES, CONTEXTS, ACTIONS, DIMENSION = 12, 3, 5, 3


def problem(seed: int, beta: float = 0.3, dimension: int = DIMENSION) -> tuple[FiniteBandit, Tensor, Tensor]:
    """A batch of bandits, with an estimate and a covariance as a few comparisons would leave them."""
    generator = torch.Generator().manual_seed(seed)
    bandit = random_bandit(
        generator,
        replicates=(REPLICATES,),
        contexts=CONTEXTS,
        actions=ACTIONS,
        references=2,
        beta=beta,
        features=dimension,
    )
    rates = 4 * torch.rand(REPLICATES, CONTEXTS, ACTIONS, ACTIONS, generator=generator, dtype=torch.float64)
    matrix = gshf.covariance(torch.poisson(rates, generator=generator), bandit.features, ridge=0.5)
    assert bandit.theta is not None
    theta = bandit.theta + torch.randn(REPLICATES, dimension, generator=generator, dtype=torch.float64)
    return bandit, theta, matrix


def test_covariance_is_the_sum_over_pairs() -> None:
    bandit, _, _ = problem(0)
    generator = torch.Generator().manual_seed(1)
    wins = torch.randint(0, 3, (REPLICATES, CONTEXTS, ACTIONS, ACTIONS), generator=generator).to(torch.float64)
    expected = 0.7 * torch.eye(DIMENSION, dtype=torch.float64).expand(REPLICATES, -1, -1).clone()
    for x in range(CONTEXTS):
        for i in range(ACTIONS):
            for j in range(ACTIONS):
                step = bandit.features[:, x, i] - bandit.features[:, x, j]
                expected += wins[:, x, i, j, None, None] * step[:, :, None] * step[:, None, :]
    torch.testing.assert_close(gshf.covariance(wins, bandit.features, 0.7), expected)


def test_bonus_is_the_inverse_norm_and_nothing_at_nu() -> None:
    bandit, _, matrix = problem(2)
    nu = bandit.features[:, 0, 0]
    charge = gshf.bonus(bandit.features, nu, matrix, 2.0)
    step = bandit.features[:, 1, 2] - nu
    direct = (step * torch.linalg.solve(matrix, step.unsqueeze(-1)).squeeze(-1)).sum(-1).sqrt()
    torch.testing.assert_close(charge[:, 1, 2], 2 * direct)
    assert float(charge[:, 0, 0].abs().max()) == 0


@pytest.mark.parametrize(("scale", "beta"), [(0.2, 0.5), (2.0, 0.3), (20.0, 0.1), (500.0, 0.05), (1e-6, 1.0)])
def test_policy_level_value_meets_its_certificate(scale: float, beta: float) -> None:
    """The primal value of the returned policy equals the dual bound, so nothing beats it."""
    bandit, theta, matrix = problem(3, beta)
    found = gshf.solve_policy_level(theta, matrix, bandit, scale=scale)
    primal = gshf.pessimistic_value(found.log_policy, theta, matrix, bandit, scale=scale)
    torch.testing.assert_close(primal, found.value, rtol=0, atol=1e-12)
    assert float(found.gap.min()) >= -1e-14 * (1 + scale)
    assert float((found.gap / (1 + scale)).max()) <= 1e-9


def test_policy_level_agrees_with_brute_force() -> None:
    """scipy over the policy's logits reaches the same value, from above nothing, to 1e-8."""
    bandit, theta, matrix = problem(4)
    found = gshf.solve_policy_level(theta, matrix, bandit, scale=1.0)
    for r in range(4):
        one = FiniteBandit.tabular(
            bandit.rewards[r], bandit.logps[r], bandit.weights, beta=bandit.beta, features=bandit.features[r]
        )

        def cost(flat: np.ndarray, one: FiniteBandit = one, r: int = r) -> tuple[float, np.ndarray]:
            logits = torch.tensor(flat.reshape(CONTEXTS, ACTIONS), requires_grad=True)
            value = gshf.pessimistic_value(logits.log_softmax(-1), theta[r], matrix[r], one, scale=1.0)
            (gradient,) = torch.autograd.grad(-value, logits)
            return -float(value.detach()), gradient.numpy().ravel()

        start = bandit.geometric[r].numpy().ravel() + 0.1 * np.random.default_rng(r).normal(size=CONTEXTS * ACTIONS)
        best = optimize.minimize(cost, start, jac=True, method="L-BFGS-B", options={"ftol": 1e-16, "gtol": 1e-11})
        assert -best.fun == pytest.approx(float(found.value[r]), abs=1e-8)


def test_policy_level_beats_the_others_on_its_own_objective() -> None:
    bandit, theta, matrix = problem(5)
    level = gshf.solve_policy_level(theta, matrix, bandit, scale=1.0)
    others = [
        gshf.offline_greedy(theta, matrix, bandit),
        gshf.offline_pointwise(theta, matrix, bandit, scale=1.0),
        bandit.geometric,
        (level.log_policy + 0.05 * torch.randn(level.log_policy.shape, generator=torch.Generator().manual_seed(0))).log_softmax(
            -1
        ),
    ]
    for other in others:
        assert (gshf.pessimistic_value(other, theta, matrix, bandit, scale=1.0) < level.value).all()


def test_without_bonus_both_are_greedy_and_with_a_vast_one_neither_moves_its_mean_feature() -> None:
    bandit, theta, matrix = problem(6)
    greedy = gshf.offline_greedy(theta, matrix, bandit)
    for learner in (gshf.offline_pointwise, gshf.offline_policy_level):
        torch.testing.assert_close(learner(theta, matrix, bandit, scale=0.0), greedy)
    held = gshf.offline_policy_level(theta, matrix, bandit, scale=1e4)
    nu = gshf.mean_feature(bandit.features, bandit.geometric, bandit.contexts)
    torch.testing.assert_close(gshf.mean_feature(bandit.features, held, bandit.contexts), nu, rtol=0, atol=1e-7)
    assert bandit.theta is not None
    assert float(reverse_gap(gshf.offline_greedy(bandit.theta, matrix, bandit), bandit).max()) < 1e-12


def test_the_policy_level_charge_is_at_most_the_mean_pointwise_bonus() -> None:
    bandit, theta, matrix = problem(7)
    level = gshf.solve_policy_level(theta, matrix, bandit, scale=1.5)
    point = gshf.offline_pointwise(theta, matrix, bandit, scale=1.5)
    nu = gshf.mean_feature(bandit.features, bandit.geometric, bandit.contexts)
    mean_bonus = bandit.mean((point.exp() * gshf.bonus(bandit.features, nu, matrix, 1.5)).sum(-1))
    charged = gshf.pessimistic_value(point, theta, matrix, bandit, scale=0.0) - mean_bonus
    assert (charged <= level.value + 1e-12).all()


def test_unsupported_actions_stay_out_and_reach_nothing() -> None:
    """Poisoned features where no reference has mass change neither learner nor enhancer."""
    bandit, theta, matrix = problem(8)
    logps = bandit.logps.clone()
    logps[:, 0, 1] = -math.inf
    logps = logps.log_softmax(-2)
    poisoned = bandit.features.clone()
    poisoned[:, 0, 1] = 1e6
    policies = []
    for features in (bandit.features, poisoned):
        own = FiniteBandit.tabular(bandit.rewards, logps, bandit.weights, beta=bandit.beta, features=features)
        main = gshf.offline_policy_level(theta, matrix, own, scale=1.0)
        second = enhance(main, gshf.linear_features(own), matrix, own.contexts, own.beta, scale=1.0).log_policy
        policies.append(torch.stack([main, second, gshf.offline_pointwise(theta, matrix, own, scale=1.0)]))
    torch.testing.assert_close(policies[0], policies[1])
    assert (policies[0][:, :, 0, 1] == -math.inf).all()


@pytest.mark.parametrize("scale", [0.05, 0.5, 5.0, 100.0])
def test_enhancer_is_inside_its_set_and_explores_at_least_as_much_as_candidates_there(scale: float) -> None:
    bandit, _, matrix = problem(9)
    main = reverse_optimum(bandit)
    anchor = bandit.geometric
    found = enhance(main, bandit.features, matrix, bandit.contexts, bandit.beta, scale=scale, candidates=anchor.unsqueeze(-3))
    assert (scale * found.exploration >= bandit.beta * found.kl - 1e-10).all()
    psi = gshf.whiten(bandit.features, gshf.mean_feature(bandit.features, main, bandit.contexts), matrix)
    moved = gshf.mean_feature(psi, anchor, bandit.contexts).norm(dim=-1)
    to_main = bandit.mean((anchor.exp() * (anchor - main)).sum(-1))
    inside = scale * moved >= bandit.beta * to_main
    assert (found.exploration[inside] >= moved[inside] - 1e-6).all()
    assert (found.exploration > 0).all()
    torch.testing.assert_close(found.log_policy.logsumexp(-1), torch.zeros(REPLICATES, CONTEXTS, dtype=torch.float64))


def test_enhancer_finds_the_optimum_over_all_directions_of_the_plane() -> None:
    """With two features every direction can be tried: an exhaustive search, by other code, finds nothing better."""
    bandit, _, matrix = problem(10, dimension=2)
    main, scale = reverse_optimum(bandit), 0.5
    found = enhance(main, bandit.features, matrix, bandit.contexts, bandit.beta, scale=scale)
    root = torch.linalg.inv(torch.linalg.cholesky(matrix))
    white = (bandit.features @ root.mT.unsqueeze(-3)).numpy()
    rho, log_main = bandit.contexts.numpy(), main.numpy()
    for r in range(4):
        best = 0.0
        for angle in np.linspace(0, 2 * np.pi, 90, endpoint=False):
            score = white[r] @ np.array([np.cos(angle), np.sin(angle)])
            for s in scale / bandit.beta + np.geomspace(1e-3, 200, 300):
                logits = log_main[r] + s * score
                log_policy = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
                policy = np.exp(log_policy)
                moved = np.einsum("x,xy,xyd->d", rho, policy - np.exp(log_main[r]), white[r])
                kl = rho @ (policy * (log_policy - log_main[r])).sum(-1)
                if scale * np.linalg.norm(moved) >= bandit.beta * kl:
                    best = max(best, float(np.linalg.norm(moved)))
        assert float(found.exploration[r]) >= 0.999 * best


def test_enhancer_of_scale_zero_is_the_main_agent() -> None:
    bandit, _, matrix = problem(11)
    main = reverse_optimum(bandit)
    found = enhance(main, bandit.features, matrix, bandit.contexts, bandit.beta, scale=0.0)
    torch.testing.assert_close(found.log_policy, main)


def test_bad_input_is_one_line() -> None:
    bandit, theta, matrix = problem(12)
    with pytest.raises(ConfigError, match="ridge is 0"):
        gshf.covariance(torch.ones(CONTEXTS, ACTIONS, ACTIONS, dtype=torch.float64), bandit.features, ridge=0)
    with pytest.raises(ConfigError, match="scale of the bonus is -1"):
        gshf.offline_policy_level(theta, matrix, bandit, scale=-1)
    for scale in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="scale of the bonus is"):
            gshf.offline_pointwise(theta, matrix, bandit, scale=scale)
        with pytest.raises(ConfigError, match="scale of the bonus is"):
            gshf.pessimistic_value(bandit.geometric, theta, matrix, bandit, scale=scale)
    for broken in (-matrix, matrix * math.nan, matrix[..., :1, :]):
        for learner in (gshf.offline_pointwise, gshf.offline_policy_level):
            with pytest.raises(ConfigError, match="S of shape .* is not positive definite"):
                learner(theta, broken, bandit, scale=1.0)
    for changed, what in (
        ({"delta": 0.0}, "delta 0"),
        ({"delta": 1e3}, "delta 1000"),
        ({"radius": -1.0}, "radius -1"),
        ({"radius": 1e4}, "radius 10000.* is beyond float64"),
        ({"ridge": math.nan}, "ridge nan"),
    ):
        with pytest.raises(ConfigError, match=what):
            gshf.bonus_scale(**({"dimension": 3, "radius": 1.0, "ridge": 1.0, "delta": 0.1} | changed))
    tabular = FiniteBandit.tabular(bandit.rewards, bandit.logps, beta=1.0)
    with pytest.raises(ConfigError, match="no features"):
        gshf.offline_greedy(theta, matrix, tabular)
