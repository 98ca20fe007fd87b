"""The Bradley-Terry fits against scipy and against their optimality conditions, inside the ball, on it, and with no ball."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize
from torch import Tensor
from torch.nn.functional import softplus

from polyref.errors import ConfigError, PolyrefError
from polyref.theory import newton
from polyref.theory.estimators import fit_linear, fit_tabular
from polyref.theory.preferences import bradley_terry, pair_law
from polyref.theory.sampling import draw_wins

RIDGE = 1e-3


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(
    pairs: int, replicates: int, *, contexts: int = 3, actions: int = 5, seed: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Wins of a Bradley-Terry crowd, and its rewards."""
    rewards = scale * normal(contexts, actions, seed=seed)
    law = pair_law(
        torch.full((contexts,), 1 / contexts, dtype=torch.float64), normal(contexts, actions, seed=seed + 1).log_softmax(-1)
    )
    return draw_wins(law, bradley_terry(rewards), pairs, replicates, torch.Generator().manual_seed(seed + 2)), rewards


def objective(rewards: Tensor, theta: Tensor, wins: Tensor, linear: Tensor | None = None, ridge: float = RIDGE) -> Tensor:
    """What the fits minimise, from its definition; one number a problem where rewards is (..., Y) and wins (..., Y, Y)."""
    differences = rewards[..., :, None] - rewards[..., None, :]
    value = (wins * softplus(-differences, threshold=100)).sum((-2, -1)) + ridge / 2 * (theta**2).sum(-1)
    return value if linear is None else value - (linear * rewards).sum(-1)


def scipy_minimum(
    wins: Tensor, radius: float | None, linear: Tensor | None = None, features: Tensor | None = None
) -> np.ndarray:
    """One problem by SLSQP (with a ball) or BFGS: wins (X, Y, Y), features (X, Y, d) or the identity of one context."""

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        theta = torch.tensor(x, requires_grad=True)
        rewards = theta[None] if features is None else features @ theta
        total = objective(rewards, theta, wins, linear).sum() - (
            0 if features is None else (len(wins) - 1) * RIDGE / 2 * (theta**2).sum()
        )
        (gradient,) = torch.autograd.grad(total, theta)
        return float(total.detach()), gradient.numpy()

    start = np.zeros(wins.shape[-1] if features is None else features.shape[-1])
    ball = [] if radius is None else [{"type": "ineq", "fun": lambda x: radius**2 - x @ x, "jac": lambda x: -2 * x}]
    return optimize.minimize(
        value, start, jac=True, method="SLSQP", constraints=ball, options={"ftol": 1e-15, "maxiter": 500}
    ).x


@pytest.mark.parametrize("radius", [None, 50.0, 1.5, 0.2])
def test_tabular_fits_are_scipys(radius: float | None) -> None:
    wins, _ = draw(150, 3)
    linear = normal(3, 3, 5, seed=4)
    linear -= linear.mean(-1, keepdim=True)
    for term in (None, linear):
        fitted = fit_tabular(wins, linear=term, radius=radius, ridge=RIDGE)
        for r in range(3):
            for x in range(3):
                expected = scipy_minimum(wins[r, x, None], radius, None if term is None else term[r, x, None])
                np.testing.assert_allclose(fitted[r, x], expected, atol=2e-5)


@pytest.mark.parametrize("radius", [None, 50.0, 0.3])
def test_linear_fits_are_scipys_with_shared_features_and_with_one_set_a_replicate(radius: float | None) -> None:
    wins, _ = draw(150, 4)
    features, linear = normal(4, 3, 5, 2, seed=5), normal(4, 3, 5, seed=6)
    own = fit_linear(wins, features, linear=linear, radius=radius, ridge=RIDGE)
    shared = fit_linear(wins, features[0], linear=linear, radius=radius, ridge=RIDGE)
    torch.testing.assert_close(shared[0], own[0], rtol=1e-9, atol=1e-12)
    for r in range(4):
        np.testing.assert_allclose(own[r], scipy_minimum(wins[r], radius, linear[r], features[r]), atol=2e-5)


@given(
    seed=st.integers(0, 10**6),
    actions=st.integers(2, 8),
    pairs=st.integers(1, 400),
    radius=st.sampled_from([None, 0.01, 1.0, 5.0, 100.0]),
    ridge=st.sampled_from([1e-8, 1e-4, 1.0]),
    pull=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_every_fit_meets_the_conditions_of_its_optimum(
    seed: int, actions: int, pairs: int, radius: float | None, ridge: float, pull: float
) -> None:
    """grad f = -m r with m >= 0, and m = 0 off the sphere; tables from empty to separable, any linear term inside a ball."""
    wins, _ = draw(pairs, 2, actions=actions, seed=seed, scale=3.0)
    linear = None if radius is None else pull * normal(2, 3, actions, seed=seed)
    fitted = fit_tabular(wins, linear=linear, radius=radius, ridge=ridge)
    rewards = fitted.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(rewards, rewards, wins, linear, ridge).sum(), rewards)
    gradient = gradient - gradient.mean(-1, keepdim=True)
    norm = fitted.norm(dim=-1)
    assert fitted.sum(-1).abs().max() < 1e-9 * (1 + norm.max())
    if radius is not None:
        assert (norm <= radius * (1 + 1e-9)).all()
    multiplier = -(gradient * fitted).sum(-1) / norm.clamp(min=1e-300) ** 2
    on_sphere = norm >= (math.inf if radius is None else radius) * (1 - 1e-9)
    residual = (gradient + torch.where(on_sphere, multiplier, 0.0)[..., None] * fitted).norm(dim=-1)
    assert (residual <= 1e-8 * (1 + pull + wins.sum((-2, -1)))).all()
    assert (multiplier[on_sphere] >= -1e-8).all()


def test_the_estimate_tends_to_the_truth_at_the_root_n_rate() -> None:
    def error(pairs: int) -> float:
        wins, rewards = draw(pairs, 200)
        centred = rewards - rewards.mean(-1, keepdim=True)
        return float(((fit_tabular(wins, radius=20.0) - centred) ** 2).mean().sqrt())

    errors = [error(n) for n in (1_000, 4_000, 16_000)]
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.12)
    assert errors[2] / errors[1] == pytest.approx(0.5, abs=0.06)


def test_expected_wins_give_back_the_rewards() -> None:
    rewards = normal(2, 3, 5, seed=1)
    torch.testing.assert_close(
        fit_tabular(bradley_terry(rewards), ridge=1e-14), rewards - rewards.mean(-1, keepdim=True), rtol=0, atol=1e-9
    )
    features, theta = normal(3, 5, 4, seed=2), normal(4, seed=3)
    torch.testing.assert_close(fit_linear(bradley_terry(features @ theta), features, ridge=1e-14), theta, rtol=0, atol=1e-9)


def test_separable_tables_end_on_the_sphere_or_where_the_ridge_holds_them_and_no_data_says_nothing() -> None:
    wins = torch.zeros(2, 3, 3, dtype=torch.float64)
    wins[0] = torch.triu(torch.full((3, 3), 5.0), 1)
    inside, free = fit_tabular(wins, radius=4.0), fit_tabular(wins, ridge=1e-6)
    assert inside[0].norm() == pytest.approx(4.0)
    assert free[0, 0] > free[0, 1] > free[0, 2]
    assert 10 < free[0].norm() < 40
    assert (inside[1] == 0).all()


@pytest.mark.parametrize("radius", [None, 2.0, 1e3])
def test_groups_of_actions_never_compared_converge_whatever_the_size_of_the_data(radius: float | None) -> None:
    wins = torch.zeros(1, 6, 6, dtype=torch.float64)
    wins[0, :3, :3] = 1e7 * bradley_terry(normal(1, 3, seed=1))[0]
    wins[0, 3:5, 3:5] = 1e7 * bradley_terry(normal(1, 2, seed=2))[0]
    rewards = fit_tabular(wins, radius=radius)[0]
    for group in (slice(0, 3), slice(3, 5)):
        torch.testing.assert_close(bradley_terry(rewards[None, group])[0] * 1e7, wins[0, group, group], rtol=1e-4, atol=0)


def test_problems_do_not_touch_each_other_and_axes_are_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    wins, _ = draw(60, 12)
    together = fit_tabular(wins.view(3, 4, 3, 5, 5), radius=1.0)
    monkeypatch.setattr(newton, "_BLOCK_ELEMENTS", 1)
    blocks = fit_tabular(wins.repeat(3, 1, 1, 1), radius=1.0)
    alone = torch.stack([fit_tabular(one, radius=1.0) for one in wins])
    torch.testing.assert_close(together.view(12, 3, 5), alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(blocks, alone.repeat(3, 1, 1), rtol=0, atol=1e-10)


def test_not_converging_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton, "MAX_STEPS", 2)
    with pytest.raises(PolyrefError, match="did not converge in 2 steps"):
        fit_tabular(draw(50, 2)[0])


def test_bad_input_is_refused_in_one_line() -> None:
    wins, _ = draw(10, 2)
    with pytest.raises(ConfigError, match=r"wins \(5, 5\): is not"):
        fit_tabular(wins[0, 0])
    with pytest.raises(ConfigError, match="negative or not finite"):
        fit_tabular(-wins)
    with pytest.raises(ConfigError, match=r"linear \(3, 5\)"):
        fit_tabular(wins, linear=torch.zeros(3, 5))
    with pytest.raises(ConfigError, match="radius is 0"):
        fit_tabular(wins, radius=0.0)
    with pytest.raises(ConfigError, match="ridge is 0"):
        fit_tabular(wins, ridge=0.0)
    with pytest.raises(ConfigError, match="tolerance is 2"):
        fit_tabular(wins, tolerance=2.0)
    with pytest.raises(ConfigError, match=r"features \(3, 4, 2\) do not fit wins \(2, 3, 5, 5\)"):
        fit_linear(wins, torch.zeros(3, 4, 2))
