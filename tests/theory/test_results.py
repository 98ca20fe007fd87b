"""Results survive JSON, refuse what does not fit, and judge a slope by its interval."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from polyref.errors import ConfigError
from polyref.theory.experiments import ENOUGH, EXPERIMENTS, Experiment, check
from polyref.theory.regression import SlopeFit
from polyref.theory.results import (
    Curve,
    Estimate,
    ExperimentResult,
    Guide,
    Measured,
    Panel,
    Table,
    agreement_of,
    from_dict,
    to_dict,
)


def result() -> ExperimentResult:
    curve = Curve("gap", torch.tensor([1.0, 2.0]), np.array([1 / 3, math.nan]), [0.1, 0.2], (0.5, math.inf))
    return ExperimentResult(
        "some-name",
        "A title",
        "Why?",
        "It falls.",
        "It fell.",
        "agrees",
        (
            Panel("p", "x", "y", (curve,), (Guide(-1.0, "1/n", (1.0, 2.0)), Guide(-0.5, "slower"))),
            Panel("q", "x", "y", (Curve("c", [0.0, 1.0], [1.0, 2.0]),), log_x=False, categories=("a", "b")),
        ),
        Table(("n", "what", "value"), ((1, "a", Estimate(1 / 3, 0.1, 0.5)), (2, None, 0.25))),
        (SlopeFit("gap", "mean", -1.0, -1.1, -0.9, 0.0, (1.0, 2.0), -1.0, ""), SlopeFit("m", "mean", *[math.nan] * 4, (1.0,))),
        {"replicates": 3, "seed": 0, "sizes": [1, 2], "odd": math.nan},
        ("a note",),
        (Measured("some-name", 0.9, 1.0, 0.5, 2.0),),
    )


def test_json_and_back() -> None:
    plain = to_dict(result())
    text = json.dumps(plain, allow_nan=False)
    again = from_dict(json.loads(text))
    assert json.dumps(to_dict(again), allow_nan=False) == text
    assert again.table == result().table and again.measured == result().measured and again.notes == ("a note",)
    assert again.panels[1] == result().panels[1] and again.panels[0].guides == result().panels[0].guides
    assert math.isnan(again.slopes[1].slope) and again.slopes[0] == result().slopes[0]
    first = again.panels[0].curves[0]
    assert first.y[0] == 0.3333333333 and math.isnan(first.y[1]) and math.isnan(first.high[1])  # type: ignore[index]


@pytest.mark.parametrize("plain", [{}, {"panels": 3}, {"panels": [], "table": {}}])
def test_what_is_no_result_is_refused(plain: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="not the result of an experiment"):
        from_dict(plain)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="short: y has 1 values for 2 x"):
        Curve("short", [1.0, 2.0], [1.0])
    with pytest.raises(ConfigError, match="table row 1: 1 cells for 2 columns"):
        Table(("a", "b"), ((1, 2), (1,)))
    with pytest.raises(ConfigError, match="agreement is 'perhaps'"):
        from_dict(to_dict(result()) | {"agreement": "perhaps"})


@pytest.mark.parametrize(
    ("slope", "low", "high", "claimed", "verdict"),
    [
        (-1.0, -1.1, -0.9, -1.0, "agrees"),
        (-1.0, -1.1, -0.9, -0.5, "beats the claim"),
        (-0.3, -0.35, -0.25, -0.5, "misses the claim"),
        (-1.02, -1.03, -1.01, -1.0, "agrees"),
        (-0.4, -0.46, -0.34, -0.5, "agrees"),
        (-1.0, -1.1, -0.9, None, "no claim"),
        (math.nan, math.nan, math.nan, -1.0, "undecided"),
        (math.nan, math.nan, math.nan, None, "no claim"),
        (-0.5, -1.0, -0.3, -0.5, "undecided"),
        (-0.5, -0.9, 0.0, -0.5, "undecided"),
        (-0.5, -0.99, -0.01, -0.5, "agrees"),
        (0.5, 0.1, 1.1, 0.5, "undecided"),
        (-1.2, -1.9, -0.56, -0.5, "beats the claim"),
    ],
)
def test_agreement(slope: float, low: float, high: float, claimed: float | None, verdict: str) -> None:
    assert agreement_of(SlopeFit("", "mean", slope, low, high, 0.0, (1.0,), claimed)) == verdict


def test_experiments_take_their_defaults_and_refuse_bad_settings() -> None:
    seen = []

    def run(replicates: int, seed: int, progress: object) -> ExperimentResult:
        seen.append((replicates, seed))
        return result()

    one = Experiment("some-name", "A title", run, default_replicates=100, seconds=1.0)
    assert to_dict(one()) == to_dict(one(500, 3)) == to_dict(result()) and seen == [(100, 0), (500, 3)]
    assert one(20).notes[:-1] == result().notes and "With 20 replicates" in one(20).notes[-1]
    for replicates, seed, what in ((19, 0, "replicates is 19"), (-3, 0, "replicates is -3"), (20, -1, "seed is -1")):
        with pytest.raises(ConfigError, match=what):
            one(replicates, seed)
        with pytest.raises(ConfigError, match=what):
            check(replicates, seed)


def test_the_registry_holds_what_it_names() -> None:
    for name, one in EXPERIMENTS.items():
        assert one.name == name and one.title and one.default_replicates >= ENOUGH and one.seconds > 0
    assert len(EXPERIMENTS) == len(list(EXPERIMENTS)) > 1
    with pytest.raises(KeyError):
        EXPERIMENTS["nothing"]
