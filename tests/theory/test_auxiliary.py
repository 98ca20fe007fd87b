"""Auxiliary models, the variance-reduced terms by enumeration, and the doubly robust win rate with each half right or wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from polyref.errors import ConfigError
from polyref.objectives.pairwise import sigmoid
from polyref.objectives.variance_reduced import variance_reduced
from polyref.theory.auxiliary import G_QUALITIES, distorted, doubly_robust_win_rate, variance_reduced_terms
from polyref.theory.checks import check_preference
from polyref.theory.estimators import fit_linear, fit_tabular
from polyref.theory.preferences import MISSPECIFICATIONS, bradley_terry, pair_law
from polyref.theory.sampling import count_wins, draw_pairs, draw_wins

X, Y = 2, 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def crowd(name: str = "intransitive") -> Tensor:
    return MISSPECIFICATIONS[name](normal(X, Y, seed=1), generator(2))


def law(*, distinct: bool = True) -> Tensor:
    """Different policies for the first and the second action: the law of a pair is not that of the pair turned round."""
    rho = torch.tensor([0.3, 0.7], dtype=torch.float64)
    return pair_law(rho, normal(X, Y, seed=3).log_softmax(-1), normal(X, Y, seed=4).log_softmax(-1), distinct=distinct)


def gradient(terms: tuple[Tensor, Tensor | None], rewards: Tensor) -> Tensor:
    """Of the objective that the fits state, by autograd: (..., X, Y)."""
    wins, linear = terms
    r = rewards.expand(*wins.shape[:-1]).clone().requires_grad_()
    total = -(wins * logsigmoid(r[..., :, None] - r[..., None, :])).sum()
    return torch.autograd.grad(total if linear is None else total - (linear * r).sum(), r)[0]


@pytest.mark.parametrize("name", G_QUALITIES)
@pytest.mark.parametrize("shape", [(X, Y, Y), (3, X, Y, Y)])
def test_every_auxiliary_model_is_antisymmetric_and_repeats_by_seed(name: str, shape: tuple[int, ...]) -> None:
    preference = crowd().expand(shape)
    g = G_QUALITIES[name](preference, generator(3))
    assert g.shape == shape
    assert ((g >= 0) & (g <= 1)).all()
    torch.testing.assert_close(g + g.mT, torch.ones_like(g), rtol=0, atol=1e-14)
    torch.testing.assert_close(G_QUALITIES[name](preference, generator(3)), g, rtol=0, atol=0)


def test_the_qualities_are_of_the_order_they_are_named_in() -> None:
    preference = MISSPECIFICATIONS["intransitive"](normal(200, 6, seed=5), generator())
    error = {name: float(((model(preference, generator(1)) - preference) ** 2).mean()) for name, model in G_QUALITIES.items()}
    assert error["true"] == 0
    assert error["true"] < error["noisy"] < error["overconfident"] < error["biased"] < error["uninformed"] < error["arbitrary"]
    certain = torch.tensor([[[0.5, 1.0], [0.0, 0.5]]], dtype=torch.float64)
    assert distorted(certain, generator(), scale=0.5).isfinite().all()


@pytest.mark.parametrize("name", ["true", "biased", "arbitrary"])
@pytest.mark.parametrize("control", [1.0, 0.6])
def test_enumerated_over_every_pair_and_label_the_gradient_is_the_plain_one(name: str, control: float) -> None:
    """One data pair a replicate, every (x, first, second, label) of the law, at a point that is not the optimum."""
    preference, joint, rewards = crowd(), law(), normal(X, Y, seed=6)
    outcomes = ((joint + joint.mT) * preference).flatten()
    wins = torch.eye(X * Y * Y, dtype=torch.float64).view(-1, X, Y, Y)
    g = G_QUALITIES[name](preference, generator(3))
    reduced = gradient(variance_reduced_terms(wins, g, joint, control=control), rewards)
    plain = gradient((wins, None), rewards)
    expected = torch.tensordot(outcomes, plain, 1)
    assert expected.norm() > 0.05
    torch.testing.assert_close(torch.tensordot(outcomes, reduced, 1), expected, rtol=1e-12, atol=1e-14)
    assert (reduced - plain).abs().max() > 1e-3


@pytest.mark.parametrize("control", [1.0, 0.75])
def test_the_terms_are_the_objective_of_the_library_pair_by_pair(control: float) -> None:
    """Against `objectives.variance_reduced` with every auxiliary pair of the law listed, at a law of equal probabilities."""
    uniform = pair_law(torch.full((X,), 1 / X, dtype=torch.float64), torch.full((X, Y), -math.log(Y), dtype=torch.float64))
    g = G_QUALITIES["arbitrary"](crowd(), generator(3))
    pairs = draw_pairs(uniform, crowd(), 30, 2, generator(4))
    rewards = normal(X, Y, seed=6).requires_grad_()
    first, second = (~torch.eye(Y, dtype=torch.bool)).nonzero().T
    h = rewards[pairs.contexts, pairs.first] - rewards[pairs.contexts, pairs.second]
    beliefs = g[pairs.contexts, pairs.first, pairs.second]
    table_h, table_g = rewards[:, first] - rewards[:, second], g[:, first, second]
    terms = variance_reduced(h, pairs.z, beliefs, table_h[pairs.contexts], table_g[pairs.contexts], sigmoid, control=control)
    for r in range(2):
        (expected,) = torch.autograd.grad(terms.loss[r].sum(), rewards, retain_graph=True)
        wins = count_wins(pairs, X, Y)[r]
        torch.testing.assert_close(
            gradient(variance_reduced_terms(wins, g, uniform, control=control), rewards.detach()), expected
        )


def test_drawn_auxiliary_pairs_have_the_exact_law_as_their_mean_and_limit() -> None:
    joint, g, rewards = law(), G_QUALITIES["biased"](crowd(), generator(3)), normal(X, Y, seed=6)
    wins = draw_wins(joint, crowd(), 40, 500, generator())
    exact = gradient(variance_reduced_terms(wins, g, joint), rewards)

    def drawn(draws: int, seed: int) -> Tensor:
        terms = variance_reduced_terms(wins, g, joint, draws=draws, generator=generator(seed))
        seen = wins.sum((-2, -1))
        torch.testing.assert_close(terms.wins.sum((-2, -1)), seen)
        return gradient(terms, rewards) - exact

    one, many = drawn(1, 5), drawn(64, 6)
    z = one.mean(0) / (one.std(0) / 500**0.5)
    assert z.abs().max() < 4
    assert float(many.pow(2).mean() / one.pow(2).mean()) == pytest.approx(1 / 64, rel=0.15)
    own = variance_reduced_terms(wins, g, joint.expand(500, X, Y, Y), draws=3, generator=generator(7))
    shared = variance_reduced_terms(wins, g, joint, draws=3, generator=generator(7))
    torch.testing.assert_close(own.wins, shared.wins)


def test_under_misspecification_the_fit_moves_less_and_to_the_same_place() -> None:
    """The estimand is the pseudo-true reward; the true g brings the squared error to it down, and no g moves it."""
    joint, preference = law(), crowd("intransitive")
    target = fit_tabular((joint + joint.mT) * preference * 1e6)
    wins = draw_wins(joint, preference, 2000, 300, generator())

    def error(rewards: Tensor) -> float:
        assert (rewards.mean(0) - target).abs().max() < 0.08
        return float(((rewards - target) ** 2).sum(-1).mean())

    plain = error(fit_tabular(wins, radius=20.0))
    terms = {
        name: variance_reduced_terms(wins, G_QUALITIES[name](preference, generator(1)), joint)
        for name in ("true", "uninformed")
    }
    fits = {name: fit_tabular(term.wins, linear=term.linear, radius=20.0) for name, term in terms.items()}
    assert error(fits["true"]) < 0.8 * plain
    error(fits["uninformed"])
    features = torch.eye(X * Y, dtype=torch.float64).view(X, Y, -1)
    theta = fit_linear(terms["true"].wins, features, linear=terms["true"].linear, ridge=1e-5)
    rewards = theta.view(-1, X, Y) - theta.view(-1, X, Y).mean(-1, keepdim=True)
    torch.testing.assert_close(rewards, fits["true"], rtol=0, atol=1e-4)


def test_the_doubly_robust_win_rate_is_right_when_either_half_is_and_wrong_when_none_is() -> None:
    preference, log_policy, log_mu = crowd(), 2 * normal(X, Y, seed=8), normal(X, Y, seed=9).log_softmax(-1)
    log_policy = log_policy.log_softmax(-1)
    rho = torch.tensor([0.3, 0.7], dtype=torch.float64)
    pairs = draw_pairs(pair_law(rho, log_mu, distinct=False), preference, 2000, 200, generator())
    truth = float(rho @ torch.einsum("xi,xj,xij->x", log_policy.exp(), log_mu.exp(), preference))
    wrong_g, wrong_mu = distorted(preference, generator(4), bias=1.5), normal(X, Y, seed=11).log_softmax(-1)

    def z(estimates: Tensor) -> float:
        return float((estimates.mean() - truth) / (estimates.std() / len(estimates) ** 0.5))

    right = doubly_robust_win_rate(pairs, preference, log_policy, log_mu)
    only_g = doubly_robust_win_rate(pairs, preference, log_policy, wrong_mu)
    only_mu = doubly_robust_win_rate(pairs, wrong_g, log_policy, log_mu)
    neither = doubly_robust_win_rate(pairs, wrong_g, log_policy, wrong_mu)
    for estimates in (*right, only_g.doubly_robust, only_g.direct, only_mu.doubly_robust, only_mu.importance):
        assert abs(z(estimates)) < 4
    for estimates in (*neither, only_g.importance, only_mu.direct):
        assert abs(z(estimates)) > 8
    assert right.doubly_robust.var() < right.importance.var()
    clipped = doubly_robust_win_rate(pairs, wrong_g, log_policy, log_mu, clip=1e-9)
    torch.testing.assert_close(clipped.doubly_robust, clipped.direct, rtol=0, atol=1e-8)
    own = doubly_robust_win_rate(pairs, wrong_g.expand(200, X, Y, Y), log_policy.expand(200, X, Y), log_mu)
    torch.testing.assert_close(own.doubly_robust, only_mu.doubly_robust)


def test_bad_input_is_refused_in_one_line() -> None:
    wins, g = torch.ones(X, Y, Y, dtype=torch.float64), bradley_terry(torch.zeros(X, Y))
    with pytest.raises(ConfigError, match=r"g \(2, 4, 4\): does not satisfy"):
        variance_reduced_terms(wins, 0.9 * g, law())
    with pytest.raises(ConfigError, match="do not fit"):
        variance_reduced_terms(wins[:, :3, :3], g, law())
    with pytest.raises(ConfigError, match="control is 2"):
        variance_reduced_terms(wins, g, law(), control=2.0)
    with pytest.raises(ConfigError, match="explicit generator"):
        variance_reduced_terms(wins, g, law(), draws=4)
    with pytest.raises(ConfigError, match=r"law \(2, 4, 4\): holds a mass that is negative"):
        variance_reduced_terms(wins, g, -law())
    with pytest.raises(ConfigError, match=r"g \(2, 4, 4\): does not satisfy"):
        variance_reduced_terms(wins, g * math.nan, law())
    pairs = draw_pairs(law(distinct=False), g, 5, 2, generator())
    with pytest.raises(ConfigError, match=r"log_policy \(2, 3\)"):
        doubly_robust_win_rate(pairs, g, torch.zeros(2, 3), torch.zeros(X, Y))


@pytest.mark.parametrize("draws", [None, 3])
def test_a_law_without_pairs_where_there_are_data_is_refused_and_elsewhere_is_not(draws: int | None) -> None:
    joint, wins, g = law(), torch.ones(X, Y, Y, dtype=torch.float64), bradley_terry(torch.zeros(X, Y))
    joint[1] = 0
    with pytest.raises(ConfigError, match=r"law \(2, 4, 4\): has no pairs in context 1, which has data"):
        variance_reduced_terms(wins, g, joint, draws=draws, generator=generator())
    with pytest.raises(ConfigError, match=r"no pairs in context \(2, 1\)"):
        variance_reduced_terms(
            wins.expand(3, X, Y, Y), g, torch.stack([law(), law(), joint]), draws=draws, generator=generator()
        )
    wins[1] = 0
    terms = variance_reduced_terms(wins, g, joint, draws=draws, generator=generator())
    assert float(terms.wins[0].sum()) == pytest.approx(Y * Y) and not terms.wins[1].any()


def test_preferences_of_single_precision_are_symmetrised_the_same_way_everywhere() -> None:
    rewards = 3 * normal(X, Y, seed=1)
    single = torch.sigmoid((rewards[:, :, None] - rewards[:, None, :]).float())
    assert ((single.double() + single.double().mT - 1).abs() > 1e-9).any()
    wins = draw_wins(law(), single, 100, 2, generator())
    terms = variance_reduced_terms(wins, single, law())
    torch.testing.assert_close(
        terms.linear, variance_reduced_terms(wins, bradley_terry(rewards), law()).linear, rtol=0, atol=1e-4
    )
    symmetric = check_preference(single, "P")
    torch.testing.assert_close(symmetric + symmetric.mT, torch.ones(X, Y, Y, dtype=torch.float64), rtol=0, atol=2e-16)
    edge = torch.tensor([[[0.5, 0.0], [1 + 1e-7, 0.5]]], dtype=torch.float64)
    assert ((check_preference(edge, "P") >= 0) & (check_preference(edge, "P") <= 1)).all()
    assert draw_pairs(law(), single, 5, 2, generator()).z.shape == (2, 5)
