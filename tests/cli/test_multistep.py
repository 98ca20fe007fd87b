"""What `polyref multistep` leaves behind, what it refuses, and that it ends alike however often it was killed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cli_world import World, assert_ends_in_one_line, assert_refused, table
from crash import Point, Runs, Warm, left_by
from polyref.cli import training_rewards
from polyref.cli.loop_settings import LoopPrompts
from polyref.cli.multistep import make_multistep
from polyref.cli.multistep_settings import MultistepSettings
from polyref.cli.preference_source import RewardSource
from polyref.data.sources import load_preferences
from polyref.errors import ConfigError
from polyref.loops import generate, pairing, train
from polyref.rewards.functions import from_function
from polyref.training.preference_trainer import PreferenceTrainer


def summary_of(run: Path) -> dict[str, Any]:
    summary = json.loads((run / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert isinstance(summary, dict)
    return summary


def test_a_run_leaves_a_policy_its_numbers_and_its_page(world: World) -> None:
    settings = {"lora": {"r": 2}, "merge_adapter": "true", "correct": "true", "gold": {"model": "rule:length"}}
    outcome = world.run(world.multistep(**settings))
    assert outcome.code == 0, outcome.err
    run = world.path / "multistep"
    summary = summary_of(run)
    assert summary["anchor"] == "the original references, at every step" and summary["references"][1] == "brief"
    assert [row["step"] for row in summary["steps"]] == [0, 1, 2] and summary["reached"]
    assert [row["beta"] for row in summary["steps"]] == [None, 4.0, 2.0] and summary["judged_on"] == "2 held-out prompts"
    manifest = json.loads((run / "manifest.json").read_text())
    told = {name: summary[name] for name in ("anchor", "dtypes")}
    assert told == manifest["stages"]["train-1"]["info"] and told["dtypes"]["references"] == ["float32", "float32"]
    first, second = summary["steps"][1:]
    assert first["step_beta"] == second["step_beta"] == 4.0 and second["acceptance"] is None and second["scored"] == 32
    assert all(row["kl"][0] is not None and len(row["kl_each"]) == 2 for row in summary["steps"])
    assert (run / "model" / "model.safetensors").exists() and not list(run.rglob("checkpoint-*"))
    adapters = [load_file(run / "stages" / f"train-{step}" / "model" / "adapter_model.safetensors") for step in (1, 2)]
    assert all(not tensor.equal(adapters[1][name]) for name, tensor in adapters[0].items()), "one adapter, trained on"
    records = load_preferences(run / "stages" / "pair-2" / "pairs.jsonl")
    assert len(records) == second["pairs"] and all(0.5 <= one.chosen_probability < 1 for one in records)
    page = (run / "report.html").read_text()
    assert "Reward against KL" in page and "Proposals against what was kept" in page and "Gold reward against KL" in page
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in metrics] == sorted(row["round"] for row in metrics) and metrics[-1]["round"] == 2
    before = left_by(run)
    assert world.run(world.multistep(**settings)).code == 0 and left_by(run) == before
    assert "names the policy's own model" not in outcome.err
    changed = world.run(world.multistep(**settings | {"beta": 3}))
    assert_ends_in_one_line(changed, "made with another configuration: beta 2")
    world.pairs({"prompt": "another question?"}, {"prompt": "a third?"}, {"prompt": "a fourth?"})
    assert_ends_in_one_line(world.run(world.multistep(**settings)), "is complete", "held-out prompts", "prompts")


def test_hard_labels_an_adapted_schedule_and_the_hinge_of_rso(world: World) -> None:
    adapted = {"acceptance": 0.95, "steps": None, "most_steps": 1, "labels": "hard", "loss_type": "hinge", "beta": 0.3}
    outcome = world.run(world.multistep(**adapted, references=None, held_out=None, r_max=6, pairing="best_worst", pairs=1))
    assert outcome.code == 0, outcome.err
    summary = summary_of(world.path / "multistep")
    last = summary["steps"][-1]
    assert (
        not summary["reached"]
        and last["beta"] > 0.3
        and "was not reached" in (world.path / "multistep/report.html").read_text()
    )
    assert summary["references"] == ["the starting policy"] and last["exact_tilts"] == 6 and last["pairs"] <= 6
    assert last["acceptance"][0] == pytest.approx(0.95, abs=0.1) and summary["steps"][0]["kl"][0] == pytest.approx(0, abs=1e-4)


def test_particles_are_weighed_and_resampled(world: World) -> None:
    outcome = world.run(world.multistep(method="smc", steps=1))
    assert outcome.code == 0, outcome.err
    (row,) = summary_of(world.path / "multistep")["steps"][1:]
    assert row["acceptance"] is None and row["exact_prompts"] == 0 and row["ess"] <= row["kept"] == 4 * 6


def test_what_is_approximate_or_flatters_is_said(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.pairs()
    words = world.multistep(steps=1, r_max=1, held_out=None, eval_data=world.path / "pairs.jsonl", limit=3)
    outcome = world.run(words)
    assert outcome.code == 0, outcome.err
    summary = summary_of(world.path / "multistep")
    (row,) = summary["steps"][1:]
    assert row["above_r_max"] == 3 and row["exact_tilts"] == 0 and summary["shared_prompts"] == 3 and row["unscored"] == 0
    page = (world.path / "multistep" / "report.html").read_text()
    assert "3 times a prompt had rewards above the r_max" in page and "6 held-out prompts (3 of them trained on too)" in page
    assert "rewards of 3 prompts are above r_max" in caplog.text and "flatters" in caplog.text


def after(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, and then a kill."""

    def stopped(*args: Any, **options: Any) -> Any:
        function(*args, **options)
        raise KeyboardInterrupt

    return stopped


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("settings", [{}, {"lora": {"r": 2}}], ids=["whole weights", "an adapter"])
def test_a_run_killed_anywhere_ends_with_the_bytes_of_an_unbroken_one(
    settings: dict[str, Any], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = world.multistep(output_dir=world.path / "unbroken" / "run", save_steps=1, **settings)
    assert world.run(whole).code == 0
    words = world.multistep(output_dir=world.path / "broken" / "run", save_steps=1, **settings)
    points = [(generate, "write_bytes"), (pairing, "write_preferences"), (pairing, "write_bytes"), (train, "save_policy")]
    points += [(PreferenceTrainer, "_save_checkpoint"), (train, "write_bytes")]
    kills = 0
    while True:
        place, name = points[kills % len(points)]
        with monkeypatch.context() as patch:
            patch.setattr(place, name, after(getattr(place, name)))
            outcome = world.run(words)
        if outcome.code == 0:
            break
        assert outcome.code == 1 and "the same command goes on from here" in outcome.err
        kills += 1
        assert kills < 60
    assert kills > 5 and left_by(world.path / "broken" / "run") == left_by(world.path / "unbroken" / "run")


@pytest.mark.slow
def test_a_process_killed_by_signal_goes_on_to_the_same_bytes(world: World) -> None:
    with Warm(world.environment) as warm:
        runs = Runs(warm, world.path, lambda name: world.multistep(output_dir=world.path / name / "run", save_steps=1))
        for at in (Point("name", "propose-1"), Point("step", "train-1"), Point("half", "evaluate-1")):
            runs.kill("killed", at)
        runs.goes_on("killed")


@table(
    {
        "a beta of 0": ({"beta": 0.0}, "beta is 0", "above 0"),
        "no steps": ({"steps": 0}, "steps is 0", "at least 1"),
        "two schedules": ({"acceptance": 0.2}, "steps and acceptance are both given"),
        "an acceptance of 1": ({"acceptance": 1.0, "steps": None}, "acceptance is 1", "between 0 and 1"),
        "one kept": ({"keep": 1}, "keep is 1 of 8 proposals", "for a pair"),
        "more kept than proposed": ({"keep": 9}, "keep is 9 of 8 proposals"),
        "no such pairing": ({"pairing": "uncertain"}, "unknown pairing 'uncertain'", "random"),
        "no such labels": ({"labels": "votes"}, "unknown labels 'votes'", "soft, hard"),
        "no such method": ({"method": "nuts"}, "unknown method 'nuts'"),
        "a method of the other composition": (
            {"method": "mixture"},
            "method mixture draws from a composition that is arithmetic",
        ),
        "ties of soft labels": ({"tie_within": 0.5}, "tie_within has no effect on soft labels"),
        "a correction of one step": ({"steps": 1, "correct": "true"}, "correct has no effect on one step"),
        "no reward": ({"reward": None}, "no reward is given", "reward.model"),
        "a temperature": (
            {"reward": {"model": "rule:length", "temperature": 2.0}},
            "the temperature of the reward has no effect",
        ),
        "no such rule": ({"gold": {"model": "rule:beauty"}}, "there is no rule 'rule:beauty'"),
        "forward KL": ({"divergence": "forward"}, "divergence is forward", "reverse KL"),
        "auxiliary pairs": ({"objective": "variance_reduced"}, "objective is variance_reduced"),
        "evaluation of pairs": ({"eval_strategy": "epoch"}, "eval_strategy is set"),
        "a prompt longer than the context": ({"max_new_tokens": 250}, "row 1", "leave no room for 250 new tokens"),
        "all prompts held out": ({"held_out": 6}, "held_out takes 6 of 6 prompts"),
        "a bound that is infinite": ({"r_max": ".inf"}, "r_max is inf"),
        "no run folder": ({"output_dir": ""}, "output_dir is empty"),
        "a seed below 0": ({"seed": -1}, "seed is -1", "from 0"),
        "a seed too large": ({"seed": 2**32}, "seed is 4294967296", "below 2^32"),
        "a split below 0": ({"split_seed": -1}, "split_seed is -1", "from 0"),
    }
)
def test_settings_are_refused_before_anything_is_drawn(given: dict[str, Any], says: list[str], world: World) -> None:
    world.pairs()
    assert_refused(world, world.multistep(**given), says)


@table(
    {
        "nothing accepted": ({"r_max": 1e6}, "none of 32 proposals of step 1 was accepted", "lower r_max"),
        "no pair": ({"min_margin": 100.0}, "none of 4 prompts gives a pair", "min_margin"),
    }
)
def test_a_step_that_cannot_go_on_says_so_in_one_line(given: dict[str, Any], says: list[str], world: World) -> None:
    assert_ends_in_one_line(world.run(world.multistep(**given)), *says)


def test_a_reward_that_is_no_number_stops_the_run_and_a_mended_one_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(training_rewards, "load_reward", lambda source: from_function(lambda prompt, text: math.nan, "broken"))
        assert_ends_in_one_line(world.run(world.multistep()), "broken, row 1", "gave nan as reward")
    assert world.run(world.multistep()).code == 0


def test_training_options_that_are_the_runs_own_are_refused(tmp_path: Path) -> None:
    own, prompts = MultistepSettings(str(tmp_path / "run"), "model"), LoopPrompts("prompts.jsonl")
    reward = from_function(lambda prompt, text: 0.0, "flat")
    for training, says in (({"beta": 0.1}, "training has beta"), ({"no_such": 1}, "no_such")):
        with pytest.raises(ConfigError, match=says):
            make_multistep(own, prompts, training, reward=reward)
    with pytest.raises(ConfigError, match="reward is given twice"):
        make_multistep(replace(own, reward=RewardSource("rule:length")), prompts, {}, reward=reward)
