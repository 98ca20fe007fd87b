"""Enumerable autoregressive references against real torch modules; composing tokens is not composing sequences."""

from __future__ import annotations

import math

import pytest
import torch

import toy_lm
from polyref.errors import ConfigError, ReferenceSetError
from polyref.theory.solutions import forward_optimum, reverse_optimum, solve_forward_kl, solve_reverse_kl
from polyref.theory.toy_language import ToyLanguageBandit, count_states, random_toy_language, total_variation
from polyref.theory.values import forward_gap, forward_objective, reverse_gap, reverse_objective

SIZES = pytest.mark.parametrize(("vocabulary", "length"), [(2, 5), (3, 4), (5, 2), (5, 5)])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
PER_CONTEXT = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]], dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy(seed: int = 0, **sizes: int) -> ToyLanguageBandit:
    return random_toy_language(seeded(seed), **({"contexts": 2, "references": 3, "vocabulary": 3, "length": 4} | sizes))


def wrong_and_right(language: ToyLanguageBandit, weights: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(token level, sequence level) of the geometric and of the arithmetic composition."""
    bandit = language.bandit(torch.zeros(2, len(language.completions)), weights, beta=1.0)
    return [
        (language.token_geometric(weights), bandit.geometric),
        (language.token_arithmetic(weights), bandit.mixture),
    ]


def by_prefix(language: ToyLanguageBandit) -> dict[tuple[int, ...], int]:
    """Every open prefix and its state, breadth first and tokens ascending."""
    prefixes: list[tuple[int, ...]] = [()]
    for prefix in prefixes:
        if len(prefix) < language.length - 1:
            prefixes += [(*prefix, token) for token in range(1, language.logits.shape[2])]
    return {prefix: state for state, prefix in enumerate(prefixes)}


@SIZES
def test_every_law_of_completions_sums_to_one(vocabulary, length):
    language = toy(vocabulary=vocabulary, length=length)
    assert sorted(language.completions) == sorted(toy_lm.completions(vocabulary, length))
    laws = [language.token_geometric(WEIGHTS), language.token_arithmetic(PER_CONTEXT), *language.sequence_logps().unbind(-1)]
    for law in laws:
        torch.testing.assert_close(law.exp().sum(-1), torch.ones(2, dtype=torch.float64))


@SIZES
def test_completions_score_as_under_a_torch_module_with_the_same_next_token_law(vocabulary, length):
    models = [toy_lm.GruLM(vocabulary, 2, seed) for seed in range(2)]
    logits = torch.full((2, count_states(vocabulary, length), vocabulary, 2), math.nan, dtype=torch.float64)
    language = toy(vocabulary=vocabulary, length=length)
    states = by_prefix(language)
    with torch.no_grad():
        for k, model in enumerate(models):
            logps, tokens = toy_lm.token_logps(model, vocabulary, length, prompts=2)
            for n, row in enumerate(tokens.tolist()):
                atom = tuple(token for token in row if token >= 0)
                for t in range(len(atom)):
                    logits[:, states[atom[:t]], :, k] = logps[:, n, t]
        expected = torch.stack([toy_lm.sequence_logps(model, vocabulary, length, 2) for model in models], dim=-1)
    order = [language.completions.index(atom) for atom in toy_lm.completions(vocabulary, length)]
    torch.testing.assert_close(ToyLanguageBandit(logits, length).sequence_logps()[:, order], expected)


# The two levels of composition.


@pytest.mark.parametrize("weights", [WEIGHTS, PER_CONTEXT], ids=["shared", "per_context"])
@pytest.mark.parametrize("seed", range(5))
def test_composing_tokens_is_measurably_not_composing_sequences(seed, weights):
    """Total variation 0.02 to 0.13 on these random references; `polyref lab composition` reports it by length."""
    language = toy(seed)
    for wrong, right in wrong_and_right(language, weights):
        distance = total_variation(wrong, right)
        assert (distance > 0.02).all() and (distance < 1).all()


@pytest.mark.parametrize("sizes", [{"length": 1}, {"references": 1}])
def test_both_levels_agree_on_one_token_and_on_one_reference(sizes):
    language = toy(**sizes)
    weights = WEIGHTS if "references" not in sizes else torch.ones(1, dtype=torch.float64)
    for wrong, right in wrong_and_right(language, weights):
        assert total_variation(wrong, right).max() < 1e-14


def test_both_levels_agree_when_the_references_do():
    logits = toy(references=1).logits.expand(-1, -1, -1, 3)
    for wrong, right in wrong_and_right(ToyLanguageBandit(logits, 4), WEIGHTS):
        assert total_variation(wrong, right).max() < 1e-14


def test_token_compositions_keep_to_their_definition_on_one_completion():
    language = toy(seed=2)
    states, p = by_prefix(language), language.token_logps.exp()
    geometric, arithmetic = 1.0, 1.0
    atom = (2, 1, 0)
    for t, token in enumerate(atom):
        rows = p[1, states[atom[:t]]]  # (V, K)
        products = [math.prod(q**a for q, a in zip(row, WEIGHTS.tolist(), strict=True)) for row in rows.tolist()]
        geometric *= products[token] / sum(products)
        arithmetic *= (rows[token] @ WEIGHTS).item()
    y = language.completions.index(atom)
    assert language.token_geometric(WEIGHTS)[1, y].exp().item() == pytest.approx(geometric)
    assert language.token_arithmetic(WEIGHTS)[1, y].exp().item() == pytest.approx(arithmetic)


def test_the_conditionals_of_the_mixture_weigh_members_by_their_prefix_mass():
    language = toy(seed=3)
    states, p = by_prefix(language), language.token_logps.exp()
    mixture = language.bandit(torch.zeros(2, len(language.completions)), WEIGHTS, beta=1.0).mixture
    conditionals = language.token_conditionals(mixture).exp()
    for prefix in [(), (1,), (2, 1), (1, 2, 2)]:
        mass = WEIGHTS.clone()
        for t, token in enumerate(prefix):
            mass = mass * p[0, states[prefix[:t]], token]
        torch.testing.assert_close(conditionals[0, states[prefix]], p[0, states[prefix]] @ (mass / mass.sum()))


@SIZES
def test_conditionals_multiply_back_to_the_law_they_came_from(vocabulary, length):
    language = toy(vocabulary=vocabulary, length=length)
    rewards = torch.randn(2, len(language.completions), generator=seeded(1), dtype=torch.float64)
    optimum = reverse_optimum(language.bandit(rewards, WEIGHTS, beta=0.5))
    rebuilt = ToyLanguageBandit(language.token_conditionals(optimum)[..., None], length)
    torch.testing.assert_close(rebuilt.sequence_logps()[..., 0], optimum)


@pytest.mark.parametrize("weights", [WEIGHTS, PER_CONTEXT], ids=["shared", "per_context"])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_nothing_beats_the_exact_optimum(direction, weights):
    """Not a nearby policy, a member, the anchor, nor what one gets by tilting the token-level composition."""
    language = toy(seed=4)
    rewards = torch.rand(2, len(language.completions), generator=seeded(2), dtype=torch.float64)
    bandit = language.bandit(rewards, weights, beta=0.2)
    if direction == "reverse":
        objective, gap, optimum = reverse_objective, reverse_gap, reverse_optimum(bandit)
        wrong, anchor = solve_reverse_kl(rewards, language.token_geometric(weights), 0.2), bandit.geometric
    else:
        objective, gap, optimum = forward_objective, forward_gap, forward_optimum(bandit)
        wrong, anchor = solve_forward_kl(rewards, language.token_arithmetic(weights), 0.2).log_policy, bandit.mixture
    scales = 10 ** torch.linspace(-4, 1, 500, dtype=torch.float64)[:, None, None]
    near = (optimum + scales * torch.randn(500, *rewards.shape, generator=seeded(3), dtype=torch.float64)).log_softmax(-1)
    rivals = torch.cat([near, bandit.logps.movedim(-1, 0), wrong[None], anchor[None]])
    best = objective(optimum, bandit)
    assert (objective(rivals, bandit) < best).all()
    torch.testing.assert_close(best - objective(wrong, bandit), gap(wrong, bandit))
    assert gap(wrong, bandit) > 1e-3


# Bounds and refusals.


def test_a_forbidden_token_forbids_its_completions():
    logits = toy().logits.clone()
    logits[:, 0, 1] = -math.inf
    language = ToyLanguageBandit(logits, 4)
    starts = torch.tensor([atom[0] == 1 for atom in language.completions])
    assert (language.sequence_logps().isneginf() == starts[:, None]).all()
    bandit = language.bandit(torch.where(starts, math.nan, 1.0).expand(2, -1), WEIGHTS, beta=1.0)
    torch.testing.assert_close(reverse_optimum(bandit), bandit.geometric)
    logits[:, 0, 1, 0] = 0.0
    with pytest.raises(ReferenceSetError, match="reference 1 has no mass"):
        reverse_optimum(ToyLanguageBandit(logits, 4).bandit(torch.zeros(2, len(starts)), WEIGHTS, beta=1.0))


def test_bad_tables_are_refused_in_one_line():
    good = toy().logits
    hole, empty = good.clone(), good.clone()
    hole[0, 1, 2, 0], empty[1, 3, :, 2] = math.nan, -math.inf
    for logits, length, part in [
        (good[0], 4, "(15, 3, 3)"),
        (good, 3, "15 states; give 7"),
        (good, 0, "length 0"),
        (good[:, :, :1], 4, "V at least 2"),
        (hole, 4, "(2, 15, 3, 3) hold NaN"),
        (empty, 4, "a row without a token"),
    ]:
        with pytest.raises(ConfigError) as error:
            ToyLanguageBandit(logits, length)
        assert part in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="11 tokens and length 5 make 111111 completions"):
        toy(vocabulary=11, length=5)
