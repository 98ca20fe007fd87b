"""Preference models from rewards, votes and ensembles: antisymmetric, right on known numbers, and never made up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from polyref.errors import ConfigError, DataError, InputError, ModelError
from polyref.rewards.functions import from_function
from polyref.rewards.preference_model import NamedPreferences, from_ensemble, from_reward, from_votes, probability_of
from polyref.types import PreferenceRecord, Text


class Length:
    """Characters as a reward; counts its calls."""

    name = "length"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        self.calls += 1
        assert len(prompts) == len(completions)
        return torch.tensor([float(len(c)) for c in completions], dtype=torch.float64)


PROMPTS, FIRST, SECOND = ["p", "q", "q"], ["a", "long one", ""], ["abc", "b", "it"]
CHAT = ({"role": "user", "content": "hello"},)


def reply(text: str) -> Text:
    return ({"role": "assistant", "content": text},)


VOTES = [
    PreferenceRecord("p", "a", "abc", chosen_probability=0.75),
    PreferenceRecord("q", "b", "long one"),
    PreferenceRecord("q", "", "it", chosen_probability=1 / 3),
    PreferenceRecord(CHAT, reply("yes"), reply("no"), chosen_probability=0.9),
]

MODELS = {
    "reward": from_reward(Length(), 2.0),
    "votes": from_votes(VOTES),
    "ensemble": from_ensemble([from_reward(Length(), 2.0), from_votes(VOTES)]),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_other_order_is_the_other_probability_and_no_order_is_one_half(model):
    g = model(PROMPTS, FIRST, SECOND)
    assert g.dtype == torch.float64 and g.shape == (3,) and not g.requires_grad
    torch.testing.assert_close(model(PROMPTS, SECOND, FIRST), 1 - g, rtol=0, atol=3e-16)
    assert model(PROMPTS, FIRST, FIRST).tolist() == [0.5] * 3
    assert model([], [], []).shape == (0,)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_row_does_not_depend_on_the_others(model):
    alone = [model([p], [a], [b]) for p, a, b in zip(PROMPTS, FIRST, SECOND, strict=True)]
    assert torch.equal(torch.cat(alone), model(PROMPTS, FIRST, SECOND))


def test_odds_are_antisymmetric_to_the_last_bit():
    d = torch.cat([torch.linspace(-60, 60, 1001, dtype=torch.float64), torch.tensor([0.0, 1e3, 1e-300, math.inf])])
    assert torch.equal(probability_of(-d), 1 - probability_of(d))
    torch.testing.assert_close(probability_of(d), torch.sigmoid(d), rtol=0, atol=3e-16)


def test_a_reward_gives_bradley_terry_at_its_temperature_in_one_call():
    reward = Length()
    g = from_reward(reward, 2.0)(PROMPTS, FIRST, SECOND)
    torch.testing.assert_close(g, torch.sigmoid(torch.tensor([-2, 7, -2], dtype=torch.float64) / 2))
    assert reward.calls == 1 and "length" in from_reward(reward).name


def test_votes_are_looked_up_in_either_order_and_averaged():
    assert MODELS["votes"](PROMPTS, FIRST, SECOND).tolist() == pytest.approx([0.75, 0, 1 / 3])
    assert MODELS["votes"]([CHAT], [reply("no")], [reply("yes")]).item() == pytest.approx(0.1)
    single_votes = [PreferenceRecord("p", *pair) for pair in (("a", "b"), ("b", "a"), ("a", "b"), ("a", "b"))]
    assert from_votes(single_votes)(["p"], ["a"], ["b"]).item() == 0.75


@pytest.mark.parametrize(("prompt", "first", "second"), [("p", "a", "b"), ("q", "a", "abc"), (CHAT, "yes", "no")])
def test_a_pair_nobody_voted_on_is_refused_with_its_row(prompt, first, second):
    with pytest.raises(DataError, match="votes, row 2: nobody voted on this pair") as refused:
        MODELS["votes"](["p", prompt], ["a", first], ["abc", second])
    assert refused.value.exit_code == 2


def test_an_ensemble_is_the_mean_probability_of_its_members():
    members = [MODELS["reward"], MODELS["votes"]]
    expected = sum(member(PROMPTS, FIRST, SECOND) for member in members) / 2
    torch.testing.assert_close(MODELS["ensemble"](PROMPTS, FIRST, SECOND), expected)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ConfigError, match="temperature is"):
        from_reward(Length(), temperature)


def test_what_is_no_probability_is_refused():
    with pytest.raises(ConfigError, match="without members"):
        from_ensemble([])
    with pytest.raises(InputError, match="2 completions for 3 prompts"):
        MODELS["reward"](PROMPTS, FIRST, SECOND[:2])
    for bad in (1.5, -0.1, math.nan):
        model = NamedPreferences("mine", lambda p, a, b, bad=bad: torch.tensor([0.5, bad]))
        with pytest.raises(ModelError, match="mine, row 2"):
            model(["p", "p"], ["a", "a"], ["b", "b"])


def test_a_reward_that_is_not_finite_is_refused():
    class Broken(Length):
        name = "broken"

        def __call__(self, prompts, completions):
            return super().__call__(prompts, completions) * math.nan

    with pytest.raises(ModelError, match="broken, row 1"):
        from_reward(Broken())(PROMPTS, FIRST, SECOND)


def test_a_reward_of_a_second_completion_that_is_not_finite_is_named_by_the_row_of_its_pair():
    reward = from_function(lambda x, y: math.nan if y == "bad" else 1.0, "r")
    with pytest.raises(ModelError, match="^r, row 2: gave nan"):
        from_reward(reward)(["p"] * 3, ["a"] * 3, ["b", "bad", "b"])
    assert from_reward(reward)([], [], []).shape == (0,)
