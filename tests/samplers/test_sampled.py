"""Prompts to samples: whose coins decide what a tilt keeps."""

from __future__ import annotations

from collections.abc import Sequence

from polyref.data.prompt_rows import PromptRow, places_among
from polyref.objectives.metrics import Interval
from polyref.rewards.functions import from_function
from polyref.samplers.composed_values import Drawn, Sample
from polyref.samplers.engine import SamplingParameters
from polyref.samplers.sampled import Drawing, Tilt, sample

N = 60
HOW = Drawing(N, N, SamplingParameters(2), "auto", None, 32, 0, Tilt(1.0, r_max=0.7))
REWARD = from_function(lambda prompt, completion: 0.0, "nothing")


def kept(rows: Sequence[PromptRow]) -> list[list[int]]:
    """What each row's coins, of about 1/2, keep of the same N draws."""
    drawn = Drawn("engine", tuple(Sample((1, 2), f"{i}", True, (0.0,)) for i in range(N)), N, N, Interval(0, 0, 0), N, True)
    found = sample(rows, lambda some: [drawn] * len(some), HOW, REWARD)
    return [one.kept.indices.tolist() for one in found if one.kept is not None]


def test_equal_prompts_have_coins_of_their_own_whatever_stands_around_them() -> None:
    x, under, other = PromptRow("x"), PromptRow("x", (0.3, 0.7)), PromptRow("y")
    together = kept([x, under, x, other, under])
    assert len(together) == 5 == len(set(map(tuple, together))) and all(10 < len(one) < 50 for one in together)
    assert kept([other, under, x]) == [together[3], together[1], together[0]]


def test_equal_prompts_have_places_of_their_own_in_whatever_parts_they_are_asked_for() -> None:
    x, under, other = PromptRow("x", (1.0, 0.0), "f", 1), PromptRow("x", (0.3, 0.7), "f", 2), PromptRow("y", (0.3, 0.7), "f", 3)
    places = places_among([x, other, under])
    assert places([x, other, under]) == [0, 0, 1] and places([under]) == [1] and places([other, under, x]) == [0, 1, 0]
    assert places([under, x, under, under]) == [1, 0, 3, 5], "none that another row has"
    assert places_among([x])([x, x]) == [0, 1]
