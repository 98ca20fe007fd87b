"""Preference laws: P + P^T = 1 for each, what each one is for, and the law of the pairs by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from polyref.errors import ConfigError
from polyref.theory.preferences import (
    MISSPECIFICATIONS,
    bradley_terry,
    group_mixture,
    heteroscedastic,
    intransitive,
    lapses,
    pair_law,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64)


def has_cycle(beats: Tensor) -> bool:
    """Does the majority relation (Y, Y) of one context hold a cycle of three?"""
    return any(
        beats[i, j] > 0.5 and beats[j, k] > 0.5 and beats[k, i] > 0.5
        for i, j, k in itertools.permutations(range(len(beats)), 3)
    )


@pytest.mark.parametrize("name", MISSPECIFICATIONS)
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 5)])
def test_every_law_is_complementary_inside_the_unit_interval_and_repeats_by_seed(name: str, shape: tuple[int, ...]) -> None:
    rewards = uniform(*shape)
    preference = MISSPECIFICATIONS[name](rewards, generator(3))
    assert preference.shape == (*shape, shape[-1])
    assert preference.dtype == torch.float64
    assert ((preference > 0) & (preference < 1)).all()
    torch.testing.assert_close(preference + preference.mT, torch.ones_like(preference), rtol=0, atol=1e-15)
    torch.testing.assert_close(MISSPECIFICATIONS[name](rewards, generator(3)), preference, rtol=0, atol=0)


@pytest.mark.parametrize("actions", [3, 5, 10])
def test_an_intransitive_crowd_goes_in_circles_and_a_bradley_terry_crowd_does_not(actions: int) -> None:
    rewards = uniform(6, actions)
    crowd = intransitive(rewards, 2.0, generator())
    assert all(has_cycle(beats) for beats in crowd)
    assert not any(has_cycle(beats) for beats in bradley_terry(rewards))


def test_only_bradley_terry_has_additive_log_odds() -> None:
    rewards = 3 * uniform(4, 6)

    def defect(preference: Tensor) -> float:
        """|logit P(i,j) + logit P(j,k) - logit P(i,k)|, which a reward makes 0."""
        odds = preference.logit()
        return float((odds[..., :, :, None] + odds[..., None, :, :] - odds[..., :, None, :]).abs().max())

    defects = {name: defect(law(rewards, generator())) for name, law in MISSPECIFICATIONS.items()}
    assert defects.pop("bradley_terry") < 1e-12
    assert min(defects.values()) > 1e-2, defects


def test_a_given_skew_shifts_the_log_odds() -> None:
    skew = torch.tensor([[0.0, 1.0, -1.0], [-1.0, 0.0, 1.0], [1.0, -1.0, 0.0]], dtype=torch.float64)
    odds = intransitive(torch.zeros(2, 3), 0.7, skew).logit()
    torch.testing.assert_close(odds, (0.7 * skew).expand(2, 3, 3))


def test_the_limits_of_the_laws_are_bradley_terry_or_a_coin() -> None:
    rewards = uniform(2, 4)
    plain = bradley_terry(rewards)
    torch.testing.assert_close(heteroscedastic(rewards, torch.ones(2, 4)), plain)
    torch.testing.assert_close(lapses(plain, 0.0), plain)
    torch.testing.assert_close(lapses(plain, 1.0), torch.full_like(plain, 0.5))
    torch.testing.assert_close(group_mixture([rewards, -rewards], [1.0, 0.0]), plain)
    torch.testing.assert_close(group_mixture([rewards, -rewards], [0.5, 0.5]), torch.full_like(plain, 0.5))
    hard = heteroscedastic(rewards, torch.tensor([1.0, 1.0, 1.0, 100.0]))
    assert (hard[:, 3] - 0.5).abs().max() < 0.02 < (hard[:, 0, 1] - 0.5).abs().max()


def test_the_pair_law_is_the_product_law_given_that_the_actions_differ() -> None:
    contexts = torch.tensor([0.3, 0.7], dtype=torch.float64)
    mu1, mu2 = (uniform(2, 3, seed=s).log_softmax(-1) for s in (5, 6))
    independent = pair_law(contexts, mu1, mu2, distinct=False)
    assert float(independent[1, 2, 0]) == pytest.approx(0.7 * math.exp(mu1[1, 2]) * math.exp(mu2[1, 0]))
    law = pair_law(contexts, mu1, mu2)
    torch.testing.assert_close(law.sum((-2, -1)), contexts)
    assert (law.diagonal(dim1=-2, dim2=-1) == 0).all()
    ratio = law / independent
    torch.testing.assert_close(ratio[0, 0, 1], ratio[0, 2, 1])
    torch.testing.assert_close(pair_law(contexts, mu1), pair_law(contexts, mu1).mT)


def test_bad_input_is_refused_in_one_line() -> None:
    rewards = uniform(2, 3)
    with pytest.raises(ConfigError, match=r"rewards \(2, 3\)"):
        bradley_terry(rewards.masked_fill(rewards == rewards.max(), math.inf))
    with pytest.raises(ConfigError, match="at least 3 actions"):
        intransitive(torch.zeros(1, 2), 1.0, generator())
    with pytest.raises(ConfigError, match="skew-symmetric"):
        intransitive(rewards, 1.0, torch.ones(3, 3, dtype=torch.float64))
    with pytest.raises(ConfigError, match="above 0"):
        heteroscedastic(rewards, torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="lapse rate"):
        lapses(bradley_terry(rewards), 1.5)
    with pytest.raises(ConfigError, match="simplex"):
        group_mixture([rewards], [0.9])
    with pytest.raises(ConfigError, match="one share a group"):
        group_mixture([rewards], [0.5, 0.5])
    with pytest.raises(ConfigError, match="normalised"):
        pair_law(torch.ones(1), torch.zeros(1, 2))
    with pytest.raises(ConfigError, match=r"context \[1\]"):
        pair_law(torch.tensor([0.5, 0.5]), torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log())
