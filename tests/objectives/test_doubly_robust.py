"""The doubly robust value by enumeration of pairs and labels, on four completions of one prompt."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from polyref.errors import ConfigError
from polyref.objectives import direct_value, doubly_robust_value, importance_diagnostics, kl_penalty
from toy_lm import minimise, total_variation

ACTIONS = 4
FIRST, SECOND = (table.flatten() for table in torch.meshgrid(torch.arange(ACTIONS), torch.arange(ACTIONS), indexing="ij"))


def random_logits(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def antisymmetric(seed: int) -> Tensor:
    """P(i beats j) of no reward: every pair has its own; the draw of a pair of equals is a coin."""
    logits = 1.5 * random_logits(ACTIONS, ACTIONS, seed=seed)
    return torch.sigmoid(logits - logits.T)


LOG_MU = random_logits(ACTIONS, seed=0).log_softmax(-1)
WRONG_LOG_MU = random_logits(ACTIONS, seed=1).log_softmax(-1)
LOG_POLICY = random_logits(ACTIONS, seed=2).log_softmax(-1)
PREFERENCE, WRONG = antisymmetric(3), antisymmetric(4)
WIN_RATE_OF_EACH = PREFERENCE @ LOG_MU.exp()


def values(log_policy: Tensor, g: Tensor, log_mu: Tensor, z: Tensor | float, clip: float | None = None) -> Tensor:
    """The value of each of the 16 ordered pairs at label z."""
    direct = log_policy.exp() @ (g[:, FIRST] + g[:, SECOND]) / 2
    ratio = log_policy - log_mu
    return doubly_robust_value(z, g[FIRST, SECOND], direct, ratio[FIRST], ratio[SECOND], clip=clip)


def mean(log_policy: Tensor, g: Tensor, log_mu: Tensor, clip: float | None = None) -> Tensor:
    """Over independent completions from mu and hard labels."""
    law, p = LOG_MU.exp()[FIRST] * LOG_MU.exp()[SECOND], PREFERENCE[FIRST, SECOND]
    return law @ (p * values(log_policy, g, log_mu, 1.0, clip) + (1 - p) * values(log_policy, g, log_mu, 0.0, clip))


def bias(g: Tensor, log_mu: Tensor, clip: float | None = None) -> float:
    return (mean(LOG_POLICY, g, log_mu, clip) - LOG_POLICY.exp() @ WIN_RATE_OF_EACH).item()


@pytest.mark.parametrize(("g", "log_mu"), [(PREFERENCE, LOG_MU), (PREFERENCE, WRONG_LOG_MU), (WRONG, LOG_MU)])
def test_one_right_model_is_enough(g, log_mu):
    assert abs(bias(g, log_mu)) < 1e-14
    policy = LOG_POLICY.clone().requires_grad_()
    found, expected = (
        torch.autograd.grad(value, policy)[0] for value in (mean(policy, g, log_mu), policy.exp() @ WIN_RATE_OF_EACH)
    )
    found, expected = (slope - LOG_POLICY.exp() * slope.sum() for slope in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_leaving_equal_pairs_out_multiplies_what_the_value_differs_from_half_by():
    mu, ratio, distinct = LOG_MU.exp(), LOG_POLICY - LOG_MU, FIRST != SECOND
    law = (mu[FIRST] * mu[SECOND])[distinct]
    value = direct_value(PREFERENCE[FIRST, SECOND], ratio[FIRST], ratio[SECOND])[distinct]
    found = law @ value / law.sum() - 0.5
    assert found.item() == pytest.approx((LOG_POLICY.exp() @ WIN_RATE_OF_EACH - 0.5).item() / (1 - mu.square().sum().item()))


def test_two_wrong_models_are_not():
    assert abs(bias(WRONG, WRONG_LOG_MU)) > 1e-2


def test_clipping_gives_up_the_part_that_rests_on_mu_and_keeps_the_other():
    ratios = (LOG_POLICY - LOG_MU).exp()
    clip = ratios.sort().values[-2].item() * 1.01
    assert abs(bias(WRONG, LOG_MU, clip)) > 1e-2
    assert abs(bias(PREFERENCE, LOG_MU, clip)) < 1e-14
    assert abs(bias(WRONG, LOG_MU, ratios.max().item())) < 1e-14
    assert importance_diagnostics(LOG_POLICY - LOG_MU, clip).clip_share.item() == 1 / ACTIONS
    assert importance_diagnostics(LOG_POLICY - LOG_MU).clip_share.item() == 0


def test_the_true_model_has_the_least_variance_of_all_wrong_ones_tried():
    law, p = LOG_MU.exp()[FIRST] * LOG_MU.exp()[SECOND], PREFERENCE[FIRST, SECOND]

    def variance(g: Tensor) -> float:
        won, lost = values(LOG_POLICY, g, LOG_MU, 1.0), values(LOG_POLICY, g, LOG_MU, 0.0)
        return (law @ (p * won**2 + (1 - p) * lost**2) - (law @ (p * won + (1 - p) * lost)) ** 2).item()

    importance_weighting = torch.full((ACTIONS, ACTIONS), 0.5, dtype=torch.float64)
    assert variance(PREFERENCE) < min(variance(importance_weighting), *(variance(antisymmetric(s)) for s in range(10, 20)))


@pytest.mark.parametrize(("g", "log_mu"), [(PREFERENCE, WRONG_LOG_MU), (WRONG, LOG_MU)])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_its_optimum_tilts_the_anchor_by_the_win_rate(g, log_mu, beta):
    references, weights = random_logits(ACTIONS, 3, seed=5).log_softmax(0), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    logits = torch.zeros(ACTIONS, dtype=torch.float64, requires_grad=True)

    def objective() -> Tensor:
        policy = logits.log_softmax(-1)
        return beta * sum(a * (policy.exp() * (policy - r)).sum() for a, r in zip(weights, references.T, strict=True)) - mean(
            policy, g, log_mu
        )

    minimise([logits], objective)
    tilted = (references @ weights + WIN_RATE_OF_EACH / beta).softmax(-1)
    assert total_variation(logits.detach().softmax(-1), tilted) < 1e-6


def test_the_auxiliary_model_and_a_clipped_ratio_carry_no_gradient():
    ratio = torch.tensor([[0.1, 3.0], [0.2, -4.0]], requires_grad=True)
    g, direct = torch.tensor([0.3, 0.4], requires_grad=True), torch.tensor([0.5, 0.6], requires_grad=True)
    doubly_robust_value(1.0, g, direct, *ratio, clip=2.0).sum().backward()
    assert g.grad is None and direct.grad.tolist() == [1.0, 1.0]
    assert (ratio.grad != 0).tolist() == [[True, False], [True, True]]


def test_gradients_rows_and_types():
    z, g, direct = (random_logits(6, seed=s).sigmoid() for s in (6, 7, 8))
    first, second, direct = (x.requires_grad_() for x in (random_logits(6, seed=9), random_logits(6, seed=10), direct))
    assert torch.autograd.gradcheck(lambda *x: doubly_robust_value(z, g, *x, clip=1.7), (direct, first, second))
    together = doubly_robust_value(z, g, direct, first, second)
    alone = torch.cat([doubly_robust_value(*(x[i : i + 1] for x in (z, g, direct, first, second))) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-15, atol=1e-15)
    assert torch.autograd.grad(together[3], first)[0].count_nonzero() == 1
    turned = doubly_robust_value(1 - z, 1 - g, direct, second, first)
    torch.testing.assert_close(turned, together)
    assert doubly_robust_value(1.0, *(x.float() for x in (g, direct, first, second))).dtype == torch.float32


# Pairs drawn before training, in place of the expectation over the policy.

LOG_Q, LOG_ANCHOR = WRONG_LOG_MU, random_logits(ACTIONS, seed=5).log_softmax(-1)
DRAWN = LOG_Q.exp()[FIRST] * LOG_Q.exp()[SECOND]


def test_drawn_pairs_give_the_win_rate_and_the_divergence_and_their_gradients():
    logits = random_logits(ACTIONS, seed=2).requires_grad_()
    log_policy = logits.log_softmax(-1)
    to_q, to_anchor = log_policy - LOG_Q, log_policy - LOG_ANCHOR
    direct = DRAWN @ direct_value(WRONG[FIRST, SECOND], to_q[FIRST], to_q[SECOND])
    kl = DRAWN @ kl_penalty(to_anchor[FIRST], to_anchor[SECOND], to_q[FIRST], to_q[SECOND])
    for found, expected in ((direct, log_policy.exp() @ WRONG @ LOG_Q.exp()), (kl, log_policy.exp() @ to_anchor)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
        slopes = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (found, expected)]
        torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-13)


def test_a_factor_of_the_anchor_moves_the_divergence_and_not_its_gradient():
    ratios = random_logits(2, 9, seed=6).requires_grad_()
    anchor = random_logits(2, 9, seed=7)
    plain, moved = (kl_penalty(*(anchor + shift), *ratios) for shift in (0.0, -3.0))
    torch.testing.assert_close(moved, plain - 1.5 * ratios.detach().exp().sum(0))
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), ratios, retain_graph=True)[0] for v in (plain, moved)))
    at_anchor = kl_penalty(*torch.zeros(2, 9, dtype=torch.float64), *ratios)
    assert not torch.autograd.grad(at_anchor.sum(), ratios)[0].any(), "no noise where the policy is its anchor"


def test_beyond_the_clip_the_value_has_no_gradient_and_the_divergence_still_pulls():
    ratios = torch.tensor([[5.0], [0.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(direct_value(torch.tensor([0.9]), *ratios, clip=2.0).sum(), ratios)[0][0] == 0
    pulled = kl_penalty(torch.tensor([5.0]), torch.tensor([0.0]), *ratios, clip=2.0)
    assert pulled.item() == pytest.approx(0.5 * (2 * 4 - 1) + 1)
    assert torch.autograd.grad(pulled.sum(), ratios)[0].flatten().tolist() == [5.0, -2.5]
    extreme = torch.tensor([1e5, -1e5], requires_grad=True)
    penalty = kl_penalty(extreme.detach(), -extreme.detach(), extreme, -extreme, clip=10.0)
    penalty.sum().backward()
    assert penalty.isfinite().all() and extreme.grad.isfinite().all()


def test_no_gradient_reaches_the_auxiliary_model_of_drawn_pairs():
    g = torch.tensor([0.3], requires_grad=True)
    value = direct_value(g, torch.zeros(1, requires_grad=True), torch.ones(1))
    value.sum().backward()
    assert g.grad is None


def test_finite_at_extreme_ratios_under_a_clip():
    ratio = torch.tensor([-1e5, -200.0, 0.0, 200.0, 1e5], requires_grad=True)
    value = doubly_robust_value(1.0, torch.full((5,), 0.3), torch.zeros(5), ratio, -ratio, clip=10.0)
    value.sum().backward()
    assert value.isfinite().all() and ratio.grad.isfinite().all()
    assert all(part.isfinite().all() for part in importance_diagnostics(ratio, 10.0))


def test_diagnostics_against_the_weights_themselves():
    log_ratios = 2 * random_logits(3, 50, seed=11)
    for clip in (None, 1.5):
        weights = np.minimum(log_ratios.exp().numpy(), math.inf if clip is None else clip)
        found = importance_diagnostics(log_ratios.requires_grad_(), clip)
        log_ratios = log_ratios.detach()
        np.testing.assert_allclose(found.effective_sample_size.numpy(), weights.sum(-1) ** 2 / (weights**2).sum(-1))
        np.testing.assert_allclose(found.clip_share.numpy(), 0 if clip is None else (log_ratios.exp().numpy() > clip).mean(-1))
    assert importance_diagnostics(torch.full((7,), 900.0)).effective_sample_size.item() == pytest.approx(7)
    assert importance_diagnostics(torch.full((2, 7), -math.inf)).effective_sample_size.tolist() == [0.0, 0.0]


def test_bad_settings_are_refused():
    rows = torch.zeros(3)
    for clip in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="clip"):
            doubly_robust_value(1.0, rows, rows, rows, rows, clip=clip)
    for name in ("z", "g", "direct", "log_ratio_second"):
        given = {"z": rows, "g": rows, "direct": rows, "log_ratio_first": rows, "log_ratio_second": rows} | {
            name: rows[:, None]
        }
        with pytest.raises(ConfigError, match=rf"{name} has shape \(3, 1\) for pairs of shape \(3,\)"):
            doubly_robust_value(**given)
    with pytest.raises(ConfigError, match="at least one weight"):
        importance_diagnostics(torch.zeros(3, 0))
