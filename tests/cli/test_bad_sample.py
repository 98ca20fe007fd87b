"""What `polyref sample` refuses: one line, exit code 2, and a folder that can be used again."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from cli_world import World, assert_ends_in_one_line, assert_refused, some_rows, table
from polyref.rewards.functions import from_function


@table(
    {
        "no such method": ({"method": "nuts"}, "unknown method 'nuts'", "auto, mixture, rejection, tokens, smc"),
        "a method of the other composition": (
            {"method": "mixture"},
            "method mixture draws from a composition that is arithmetic",
        ),
        "no such tilt": ({"tilt": "hard"}, "unknown tilt 'hard'", "rejection, importance, forward"),
        "forward weights of a geometric composition": (
            {"tilt": "forward", "beta": 1.0, "reward": {"model": "rule:length"}},
            "tilt forward weighs draws of the mixture, and the composition of the references is geometric",
            "set composition to arithmetic",
        ),
        "forward weights of particles": (
            {
                "tilt": "forward",
                "beta": 1.0,
                "reward": {"model": "rule:length"},
                "method": "smc",
                "references": {"members": [{"model": "MODEL"}]},
            },
            "tilt forward weighs draws of the mixture, and method is smc",
        ),
        "forward weights without beta": ({"tilt": "forward"}, "tilt forward is given and no beta", "give a reward and beta"),
        "no such pairing": (
            {"pairing": "uncertain", "reward": {"model": "rule:length"}},
            "unknown pairing 'uncertain'",
            "closest",
        ),
        "beta without a reward": ({"beta": 0.1}, "beta is given and no reward"),
        "pairs without a reward": ({"pairing": "random"}, "pairing is given and no reward"),
        "a bound without beta": ({"r_max": 1.0, "reward": {"model": "rule:length"}}, "r_max has no effect without beta"),
        "a bound that is infinite": (
            {"r_max": ".inf", "beta": 1.0, "reward": {"model": "rule:length"}},
            "r_max is inf",
            "finite",
        ),
        "a bound beside weights": (
            {"r_max": 1.0, "beta": 1.0, "tilt": "importance", "reward": {"model": "rule:length"}},
            "r_max has no effect on tilt importance",
        ),
        "a beta of 0": ({"beta": 0.0, "reward": {"model": "rule:length"}}, "beta is 0", "above 0"),
        "fewer proposals than samples": (
            {"proposals": 3, "beta": 1.0, "reward": {"model": "rule:length"}},
            "3 proposals cannot give 4 samples",
        ),
        "a temperature of the reward": ({"reward": {"model": "rule:length", "temperature": 2.0}}, "temperature has no effect"),
        "no such rule": ({"reward": {"model": "rule:beauty"}}, "there is no rule 'rule:beauty'", "choose one of"),
        "a negative margin": ({"min_margin": -1.0}, "min_margin is -1.0", "at least 0"),
        "no samples": ({"n": 0}, "n is 0", "at least 1"),
        "a temperature of a composition": ({"temperature": 0.5}, "temperature is 0.5", "leave both at 1"),
        "a negative seed": ({"seed": -1}, "seed is -1"),
        "a limit of 0": ({"limit": 0}, "limit is 0", "number of prompts"),
        "a file of no known kind": ({"file_name": "samples.csv"}, "the kind of file is not known", ".jsonl"),
        "the name of another file": ({"file_name": "prompts.jsonl"}, "file_name is prompts.jsonl", "nothing else"),
        "no run folder": ({"output_dir": ""}, "output_dir is empty", "name the run folder"),
        "prompts too long": ({"max_new_tokens": 250}, "row 1: 6 prompts leave no room for 250 new tokens", "leave_out"),
        "a budget below one model's completions": (
            {"references": {"members": [{"model": "MODEL"}]}, "budget": 23},
            "a budget of 23 calls does not cover 4 completions of 6 tokens",
            "at least 24",
        ),
    }
)
def test_what_is_wrong_is_said_in_one_line(given: dict[str, Any], says: tuple[str, ...], world: World) -> None:
    world.pairs()
    given = json.loads(json.dumps(given).replace('"MODEL"', json.dumps(str(world.model))))
    assert_ends_in_one_line(world.run(world.sample(**given)), *says)
    assert not (world.path / "sample").exists()


@table(
    {
        "no prompt": ([{"question": "x"}], "row 1, column prompt: is missing (the row has question)"),
        "a prompt that is a number": ([{"prompt": "x"}, {"prompt": 3}], "row 2, column prompt: is a number"),
        "an empty prompt": ([{"prompt": " "}], "row 1, column prompt: is empty"),
        "weights in one row only": (
            [{"prompt": "x", "reference_weights": [0.5, 0.5]}, {"prompt": "y"}],
            "row 2",
            "holds no weights",
        ),
        "half a pair": ([{"prompt": "x", "chosen": "y"}], "row 1, column rejected: is missing"),
    }
)
def test_a_bad_prompt_is_named_by_its_row(given: list[Any], says: tuple[str, ...], world: World) -> None:
    world.pairs(*given)
    assert_refused(world, world.sample(), says)


def test_prompts_that_are_too_long_or_get_nothing_may_be_left_out(world: World) -> None:
    world.pairs(*some_rows(2), {"prompt": "x" * 230, "chosen": "a", "rejected": "b"})
    settings = {"budget": 12, "n": 1, "method": "tokens"}
    assert_refused(world, world.sample(**settings), ["row 3: 1 prompts leave no room for 6 new tokens", "leave_out"])
    outcome = world.run(world.sample(**settings | {"leave_out": True}))
    assert outcome.code == 0, outcome.err
    summary = json.loads((world.path / "sample" / "summary.json").read_text())
    assert summary["left_out"]["prompt too long"] == 1 and summary["prompts"] == 2


def test_nothing_accepted_within_the_budget_stops_with_what_was_drawn_kept(world: World) -> None:
    world.pairs(*some_rows(6))
    settings = {"budget": 11, "n": 1, "method": "tokens"}  # one proposal takes up to 12
    outcome = world.run(world.sample(**settings))
    says = ("row 1, prompt 'question 0?': no sample within the budget, nor for 1 other prompts", "11 calls does not cover")
    assert_ends_in_one_line(outcome, *says, "set leave_out")
    assert len(list((world.path / "sample" / "stages" / "draw").iterdir())) == 1
    outcome = world.run(world.sample(**settings, leave_out=True))
    assert outcome.code == 0, outcome.err
    summary = json.loads((world.path / "sample" / "summary.json").read_text())
    assert summary["left_out"]["no sample"] == 6 and summary["samples"] == 0


def test_a_tilt_that_accepts_nothing_is_an_error_of_one_line(world: World) -> None:
    settings = {"reward": {"model": "rule:length:characters"}, "beta": 0.01, "r_max": 100.0}
    outcome = world.run(world.sample(**settings))
    assert_ends_in_one_line(outcome, "no sample within the budget", "raise the budget or beta")


def test_pairs_may_be_made_otherwise_of_the_same_samples(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"reward": {"model": "rule:length:characters"}, "pairing": "best_worst"}
    outcome = world.run(world.sample(**settings, min_margin=100.0))
    assert_ends_in_one_line(outcome, "none of 6 prompts gives a pair", "lower min_margin")
    monkeypatch.setattr("polyref.samplers.sampled.open_draw", lambda *_: pytest.fail("nothing is drawn again"))
    outcome = world.run(world.sample(**settings))
    assert outcome.code == 0, outcome.err
    assert (world.path / "sample" / "pairs.jsonl").read_text()


def test_a_reward_of_nan_is_an_error_of_one_line(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = from_function(lambda prompt, completion: math.nan, "broken", "broken")
    monkeypatch.setattr("polyref.cli.sample_stages.load_reward", lambda source: broken)
    monkeypatch.setattr("polyref.cli.sample.load_reward", lambda source: broken)
    outcome = world.run(world.sample(reward={"model": "rule:length"}))
    assert_ends_in_one_line(outcome, "broken, row 1: gave nan as reward", "finite")
    assert not (world.path / "sample").exists()


def test_what_stands_there_is_kept_and_other_settings_or_prompts_are_refused(world: World) -> None:
    world.pairs(*some_rows(2))
    (world.path / "sample").mkdir()
    world.file("sample/prompts.jsonl", "mine")
    assert_refused(world, world.sample(), ["prompts.jsonl: is there already", "name another file_name or output_dir"])
    words = {"output_dir": world.path / "other"}
    outcome = world.run(world.sample(**words))
    assert outcome.code == 0, outcome.err
    assert_refused(world, world.sample(**words, n=5), ["another configuration: n 4 -> 5", "name a new run folder"])
    world.pairs(*some_rows(3))
    assert_refused(world, world.sample(**words), ["changed since: prompts", "name a new run folder"])
