"""What each pair objective converges to when the population is exact: all pairs of all completions of toy language models.

The optimum is never taken from a formula for it: it is found by maximising, from its definition, the reward regularised by a KL
to each reference, over free probabilities. The policy under test is an autoregressive torch module fitted on pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from polyref.objectives.pairwise import dr_dpo, hinge, ipo, robust, sigmoid, smoothed
from polyref.references.compose import COMPOSITIONS, ImpliedDifference, forward_difference, implied_difference
from toy_lm import GruLM, World, minimise, total_variation

AXES = [("geometric", "reverse"), ("arithmetic", "forward"), ("arithmetic", "reverse")]
SHAPES = {1: (2, 5), 2: (3, 3), 3: (5, 2), 4: (3, 4)}
REACHED = 1e-4

PopulationLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(h, P(first preferred), law of pairs) -> scalar."""

every_axes = pytest.mark.parametrize("axes", AXES, ids=["reverse-geometric", "forward-arithmetic", "reverse-arithmetic"])


def every_composition(test):
    return every_axes(pytest.mark.parametrize("members", SHAPES)(test))


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def optimum(world: World, axes: tuple[str, str], reward: Tensor) -> Tensor:
    """argmax_pi E_pi r - beta * penalty over all distributions (X, N), by definition."""
    references = [world.logps[..., i].exp() for i in range(world.members)]
    share = [world.weights[:, i] for i in range(world.members)]
    logits = torch.zeros_like(reward, requires_grad=True)

    def loss() -> Tensor:
        pi = logits.softmax(-1)
        if axes == ("geometric", "reverse"):
            penalty = sum(a * kl(pi, q) for a, q in zip(share, references, strict=True))
        elif axes == ("arithmetic", "forward"):
            penalty = sum(a * kl(q, pi) for a, q in zip(share, references, strict=True))
        else:
            penalty = kl(pi, sum(a[:, None] * q for a, q in zip(share, references, strict=True)))
        return -((pi * reward).sum(-1) - world.beta * penalty).sum()

    minimise([logits], loss)
    return logits.detach().softmax(-1)


def fitted(
    world: World,
    axes: tuple[str, str],
    population_loss: PopulationLoss,
    probability: Tensor,
    *,
    difference: ImpliedDifference | None = None,
    pair_law: Tensor | None = None,
    policy: nn.Module | None = None,
    newton_steps: int = 40,
) -> Tensor:
    """Probabilities (X, N) of the policy that minimises population_loss(h, p, law) over all pairs i < j, drawn from mu x mu."""
    composition, divergence = axes
    difference = difference or implied_difference(composition, divergence)
    anchor = COMPOSITIONS[composition](world.logps, world.weights[:, None, :])
    first, second = torch.triu_indices(anchor.shape[-1], anchor.shape[-1], offset=1)
    pair_law = world.mu[:, :, None] * world.mu[:, None, :] if pair_law is None else pair_law
    law = pair_law[:, first, second] / pair_law[:, first, second].sum()
    policy = policy or world.policy()

    def loss() -> Tensor:
        logps = world.score(policy)
        h = difference(logps[:, first], logps[:, second], anchor[:, first], anchor[:, second], world.beta)
        return population_loss(h, probability[:, first, second], law)

    minimise(list(policy.parameters()), loss, newton_steps)
    return world.score(policy).detach().exp()


def mean(loss: Callable[..., Tensor], *settings: float) -> PopulationLoss:
    """The expectation of a pair loss under the law of pairs, by its soft labels."""
    return lambda h, p, law: (law * loss(h, *settings, chosen_probability=p)).sum()


def bradley_terry(reward: Tensor) -> Tensor:
    return torch.sigmoid(reward[:, :, None] - reward[:, None, :])


def flipped(probability: Tensor, rate: float) -> Tensor:
    return (1 - rate) * probability + rate * (1 - probability)


@every_composition
def test_sigmoid_reaches_the_optimum(axes, members):
    world = World(members, *SHAPES[members], seed=members)
    found = fitted(world, axes, mean(sigmoid), bradley_terry(world.reward))
    assert total_variation(found, optimum(world, axes, world.reward)) < REACHED


@every_composition
def test_robust_reaches_the_optimum_from_flipped_labels(axes, members):
    world = World(members, *SHAPES[members], seed=10 + members)
    found = fitted(world, axes, mean(robust, 0.2), flipped(bradley_terry(world.reward), 0.2))
    assert total_variation(found, optimum(world, axes, world.reward)) < REACHED


@every_composition
def test_ipo_reaches_the_optimum_of_winning_against_mu(axes, members):
    """Labels of no reward at all: each pair has its own, intransitive, probability."""
    world = World(members, *SHAPES[members], seed=20 + members)
    atoms = world.mu.shape[-1]
    noise = torch.randn(world.prompts, atoms, atoms, dtype=torch.float64, generator=torch.Generator().manual_seed(members))
    probability = torch.sigmoid(2 * (noise - noise.mT))
    beats_mu = (probability * world.mu[:, None, :]).sum(-1)
    found = fitted(world, axes, mean(ipo, world.beta), probability)
    assert total_variation(found, optimum(world, axes, beats_mu)) < REACHED


@every_axes
def test_ipo_and_sigmoid_have_different_optima(axes):
    world = World(2, 3, 3, seed=1)
    found = fitted(world, axes, mean(ipo, world.beta), bradley_terry(world.reward))
    assert total_variation(found, optimum(world, axes, world.reward)) > 0.05


@every_axes
def test_smoothing_shrinks_the_optimum(axes):
    world = World(2, 3, 3, seed=2)
    target = optimum(world, axes, world.reward)
    clean = bradley_terry(world.reward)
    for labels in (clean, flipped(clean, 0.2)):
        found = fitted(world, axes, mean(smoothed, 0.2), labels)
        assert total_variation(found, target) > 0.05
        shrunk = implied_reward(world, axes, found).std(-1) / world.reward.std(-1)
        assert (shrunk < 0.7).all()
    assert total_variation(fitted(world, axes, mean(smoothed, 0.0), clean), target) < REACHED


def test_smoothing_is_harmless_where_all_rewards_are_equal():
    world = World(2, 3, 3, seed=3)
    world.reward = torch.zeros_like(world.reward)
    found = fitted(world, AXES[0], mean(smoothed, 0.2), bradley_terry(world.reward))
    assert total_variation(found, optimum(world, AXES[0], world.reward)) < REACHED


@every_axes
def test_flipped_labels_move_sigmoid_off_the_optimum(axes):
    world = World(2, 3, 3, seed=4)
    found = fitted(world, axes, mean(sigmoid), flipped(bradley_terry(world.reward), 0.2))
    assert total_variation(found, optimum(world, axes, world.reward)) > 0.05


@every_axes
def test_drawn_labels_and_soft_labels_have_one_minimiser(axes):
    """Each pair enters twice, won by either side with its probability, as hard labels do."""
    world = World(3, 3, 2, seed=5)

    def drawn(h: Tensor, p: Tensor, law: Tensor) -> Tensor:
        return (law * (p * sigmoid(h) + (1 - p) * sigmoid(-h))).sum()

    found = fitted(world, axes, drawn, bradley_terry(world.reward))
    assert total_variation(found, optimum(world, axes, world.reward)) < REACHED


@every_axes
def test_a_chain_of_pairs_is_enough(axes):
    """Only neighbours i, i+1 are ever compared: the pairs connect all completions, no more."""
    world = World(2, 3, 3, seed=6)
    atoms = world.mu.shape[-1]
    chain = torch.diag(torch.ones(atoms - 1, dtype=torch.float64), 1).expand(world.prompts, -1, -1)
    found = fitted(world, axes, mean(sigmoid), bradley_terry(world.reward), pair_law=chain)
    assert total_variation(found, optimum(world, axes, world.reward)) < REACHED


def test_pairs_that_do_not_connect_are_not_enough():
    world = World(2, 3, 3, seed=7)
    atoms = world.mu.shape[-1]
    broken = torch.diag(torch.ones(atoms - 1, dtype=torch.float64), 1)
    broken[6, 7] = 0
    law = broken.expand(world.prompts, -1, -1)
    found = fitted(world, AXES[0], mean(sigmoid), bradley_terry(world.reward), pair_law=law)
    assert total_variation(found, optimum(world, AXES[0], world.reward)) > 0.01


@every_axes
def test_a_recurrent_policy_reaches_the_optimum_too(axes):
    world = World(2, 3, 2, seed=8)
    policy = GruLM(3, world.prompts, seed=0, hidden=12)
    found = fitted(world, axes, mean(sigmoid), bradley_terry(world.reward), policy=policy, newton_steps=0)
    assert total_variation(found, optimum(world, axes, world.reward)) < REACHED


def test_the_linear_extension_is_exact_from_the_documented_bound_on():
    world = World(2, 3, 3, seed=9)
    span = (world.reward.max() - world.reward.min()).item()
    target = optimum(world, AXES[1], world.reward)
    labels = bradley_terry(world.reward)
    found = {
        bound: fitted(world, AXES[1], mean(sigmoid), labels, difference=partial(forward_difference, bound=bound))
        for bound in (math.log1p(span / world.beta), 0.0)
    }
    enough, too_low = found.values()
    assert total_variation(enough, target) < REACHED
    assert total_variation(too_low, target) > 0.01


@every_axes
def test_dr_dpo_with_labels_inside_keeps_the_optimum(axes):
    world = World(2, 3, 3, seed=10)
    found = fitted(
        world,
        axes,
        lambda h, p, law: dr_dpo(sigmoid(h, chosen_probability=p), 2.0, weights=law),
        bradley_terry(world.reward),
    )
    assert total_variation(found, optimum(world, axes, world.reward)) < REACHED


@every_axes
def test_dr_dpo_with_labels_outside_stretches_the_rewards(axes):
    world = World(2, 3, 3, seed=11)
    found = fitted(
        world,
        axes,
        lambda h, p, law: dr_dpo(torch.stack([sigmoid(h), sigmoid(-h)]), 3.0, weights=torch.stack([law * p, law * (1 - p)])),
        bradley_terry(world.reward),
    )
    assert total_variation(found, optimum(world, axes, 1.5 * world.reward)) < REACHED
    assert total_variation(found, optimum(world, axes, world.reward)) > 0.02


@pytest.mark.parametrize("p", [0.0, 0.1, 0.45, 0.55, 0.9, 1.0])
@every_axes
def test_hinge_takes_the_sign_of_the_majority(axes, p):
    """One pair, and a policy of one free number: its logit between the two completions."""
    composition, divergence = axes
    anchor = COMPOSITIONS[composition](torch.tensor([[0.3, 0.6], [0.7, 0.4]]).double().log(), [0.5, 0.5])
    difference = implied_difference(composition, divergence)

    def implied(logit: float) -> Tensor:
        logps = torch.tensor([logit, 0.0], dtype=torch.float64).log_softmax(0)
        return difference(logps[0], logps[1], anchor[0], anchor[1], 0.5)

    found = minimize_scalar(
        lambda logit: hinge(implied(logit), chosen_probability=p).item(),
        bounds=(-8, 8),
        method="bounded",
        options={"xatol": 1e-9},
    )
    h = implied(found.x).item()
    if p in (0.0, 1.0):
        assert h * (2 * p - 1) > 1 - 1e-6
    else:
        assert h == pytest.approx(math.copysign(1, 2 * p - 1), abs=1e-5)


def implied_reward(world: World, axes: tuple[str, str], probabilities: Tensor) -> Tensor:
    """The reward, up to a constant of the prompt, whose optimum `probabilities` (X, N) is."""
    composition, divergence = axes
    ratio = probabilities.log() - COMPOSITIONS[composition](world.logps, world.weights[:, None, :])
    return world.beta * (ratio if divergence == "reverse" else -(-ratio).exp())
