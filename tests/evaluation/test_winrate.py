"""Win rates: what counts as a win, and intervals over prompts rather than comparisons."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from polyref.errors import ConfigError, DataError, InputError, ModelError
from polyref.evaluation.winrate import (
    crossed_outcomes,
    majority_outcomes,
    reward_outcomes,
    win_rate,
    win_rate_by_preference,
    win_rate_by_reward,
)
from polyref.rewards.preference_model import from_reward


class Length:
    name = "length"

    def __call__(self, prompts, completions):
        assert len(prompts) == len(completions)
        return torch.tensor([float(len(c)) for c in completions], dtype=torch.float64)


PROMPTS = ["p", "q", "q", "r"]
POLICY, BASELINE = ["longer", "a", "abc", "same"], ["long", "ab", "ab", "mesa"]


def test_wins_ties_and_losses():
    policy, baseline = torch.tensor([1.0, 0.0, 2.0, -1.0]), torch.tensor([0.0, 1.0, 2.0, -1.25])
    assert reward_outcomes(policy, baseline).tolist() == [1, 0, 0.5, 1]
    assert reward_outcomes(policy, baseline, tie_within=0.25).tolist() == [1, 0, 0.5, 0.5]
    assert majority_outcomes(torch.tensor([0.51, 0.5, 0.49, 1.0])).tolist() == [1, 0.5, 0, 1]


def test_ties_count_half_and_both_golds_agree():
    by_reward = win_rate_by_reward(Length(), PROMPTS, POLICY, BASELINE, seed=0)
    assert by_reward.rate.mean == 2.5 / 4
    assert by_reward[1:] == (2, 1, 1, 3)
    assert by_reward == win_rate_by_preference(from_reward(Length()), PROMPTS, POLICY, BASELINE, seed=0)
    everything = win_rate_by_reward(Length(), PROMPTS, POLICY, BASELINE, seed=0, tie_within=10)
    assert everything.ties == 4 and everything.rate == (0.5, 0.5, 0.5)


def test_the_other_side_wins_the_rest():
    forth, back = (win_rate_by_reward(Length(), PROMPTS, *sides, seed=0) for sides in ((POLICY, BASELINE), (BASELINE, POLICY)))
    assert back.rate.mean == 1 - forth.rate.mean
    assert (back.rate.low, back.rate.high) == pytest.approx((1 - forth.rate.high, 1 - forth.rate.low))
    assert (back.wins, back.losses) == (forth.losses, forth.wins)


def test_probabilities_give_the_expected_win_rate():
    found = win_rate([0.9, 0.5, 0.2, 0.8], PROMPTS, seed=0)
    assert found.rate.mean == pytest.approx(0.6) and found[1:] == (2, 1, 1, 3)


def test_repeating_every_comparison_of_a_prompt_does_not_narrow_the_interval():
    outcomes = np.random.default_rng(0).integers(0, 2, 60)
    prompts = [f"prompt {i}" for i in range(60)]
    once = win_rate(outcomes, prompts, seed=1).rate
    many = win_rate(np.repeat(outcomes, 8), np.repeat(prompts, 8).tolist(), seed=1).rate
    assert many == pytest.approx(once)
    assert once.high - once.low > 0.2


def test_conversations_are_prompts_too():
    same = [({"role": "user", "content": "hi"},), ({"content": "hi", "role": "user"},)]
    found = win_rate([1.0, 0.0], same, seed=0)
    assert found.prompts == 1 and math.isnan(found.rate.low)


def test_intervals_cover_at_their_level():
    generator, hits = np.random.default_rng(0), 0
    prompts = [f"{i // 4}" for i in range(400)]
    for seed in range(200):
        of_prompt = generator.beta(2, 2, 100).repeat(4)
        rate = win_rate((generator.random(400) < of_prompt).astype(float), prompts, seed=seed, resamples=400).rate
        hits += rate.low <= 0.5 <= rate.high
    assert hits >= 178  # 190 expected; a binomial falls below with chance 0.0006


@pytest.mark.parametrize("bad", [-0.01, 1.5, math.nan])
def test_what_is_no_outcome_is_refused_with_its_number(bad):
    with pytest.raises(DataError, match="win_rate, outcome 2: is"):
        win_rate([1.0, bad], ["p", "q"], seed=0)


def test_unequal_lengths_and_nothing_are_refused():
    with pytest.raises(DataError, match=r"outcomes of shape \(2,\) for 1 prompts"):
        win_rate([1.0, 0.0], ["p"], seed=0)
    with pytest.raises(DataError, match=r"outcomes of shape \(0,\) for 0 prompts"):
        win_rate_by_reward(Length(), [], [], [], seed=0)
    for by in (
        lambda: win_rate_by_reward(Length(), PROMPTS, POLICY, BASELINE[:2], seed=0),
        lambda: win_rate_by_preference(from_reward(Length()), PROMPTS, POLICY, BASELINE[:2], seed=0),
    ):
        with pytest.raises(InputError, match="2 completions for 4 prompts"):
            by()
    with pytest.raises(ConfigError, match="cannot be compared"):
        reward_outcomes(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ConfigError, match="tie_within is nan"):
        reward_outcomes(torch.zeros(2), torch.zeros(2), tie_within=math.nan)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_number_is_no_tie(bad):
    with pytest.raises(DataError, match=f"^reward_outcomes, policy reward 2: is {bad}; a reward is a finite number$"):
        reward_outcomes(torch.tensor([0.0, bad]), torch.zeros(2))
    with pytest.raises(DataError, match=f"^reward_outcomes, baseline reward 1: is {bad};"):
        reward_outcomes(torch.zeros(1), torch.tensor([bad]))
    for value in (bad, 1.5, -0.5):
        with pytest.raises(DataError, match=f"^majority_outcomes, probability 2: is {value}; leave out what was not judged"):
            majority_outcomes(torch.tensor([0.0, value, 1.0]))


def test_a_gold_that_gives_no_number_is_refused():
    class Broken(Length):
        name = "broken"

        def __call__(self, prompts, completions):
            return super().__call__(prompts, completions) * math.nan

    with pytest.raises(ModelError, match="broken, row 1"):
        win_rate_by_reward(Broken(), PROMPTS, POLICY, BASELINE, seed=0)


def test_draws_that_share_their_randomness_are_not_compared():
    """Both are 0 or 2 by the same coin, the policy 1 more: it wins every coupled draw, and three of four independent ones."""
    policy, baseline = torch.tensor([[1.0, 3.0], [3.0, 3.0]]), torch.tensor([[0.0, 2.0], [2.0, 2.0]])
    assert crossed_outcomes(policy, baseline).tolist() == [0.5, 1.0]
    coins = 2 * torch.randint(0, 2, (500, 8), generator=torch.Generator().manual_seed(0)).double()
    assert float(crossed_outcomes(coins + 1, coins).mean()) == pytest.approx(0.75, abs=0.02)
    assert crossed_outcomes(coins, coins).mean() == 0.5
    assert crossed_outcomes(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [0.0]])).tolist() == [1.0, 0.5]
    with pytest.raises(ConfigError, match="cannot be compared"):
        crossed_outcomes(torch.zeros(2, 3), torch.zeros(2, 4))
