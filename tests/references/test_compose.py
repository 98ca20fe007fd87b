"""Compositions against products and sums of probabilities; what is refused; what stays finite; which way gradients go."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial

import pytest
import torch

from polyref.data.fields import Refusal, read_weights
from polyref.errors import ConfigError, ReferenceSetError
from polyref.references.compose import (
    COMPOSITIONS,
    arithmetic,
    check_support,
    check_weights,
    forward_difference,
    geometric,
    implied_difference,
    reverse_difference,
)
from toy_lm import GruLM, PrefixLM, World, completions, sequence_logps, sum_over_tokens, token_logps, total_variation

BOTH = pytest.mark.parametrize("compose", [geometric, arithmetic])
DIFFERENCES = pytest.mark.parametrize("difference", [reverse_difference, forward_difference])


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# The toy language models themselves.


@pytest.mark.parametrize(("vocabulary", "length"), [(2, 5), (3, 3), (5, 2), (5, 5)])
def test_toy_completions_are_all_there_is(vocabulary, length):
    atoms = completions(vocabulary, length)
    assert len(set(atoms)) == len(atoms)
    for model in (GruLM(vocabulary, 2, seed=0), PrefixLM(vocabulary, 2, length)):
        mass = sequence_logps(model, vocabulary, length, prompts=2).exp().sum(-1)
        torch.testing.assert_close(mass, torch.ones_like(mass))


# Values.


def test_geometric_is_the_weighted_product_of_probabilities():
    world = World(3, 3, 3, seed=0)
    product = torch.ones_like(world.reward)
    for i in range(3):
        product = product * world.logps[..., i].exp() ** world.weights[:, i, None]
    torch.testing.assert_close(geometric(world.logps, world.weights[:, None, :]).exp(), product)


def test_arithmetic_is_a_distribution_and_the_law_of_drawing_a_member_first():
    world = World(4, 3, 3, seed=1)
    mixture = arithmetic(world.logps, world.weights[:, None, :]).exp()
    torch.testing.assert_close(mixture.sum(-1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(mixture, torch.einsum("xni,xi->xn", world.logps.exp(), world.weights))


def test_geometric_mass_is_at_most_one_and_one_only_for_equal_members():
    world = World(3, 3, 3, seed=2)
    mass = geometric(world.logps, world.weights[:, None, :]).exp().sum(-1)
    assert (mass < 0.999).all()
    equal = world.logps[..., :1].expand_as(world.logps)
    torch.testing.assert_close(geometric(equal, world.weights[:, None, :]).exp().sum(-1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("composition", ["geometric", "arithmetic"])
def test_composing_tokens_is_another_distribution(composition):
    """Composing next-token probabilities and renormalising each token does not give the composition of sequences."""
    vocabulary, length, prompts = 5, 5, 2
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    with torch.no_grad():
        scored = [token_logps(GruLM(vocabulary, prompts, seed, spread=1.5), vocabulary, length, prompts) for seed in (1, 2)]
    tokens = scored[0][1]
    by_token = COMPOSITIONS[composition](torch.stack([logps for logps, _ in scored], dim=-1), weights).log_softmax(-1)
    by_token = sum_over_tokens(by_token, tokens)
    torch.testing.assert_close(by_token.exp().sum(-1), torch.ones(prompts, dtype=torch.float64))
    sequences = torch.stack([sum_over_tokens(logps, tokens) for logps, _ in scored], dim=-1)
    by_sequence = COMPOSITIONS[composition](sequences, weights)
    assert total_variation(by_token.exp(), by_sequence.softmax(-1)) > 0.05
    # Nor does the difference cancel between two completions of one prompt.
    gap = by_token - by_sequence
    assert (gap.max(-1).values - gap.min(-1).values > 1.0).all()


@BOTH
def test_one_reference_is_its_own_anchor(compose):
    logps = doubles(5, 1)
    torch.testing.assert_close(compose(logps, [1.0]), logps[:, 0], rtol=0, atol=0)


@BOTH
def test_the_order_of_references_does_not_matter(compose):
    world = World(4, 3, 3, seed=3)
    order = [2, 0, 3, 1]
    there = compose(world.logps, world.weights[:, None, :])
    torch.testing.assert_close(compose(world.logps[..., order], world.weights[:, None, order]), there, rtol=1e-13, atol=1e-13)


@BOTH
def test_rows_do_not_see_each_other(compose):
    logps, weights = doubles(6, 3), doubles(6, 3, seed=1).softmax(-1)
    together = compose(logps, weights)
    alone = torch.stack([compose(logps[row], weights[row]) for row in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-14, atol=1e-14)


@BOTH
def test_gradients_match_finite_differences(compose):
    assert torch.autograd.gradcheck(
        compose, (doubles(4, 3).requires_grad_(), doubles(4, 3, seed=1).softmax(-1).requires_grad_())
    )


@BOTH
def test_extreme_log_probs_stay_finite_in_float32(compose):
    logps = torch.tensor([[-1e4, -2.0], [-1e4, -2e4], [0.0, -1e30]], requires_grad=True)
    anchor = compose(logps, [0.3, 0.7])
    anchor.sum().backward()
    assert anchor.isfinite().all() and logps.grad.isfinite().all()


# Removed members and support.


@pytest.mark.parametrize("removed", [-3.0, -math.inf, math.nan])
@BOTH
def test_a_member_of_weight_zero_is_not_there(compose, removed):
    kept = doubles(4, 2)
    logps = torch.cat([kept[:, :1], torch.full((4, 1), removed).double(), kept[:, 1:]], dim=1).requires_grad_()
    weights = torch.tensor([0.25, 0.0, 0.75], dtype=torch.float64, requires_grad=True)
    anchor = compose(logps, weights)
    torch.testing.assert_close(anchor, compose(kept, [0.25, 0.75]), rtol=1e-14, atol=1e-14)
    anchor.sum().backward()
    assert (logps.grad[:, 1] == 0).all() and logps.grad.isfinite().all() and weights.grad.isfinite().all()
    check_support(logps, weights, compose)


def test_geometric_support_is_shared_and_arithmetic_support_is_joined():
    logps = torch.tensor([[-1.0, -2.0], [-1.0, -math.inf]])
    with pytest.raises(ReferenceSetError, match=r"completion 1: .* probability 0 under reference 1") as refused:
        check_support(logps, [0.5, 0.5])
    assert "\n" not in str(refused.value)
    check_support(logps, [0.5, 0.5], arithmetic)
    with pytest.raises(ReferenceSetError, match="probability 0 under reference 1"):
        check_support(logps, [0.0, 1.0], arithmetic)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@BOTH
def test_broken_log_probs_are_refused(compose, value):
    logps = torch.zeros(3, 2, 2)
    logps[2, 1, 0] = value
    with pytest.raises(ReferenceSetError, match=rf"completion \(2, 1\): .* {value} under reference 0"):
        check_support(logps, [0.5, 0.5], compose)


def test_weights_on_the_simplex_are_kept_as_they_are():
    given = torch.tensor([[0.1, 0.9], [1.0, 0.0]])
    assert check_weights(given) is given
    assert check_weights([1]).tolist() == [1.0]
    assert check_weights((0.1,) * 10, members=10).dtype == torch.float64
    assert check_weights(torch.full((7,), 1 / 7)).dtype == torch.float32


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([0.7, 0.7], r"\[0.7, 0.7\] is not on the simplex"),
        ([0.5, 0.5 + 2e-6], "not on the simplex"),
        ([-0.5, 1.5], "not on the simplex"),
        ([math.nan, 1.0], r"\[nan, 1\] is not on the simplex"),
        ([math.inf, -math.inf], "not on the simplex"),
        ([], "no reference weights"),
        (1.0, "no reference weights"),
        (["a", "b"], "not all numbers"),
        ([[0.5, 0.5], [1.0]], "not all numbers"),
        (torch.tensor([[0.5, 0.5], [0.5, 0.4]]), "reference weights, row 1"),
    ],
)
def test_weights_off_the_simplex_are_refused(weights, said):
    with pytest.raises(ReferenceSetError, match=said) as refused:
        check_weights(weights)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("excess", [-1.1e-6, -1e-6, -0.9e-6, 0.9e-6, 1e-6, 1.1e-6])
def test_weights_of_a_data_file_and_of_a_reference_set_have_one_tolerance(excess):
    refused = []
    for check, refusal in ((read_weights, Refusal), (check_weights, ReferenceSetError)):
        try:
            check([0.25, 0.75 + excess])
            refused.append(False)
        except refusal:
            refused.append(True)
    assert refused == [abs(excess) > 1e-6] * 2
    assert read_weights([0.333333] * 3) == (0.333333,) * 3 and check_weights([0.333333] * 3).shape == (3,)


def test_mismatched_counts_are_refused():
    with pytest.raises(ReferenceSetError, match="3 weights for 2 references"):
        check_weights([0.2, 0.3, 0.5], members=2)


@pytest.mark.parametrize(
    ("logps", "weights"), [((4, 2), (1,)), ((4, 2), (3,)), ((2, 2, 3), (2, 3)), ((4, 2), (3, 2)), ((), (1,)), ((4, 2), ())]
)
@BOTH
def test_shapes_that_would_be_broadcast_by_guess_are_refused(compose, logps, weights):
    with pytest.raises(ReferenceSetError, match="do not fit"):
        compose(torch.zeros(logps), torch.ones(weights))


# Implied reward differences.


def test_reverse_difference_with_one_reference_is_the_reward_of_dpo():
    """h of [DPO] by hand: beta log (pi/ref of chosen) / (pi/ref of rejected), in probabilities."""
    policy, reference = torch.tensor([0.4, 0.1]).double(), torch.tensor([0.2, 0.25]).double()
    h = reverse_difference(*policy.log(), *geometric(reference.log()[:, None], [1.0]), 0.3)
    assert h.item() == pytest.approx(0.3 * math.log((0.4 / 0.2) / (0.1 / 0.25)))


@DIFFERENCES
def test_the_difference_vanishes_at_the_anchor_and_changes_sign_with_the_pair(difference):
    policy, anchor = doubles(2, 5), doubles(2, 5, seed=1)
    assert (difference(*anchor, *anchor, 0.1) == 0).all()
    forth, back = difference(*policy, *anchor, 0.1), difference(*policy.flip(0), *anchor.flip(0), 0.1)
    torch.testing.assert_close(forth, -back, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("composition", "divergence"), [("geometric", "reverse"), ("arithmetic", "forward"), ("arithmetic", "reverse")]
)
def test_the_difference_does_not_see_a_factor_of_the_prompt_under_reverse_kl_only(composition, divergence):
    policy, anchor = doubles(2, 5), doubles(2, 5, seed=1)
    difference = implied_difference(composition, divergence)
    same = torch.allclose(difference(*policy, *anchor, 0.1), difference(*policy, *(anchor - 3.0), 0.1))
    assert same == (divergence == "reverse")


@DIFFERENCES
def test_raising_the_chosen_and_lowering_the_rejected_raise_the_difference(difference):
    policy = (4 * doubles(2, 50) - 6).requires_grad_()
    chosen, rejected = torch.autograd.grad(difference(*policy, *(4 * doubles(2, 50, seed=1) - 6), 0.1).sum(), policy)[0]
    assert (chosen > 0).all() and (rejected < 0).all()


@pytest.mark.parametrize(
    "difference",
    [reverse_difference, forward_difference, partial(forward_difference, bound=0.0)],
    ids=["reverse", "forward", "linear"],
)
def test_differences_have_the_gradients_of_finite_differences(difference):
    inputs = [doubles(6, seed=seed).requires_grad_() for seed in range(4)]
    assert torch.autograd.gradcheck(difference, (*inputs, 0.3))


def test_the_extension_joins_with_its_slope():
    u = torch.tensor([2 - 1e-7, 2.0, 2 + 1e-7], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(u)
    h = forward_difference(zero, zero, zero, u, 1.0, bound=2.0)
    (slope,) = torch.autograd.grad(h.sum(), u)
    torch.testing.assert_close(h, torch.full_like(h, math.e**2 - 1), rtol=1e-6, atol=0)
    torch.testing.assert_close(slope, torch.full_like(h, math.e**2), rtol=1e-6, atol=0)


@DIFFERENCES
def test_differences_and_gradients_are_finite_at_extreme_log_probs(difference):
    policy = torch.tensor([[-1e5, -1.0, -1e5, -1e-6], [-1.0, -1e5, -1e5, -1e5]], requires_grad=True)
    anchor = torch.tensor([[-1.0, -1e5, -2e5, -1e5], [-1e5, -1.0, -1e5, -1e-6]])
    h = difference(*policy, *anchor, 0.1)
    h.sum().backward()
    assert h.isfinite().all() and policy.grad.isfinite().all()


def test_a_rejected_completion_far_below_its_anchor_still_has_a_gradient():
    policy = torch.tensor([-10.0, -100.0], requires_grad=True)
    forward_difference(*policy, torch.tensor(-10.0), torch.tensor(-10.0), 0.1).backward()
    assert policy.grad[1] < -1


def test_a_composition_and_a_divergence_that_no_objective_has_are_refused():
    with pytest.raises(ConfigError, match="no geometric anchor; take composition='arithmetic', or divergence='reverse'"):
        implied_difference("geometric", "forward")
    with pytest.raises(ConfigError, match="unknown composition 'linear'"):
        implied_difference("linear", "reverse")


def test_importing_compositions_loads_no_model_library():
    """The theory lab runs on these very functions, without Hugging Face."""
    code = (
        "import sys, polyref.references.compose, polyref.objectives;"
        "print({'transformers', 'datasets', 'peft'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
