"""`polyref fit`: what a run leaves, from samples that `polyref sample` drew too; killed runs; what is refused in one line."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest

from cli_world import World, assert_refused, table
from crash import Warm, spread
from polyref.training import course
from polyref.training.likelihood_trainer import LikelihoodTrainer

Rows = list[dict[str, Any]]


def sample_rows(prompts: int = 6) -> Rows:
    """Samples of prompts, some cut, with weights that prefer the first."""
    return [
        {"prompt": f"q{x}:", "completion": f" yes {j}", "log_weight": 1.0 - j, "ended": j < 2, "reward": 0.5}
        for x in range(prompts)
        for j in range(2 + x % 2)
    ]


def fit(world: World, rows: Rows | None = None, **settings: Any) -> list[str]:
    """`polyref fit` of one epoch with `settings` over the usual ones, on `rows` or on `sample_rows`."""
    content = "".join(json.dumps(row) + "\n" for row in (sample_rows() if rows is None else rows))
    usual = {
        "data": world.path / "samples.jsonl",
        "model": world.model,
        "output_dir": world.path / "run",
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
    }
    if "data" not in settings:
        world.file("samples.jsonl", content)
    return world._words("fit", usual | settings)


def summary_of(world: World, run: str = "run") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((world.path / run / "summary.json").read_text(), parse_constant=pytest.fail)
    return found


def outputs(run: Path) -> dict[str, bytes]:
    names = ("summary.json", "report.html", "metrics.jsonl")
    files = [run / name for name in names] + [file for file in (run / "model").rglob("*") if file.is_file()]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


@pytest.mark.parametrize("lora", [None, {"r": 2, "last_layers": 1}])
def test_a_run_leaves_a_policy_its_numbers_and_its_page(lora: Any, world: World) -> None:
    words = fit(world, held_out=2, num_train_epochs=6, learning_rate=0.02, lora=lora, logging_steps=2)
    outcome = world.run(words)
    assert outcome.code == 0, outcome.err
    summary, run = summary_of(world), world.path / "run"
    assert summary["train_prompts"] == 4 and summary["after"]["prompts"] == 2 and summary["shared_prompts"] == 0
    assert summary["train_samples"] + summary["after"]["samples"] == 15 and summary["cut_samples"] >= 1
    assert 1 < summary["effective"] < summary["train_samples"] / 4
    gained = summary["before"]["nll"][0] - summary["after"]["nll"][0]
    assert gained > 0 and summary["change"][0] == pytest.approx(gained)
    assert list((run / "model").glob("*.safetensors"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any({"logps/weighted", "logps/even", "loss"} <= line.keys() for line in lines)
    page = (run / "report.html").read_text()
    assert (
        "Held-out negative log-likelihood" in page
        and "counted alike" in page
        and "nats higher than before" in page
        and "<script" not in page
    )
    before = outputs(run)
    assert world.run(words).code == 0 and outputs(run) == before, "a complete run is not done again"


def test_samples_weighted_for_forward_kl_are_drawn_and_fitted(world: World) -> None:
    world.pairs()
    members = [{"model": str(world.model)}, {"model": str(world.model), "system_prompt": "be brief"}]
    mixture = {"members": members, "composition": "arithmetic", "weights": [0.3, 0.7]}
    reward = {"reward": {"model": "rule:length:characters"}, "beta": 2.0, "proposals": 12, "tilt": "forward"}
    outcome = world.run(world.sample(references=mixture, **reward))
    assert outcome.code == 0, outcome.err
    run = world.path / "sample"
    samples, prompts = (
        [json.loads(line) for line in (run / name).read_text().splitlines()] for name in ("samples.jsonl", "prompts.jsonl")
    )
    assert len(samples) == 6 * 12 and all(row["ess"] <= 12 and "forward KL" in row["note"] for row in prompts)
    for prompt in prompts:
        own = [sample for sample in samples if sample["prompt"] == prompt["prompt"]]
        weights = [math.exp(sample["log_weight"]) for sample in own]
        assert math.fsum(weights) == pytest.approx(12) and not prompt["exact"] and prompt["log_z"] is None
        constants = [sample["reward"] + 2.0 / weight for sample, weight in zip(own, weights, strict=True)]
        assert max(constants) == pytest.approx(min(constants)), "w = beta/(lambda - r), lambda the prompt's own"
    assert world.run(fit(world, data=run / "samples.jsonl", max_steps=2)).code == 0
    assert summary_of(world)["train_samples"] == 72 and summary_of(world)["after"] is None


def test_a_run_killed_anywhere_ends_with_the_bytes_of_an_unbroken_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"held_out": 2, "num_train_epochs": 3, "learning_rate": 0.01, "save_steps": 3, "logging_steps": 2}
    assert world.run(fit(world, output_dir=world.path / "unbroken" / "run", **settings)).code == 0
    words = fit(world, output_dir=world.path / "broken" / "run", **settings)
    save, kept = LikelihoodTrainer._save_checkpoint, course.kept_report

    def stop(self: Any, *args: Any) -> None:
        save(self, *args)
        raise KeyboardInterrupt

    def stop_after(folder: Any, when: str, inputs: Any, make: Any) -> Any:
        result = kept(folder, when, inputs, make)
        if when == "after":
            raise KeyboardInterrupt
        return result

    for where, what, instead in ((LikelihoodTrainer, "_save_checkpoint", stop), (course, "kept_report", stop_after)):
        with monkeypatch.context() as patch:
            patch.setattr(where, what, instead)
            assert world.run(words).code == 1
    assert world.run(words).code == 0
    assert outputs(world.path / "broken" / "run") == outputs(world.path / "unbroken" / "run")


@pytest.mark.slow
def test_an_adapter_whose_training_is_killed_by_signal_is_the_adapter_of_an_unbroken_one(world: World) -> None:
    settings = {"held_out": 2, "num_train_epochs": 3, "save_steps": 2, "logging_steps": 2, "lora": {"r": 2, "last_layers": 1}}
    with Warm(world.environment) as warm:
        ended = warm.run(fit(world, output_dir=world.path / "unbroken" / "run", **settings))
        assert ended.code == 0, ended.err
        whole = outputs(world.path / "unbroken" / "run")
        assert "model/adapter_model.safetensors" in whole
        for at in spread(ended.points, 6, seed=0):
            run = world.path / f"killed-{at}" / "run"
            killed = warm.run(fit(world, output_dir=run, **settings), "kill", at)
            assert killed.code == -signal.SIGKILL, killed.err
            again = warm.run(fit(world, output_dir=run, **settings))
            assert again.code == 0 and outputs(run) == whole, again.err


@table(
    {
        "pairs": ({"rows": [{"prompt": "a", "chosen": "b", "rejected": "c"}]}, "row 1, column completion: is missing"),
        "a weight that is no number": (
            {"rows": [{"prompt": "a", "completion": "b", "log_weight": math.nan}]},
            "row 1, column log_weight: is nan, not a finite number",
        ),
        "a missing weight": (
            {"rows": [*sample_rows(1), {"prompt": "a", "completion": "b"}]},
            "row 3, column log_weight: is missing, and row 1 has it",
        ),
        "weights all zero": (
            {"rows": [{"prompt": "a", "completion": "b", "weight": 0}]},
            "row 1: all samples of its prompt have weight 0",
        ),
        "an empty completion": (
            {"rows": [{"prompt": "a", "completion": "", "ended": False}]},
            "row 1, column completion: is empty, and has not ended",
        ),
        "no samples": ({"rows": []}, "there are no rows"),
        "no such file": ({"data": "absent.jsonl"}, "absent.jsonl: there is no such file"),
        "too short": ({"max_length": 3}, "within 3 tokens", "raise max_length"),
        "too many held out": ({"held_out": 6}, "held_out is 6 of 6 prompts"),
        "held out twice": ({"held_out": 2, "eval_data": "x.jsonl"}, "eval_data and held_out are both given"),
        "a limit of 0": ({"limit": 0}, "limit is 0", "number of prompts"),
        "rows of nothing": ({"samples_per_row": 0}, "samples_per_row is 0", "at least 1"),
        "no such model": ({"model": "./absent"}, "no such folder", "hub id or a folder"),
        "no run folder": ({"output_dir": ""}, "output_dir is empty", "name the run folder"),
    }
)
def test_what_is_wrong_is_said_in_one_line(given: dict[str, Any], says: tuple[str, ...], world: World) -> None:
    assert_refused(world, fit(world, **given), says)


def test_a_complete_run_whose_samples_changed_is_refused(world: World) -> None:
    assert world.run(fit(world, max_steps=1)).code == 0
    changed = fit(world, sample_rows(5), max_steps=1)
    assert_refused(world, changed, ["changed since: training samples;", "name a new run folder"])


def test_one_held_out_prompt_that_is_trained_on_is_told_and_gives_no_interval(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    other = world.file("other.jsonl", json.dumps(sample_rows(1)[0]) + "\n")
    assert world.run(fit(world, eval_data=other, max_steps=1)).code == 0
    assert summary_of(world)["after"]["nll"][1:] == [None, None] == summary_of(world)["change"][1:]
    assert summary_of(world)["shared_prompts"] == 1 and "1 of 1 held-out prompts are trained on too" in caplog.text
    assert "one prompt gives no interval" in (world.path / "run" / "report.html").read_text()


def test_the_recipe_is_the_one_its_commands_name(world: World) -> None:
    recipe = Path(__file__).parents[2] / "configs" / "forward_kl_samples.yaml"
    for line in recipe.read_text().splitlines()[:2]:
        command = line.removeprefix("# polyref ").replace(f"configs/{recipe.name}", str(recipe))
        outcome = world.run([*command.split(), "--print_config"])
        assert outcome.code == 0, outcome.err
        assert ("tilt: forward" in outcome.out) == command.startswith("sample")
