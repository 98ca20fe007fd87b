"""Pair losses against independent numbers, and the properties that hold for every one of them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, soft_margin_loss

from polyref.errors import ConfigError
from polyref.objectives.pairwise import LOSSES, dr_dpo, hinge, ipo, pair_loss, robust, sigmoid, smoothed
from polyref.references.compose import arithmetic, forward_difference, geometric, reverse_difference

EVERY = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": partial(ipo, beta=0.3),
    "smoothed": partial(smoothed, epsilon=0.15),
    "robust": partial(robust, epsilon=0.15),
}
every_loss = pytest.mark.parametrize("loss", EVERY.values(), ids=EVERY)


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Ordinary DPO.

BETA, EPSILON = 0.3, 0.15
CHOSEN, REJECTED = [-12.5, -3.25, -40.0, -8.0], [-11.0, -9.5, -38.5, -20.0]
REFERENCE_CHOSEN, REFERENCE_REJECTED = [-13.0, -3.0, -36.0, -9.5], [-10.5, -9.0, -41.0, -16.0]
# Printed by DPOTrainer._compute_loss of trl 1.16.0 in float64 for the log-probs above, completions of one token.
TRL = {
    ("reverse_kl", "sigmoid"): [0.5543552444685271, 0.6563501408267951, 2.083021075072867, 0.17567443741493244],
    ("reverse_kl", "hinge"): [0.7, 0.925, 2.95, 0.0],
    ("reverse_kl", "ipo"): [0.44444444444444453, 2.0069444444444446, 66.69444444444443, 14.694444444444443],
    ("reverse_kl", "robust"): [0.4900695301828129, 0.6402787122553666, 2.50087821793001, -0.1778969911564961],
    ("forward_kl", "sigmoid"): [0.5489884546135988, 0.6399383412557613, 16.354819589277017, 8.233199838505106e-08],
    ("forward_kl", "hinge"): [0.6873428167037516, 0.890591243796284, 17.3548195103561, 0.0],
    ("forward_kl", "ipo"): [0.3899703441166163, 1.6951279970036461, 3156.499341407563, 2778.1704977231475],
    ("forward_kl", "robust"): [0.4819904867644027, 0.6164936077835365, 19.85942377006761, -3.4955369095034454],
}


@pytest.mark.parametrize(("divergence", "name"), TRL)
@pytest.mark.parametrize("compose", [geometric, arithmetic])
def test_one_reference_gives_the_numbers_of_trl(divergence, name, compose):
    policy = torch.tensor([CHOSEN, REJECTED], dtype=torch.float64)
    reference = torch.tensor([REFERENCE_CHOSEN, REFERENCE_REJECTED], dtype=torch.float64)
    difference = reverse_difference if divergence == "reverse_kl" else forward_difference
    h = difference(*policy, *compose(reference[..., None], [1.0]), BETA)
    losses = pair_loss(name, BETA, EPSILON if name == "robust" else 0.0)(h)
    torch.testing.assert_close(losses, torch.tensor(TRL[divergence, name], dtype=torch.float64), rtol=1e-9, atol=1e-14)


def test_sigmoid_is_the_logistic_likelihood_of_the_label():
    h, p = 3 * doubles(50), torch.rand(50, dtype=torch.float64)
    ones = torch.ones_like(h)
    torch.testing.assert_close(sigmoid(h), soft_margin_loss(h, ones, reduction="none"))
    torch.testing.assert_close(sigmoid(h, chosen_probability=p), binary_cross_entropy_with_logits(h, p, reduction="none"))


@every_loss
def test_the_order_of_references_does_not_matter(loss):
    policy, logps, weights = doubles(2, 8), doubles(2, 8, 4, seed=1), doubles(4, seed=2).softmax(-1)
    order = [3, 1, 0, 2]
    for compose, difference in ((geometric, reverse_difference), (arithmetic, forward_difference)):
        there = loss(difference(*policy, *compose(logps, weights), 0.3))
        torch.testing.assert_close(loss(difference(*policy, *compose(logps[..., order], weights[order]), 0.3)), there)


# Labels.


@every_loss
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_a_soft_label_is_the_mean_over_labels(loss, p):
    h = doubles(2000)
    won = torch.arange(2000) < p * 2000
    h = h[:1].expand(2000)
    torch.testing.assert_close(loss(h, chosen_probability=p).mean(), torch.where(won, loss(h), loss(-h)).mean())


@every_loss
def test_labels_as_a_number_as_a_vector_and_left_out_agree(loss):
    h = doubles(5)
    assert torch.equal(loss(h, chosen_probability=1.0), loss(h, chosen_probability=torch.ones(5)))
    torch.testing.assert_close(loss(h, chosen_probability=1.0), loss(h))
    assert loss(h.float(), chosen_probability=torch.rand(5, dtype=torch.float64)).dtype == torch.float32


@every_loss
def test_labels_of_another_shape_are_refused(loss):
    with pytest.raises(ConfigError, match=r"shape \(3, 1\) for pairs of shape \(3,\)"):
        loss(torch.zeros(3), chosen_probability=torch.full((3, 1), 0.5))


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4])
def test_robust_averaged_over_flips_is_sigmoid_of_the_clean_label(epsilon):
    h = doubles(20)
    kept, turned = robust(h, epsilon), robust(-h, epsilon)
    torch.testing.assert_close((1 - epsilon) * kept + epsilon * turned, sigmoid(h))


def test_no_smoothing_is_sigmoid_and_smoothing_pulls_to_zero():
    h = 3 * doubles(20)
    assert torch.equal(smoothed(h, 0.0), sigmoid(h)) and torch.equal(robust(h, 0.0), sigmoid(h))
    confident = torch.tensor(20.0, requires_grad=True)
    smoothed(confident, 0.1).backward()
    assert confident.grad > 0


@pytest.mark.parametrize("loss", [smoothed, robust])
@pytest.mark.parametrize("epsilon", [-0.1, 0.5, 0.9, math.nan])
def test_flip_rates_out_of_range_are_refused(loss, epsilon):
    with pytest.raises(ConfigError, match="label_smoothing"):
        loss(torch.zeros(2), epsilon)


# Every loss.


@every_loss
@pytest.mark.parametrize("p", [None, 0.3])
def test_gradients_match_finite_differences(loss, p):
    h = doubles(20)
    h = h[(h.abs() - 1).abs() > 1e-3].requires_grad_()
    assert torch.autograd.gradcheck(partial(loss, chosen_probability=p), h)
    assert torch.autograd.gradgradcheck(partial(loss, chosen_probability=p), h)


@every_loss
def test_one_by_one_is_all_at_once(loss):
    h, p = doubles(3, 4), torch.rand(3, 4, dtype=torch.float64)
    together = loss(h, chosen_probability=p)
    assert together.shape == h.shape
    alone = [loss(a, chosen_probability=b) for a, b in zip(h.flatten(), p.flatten(), strict=True)]
    torch.testing.assert_close(together.flatten(), torch.stack(alone), rtol=1e-15, atol=1e-15)
    h.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(h, chosen_probability=p)[1, 2], h)
    assert gradient.count_nonzero() <= 1


@every_loss
@pytest.mark.parametrize("p", [None, 0.0, 0.3])
def test_finite_at_extreme_differences(loss, p):
    h = torch.tensor([-1e5, -200.0, 0.0, 200.0, 1e5], requires_grad=True)
    losses = loss(h, chosen_probability=p)
    losses.sum().backward()
    assert losses.isfinite().all() and h.grad.isfinite().all()


@every_loss
def test_the_loss_falls_at_the_anchor(loss):
    h = torch.zeros(3, requires_grad=True)
    loss(h).sum().backward()
    assert (h.grad < 0).all()


def test_certain_wins_keep_their_precision():
    h = torch.tensor([40.0, 300.0, 700.0], dtype=torch.float64)
    torch.testing.assert_close(sigmoid(h), (-h).exp(), rtol=1e-12, atol=0)


def test_hinge_stops_at_its_margin_and_ipo_turns_back_at_its_own():
    h = torch.tensor([0.999, 1.001, 5.0], requires_grad=True)
    hinge(h).sum().backward()
    assert h.grad.tolist() == [-1.0, 0.0, 0.0]
    around = torch.tensor([0.49, 0.5, 0.51], dtype=torch.float64, requires_grad=True)
    ipo(around, 0.1).sum().backward()
    assert around.grad[0] < 0 < around.grad[2] and around.grad[1].abs() < 1e-9


# Names.


@pytest.mark.parametrize("name", EVERY)
def test_names_give_the_losses_with_their_settings(name):
    h, p = doubles(6), torch.rand(6, dtype=torch.float64)
    named = pair_loss(name, 0.3, 0.15 if name in ("smoothed", "robust") else 0.0)
    assert torch.equal(named(h, p), EVERY[name](h, chosen_probability=p))
    assert torch.equal(named(h, chosen_probability=p), named(h, p)) and torch.equal(named(h), EVERY[name](h))


def test_settings_that_mean_nothing_are_refused():
    assert set(LOSSES) == set(EVERY)
    for name in ("sigmoid", "hinge", "ipo"):
        with pytest.raises(ConfigError, match="does not use label_smoothing"):
            LOSSES[name](0.1, 0.1)
    for beta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="beta"):
            pair_loss("sigmoid", beta)
    with pytest.raises(ConfigError, match="unknown loss_type 'dpo'; take one of sigmoid, hinge"):
        pair_loss("dpo", 0.1)


# The Dr-DPO reducer.


def test_dr_dpo_lies_between_the_least_loss_and_the_mean_and_tends_to_the_mean():
    losses = doubles(32).abs()
    values = [dr_dpo(losses, beta_prime).item() for beta_prime in (1.01, 2.0, 10.0, 1e7)]
    assert losses.min() < values[0] < values[1] < values[2] < values[3]
    assert values[3] == pytest.approx(losses.mean().item(), rel=1e-6)


def test_dr_dpo_of_equal_losses_is_that_loss_and_outliers_lose_their_pull():
    assert dr_dpo(torch.full((7,), 0.4), 2.0).item() == pytest.approx(0.4)
    losses = torch.tensor([0.5, 0.5, 50.0], dtype=torch.float64, requires_grad=True)
    dr_dpo(losses, 2.0).backward()
    assert losses.grad[2] < 1e-9 and losses.grad.sum().item() == pytest.approx(1.0)


def test_dr_dpo_weights_are_repeats():
    losses = doubles(4).abs()
    repeated = losses.repeat_interleave(torch.tensor([3, 0, 1, 2]))
    weighted = dr_dpo(losses, 1.5, weights=torch.tensor([3.0, 0.0, 1.0, 2.0]))
    torch.testing.assert_close(weighted, dr_dpo(repeated, 1.5))


def test_dr_dpo_of_a_batch_is_not_the_mean_over_its_parts():
    losses = torch.tensor([0.1, 0.2, 3.0, 4.0])
    assert abs(dr_dpo(losses, 2.0) - (dr_dpo(losses[:2], 2.0) + dr_dpo(losses[2:], 2.0)) / 2) > 0.1


def test_dr_dpo_gradients_and_extremes():
    assert torch.autograd.gradcheck(partial(dr_dpo, beta_prime=1.5), doubles(6).requires_grad_())
    losses = torch.tensor([1e5, -1e5, 0.0], requires_grad=True)
    value = dr_dpo(losses, 1.5)
    value.backward()
    assert value.isfinite() and losses.grad.isfinite().all()
    for beta_prime in (1.0, 0.5, -1.0, math.nan):
        with pytest.raises(ConfigError, match="beta_prime"):
            dr_dpo(losses, beta_prime)
