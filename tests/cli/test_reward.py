"""What `polyref reward` leaves behind, what it refuses, and that it ends alike however it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForSequenceClassification

from cli_world import World, assert_refused, some_rows, table
from fakes import auxiliary_columns, pair_rows
from polyref.report.reward import write_reward_page
from polyref.rewards.reward_model import RewardModel
from polyref.training import course
from polyref.training.reward_trainer import RewardTrainer


def outputs(run: Path) -> dict[str, bytes]:
    files = [*(run / "model").iterdir(), *(run / name for name in ("metrics.jsonl", "summary.json", "report.html"))]
    return {file.name: file.read_bytes() for file in files}


def summary_of(world: World) -> dict[str, Any]:
    summary = json.loads((world.path / "run" / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert isinstance(summary, dict)
    return summary


@pytest.mark.parametrize("lora", [None, {"r": 2, "last_layers": 1}])
def test_a_run_leaves_a_reward_model_its_numbers_and_its_page(lora: Any, world: World) -> None:
    words = world.reward(held_out=4, num_train_epochs=12, learning_rate=0.02, lora=lora, center_rewards_coefficient=0.01)
    outcome = world.run(words)
    assert outcome.code == 0, outcome.err
    summary, run = summary_of(world), world.path / "run"
    assert summary["train_pairs"] == 8 and summary["shared_prompts"] == 0
    assert summary["after"]["accuracy"][0] > summary["before"]["accuracy"][0] or summary["before"]["accuracy"][0] == 1
    calibration = summary["calibration"]
    assert sum(each["count"] for each in calibration["raw"]["bins"]) == 4
    assert (calibration["calibrated"] is None) == (calibration["temperature"] is None)
    reward = RewardModel.load(run / "model", device="cpu")
    rows = some_rows(4)
    values = [reward([row["prompt"] for row in rows], [row[side] for row in rows]) for side in ("chosen", "rejected")]
    assert (values[0] > values[1]).all()
    page = (run / "report.html").read_text()
    assert "Reliability on held-out pairs" in page and "share ranked right" in page and "<script" not in page
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("rewards/margins" in line for line in lines)
    before = outputs(run)
    assert world.run(words).code == 0 and outputs(run) == before, "a complete run is not done again"


def test_beside_an_auxiliary_model_a_run_says_so_and_shows_what_it_gains(world: World) -> None:
    world.pairs(*pair_rows(8, **auxiliary_columns(3)))
    held_out = world.pairs(*pair_rows(4), name="held_out.jsonl")
    settings = {"objective": "variance_reduced", "control_coefficient": "optimal", "eval_data": held_out, "logging_steps": 1}
    outcome = world.run(world.reward(**settings))
    assert outcome.code == 0, outcome.err
    summary, run = summary_of(world), world.path / "run"
    assert (summary["objective"], summary["auxiliary_pairs"], summary["after"]["pairs"]) == ("variance_reduced", 3, 4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all({"vr/data", "vr/factor", "vr/loss_variance"} <= line.keys() for line in lines if "loss" in line)
    page = (run / "report.html").read_text()
    assert "Variance of the plain loss over that of the loss" in page and "variance_reduced" in page


def test_without_held_out_pairs_there_is_no_calibration(world: World) -> None:
    assert world.run(world.reward(max_steps=1)).code == 0
    assert summary_of(world)["calibration"] is None and summary_of(world)["after"] is None
    assert "Reliability" not in (world.path / "run" / "report.html").read_text()


def test_one_held_out_prompt_gives_valid_json_and_dashes(world: World) -> None:
    assert world.run(world.reward(held_out=2)).code == 0
    assert summary_of(world)["after"]["accuracy"][1:] == [None, None]
    page = (world.path / "run" / "report.html").read_text()
    assert "[–, –]" in page and "one prompt gives no interval" in page and "nan" not in page.lower()


def test_a_reward_model_goes_on_as_one(world: World) -> None:
    assert world.run(world.reward()).code == 0
    assert world.run(world.reward(model=world.path / "run" / "model", output_dir=world.path / "second")).code == 0


def broken(world: World, run: str) -> list[str]:
    """Six steps over three epochs with checkpoints in the middle of an epoch and of a log line's window."""
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "learning_rate": 0.01, "held_out": 4}
    return world.reward(output_dir=world.path / run / "run", save_steps=3, logging_steps=2, **settings)


def test_a_run_killed_anywhere_ends_with_the_bytes_of_an_unbroken_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.run(broken(world, "unbroken")).code == 0
    words, save, evaluated = broken(world, "broken"), RewardTrainer._save_checkpoint, course._evaluated

    def stop(self: Any, *args: Any) -> None:
        save(self, *args)
        raise KeyboardInterrupt

    def stop_after(folder: Any, trainer: Any, dataset: Any, when: str, inputs: Any) -> Any:
        result = evaluated(folder, trainer, dataset, when, inputs)
        if when == "after":
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(RewardTrainer, "_save_checkpoint", stop)
        assert world.run(words).code == 1
    with monkeypatch.context() as patch:
        patch.setattr(course, "_evaluated", stop_after)
        assert world.run(words).code == 1
    assert world.run(words).code == 0
    assert outputs(world.path / "broken" / "run") == outputs(world.path / "unbroken" / "run")


@table(
    {
        "negative centring": ({"center_rewards_coefficient": -1}, "center_rewards_coefficient is -1", "at least 0"),
        "unknown loss": ({"loss_type": "mystery"}, "loss_type", "see polyref reward --help"),
        "no auxiliary columns": (
            {"objective": "variance_reduced"},
            "row 1, column auxiliary_1: is missing, and objective variance_reduced needs it",
        ),
        "doubly robust": ({"objective": "doubly_robust"}, "objective", "see polyref reward --help"),
        "control of nothing": ({"control_coefficient": 0.5}, "control_coefficient has no effect with objective plain"),
        "no such model": ({"model": "./absent"}, "no such folder", "hub id or a folder"),
        "too short": ({"max_length": 4}, "within 4 tokens", "raise max_length"),
        "too many layers": ({"lora": {"last_layers": 9}}, "the model has 2 layers", "give at most 2"),
        "no run folder": ({"output_dir": ""}, "output_dir is empty", "name the run folder"),
    }
)
def test_what_is_wrong_is_said_in_one_line(given: dict[str, Any], says: tuple[str, ...], world: World) -> None:
    assert_refused(world, world.reward(**given), says)


def test_a_model_with_a_head_of_several_numbers_is_refused(world: World, tiny_tokenizer: Any) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    folder = world.path / "three"
    LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tiny_tokenizer), **sizes)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    assert_refused(world, world.reward(model=folder), ["three: its head has 3 logits, and one is needed", "num_labels=1"])


def test_a_complete_run_whose_pairs_changed_is_refused(world: World) -> None:
    words = world.reward(max_steps=1)
    assert world.run(words).code == 0
    world.pairs(*some_rows(9))
    assert_refused(world, words, ["changed since: training pairs;", "name a new run folder"])


def test_the_page_escapes_and_says_what_cannot_be_calibrated(tmp_path: Path) -> None:
    reading = {"nll": 0.3, "error": 0.1, "bins": [{"confidence": 0.8, "accuracy": [1.0, None, None], "count": 4}]}
    report = {"pairs": 4, "prompts": 1, "accuracy": [1.0, None, None], "margin": [1.5, None, None]}
    summary = {
        "model": "<b>tiny</b>",
        "loss_type": "sigmoid",
        "center_rewards_coefficient": None,
        "max_length": 64,
        "train_pairs": 8,
        "shared_prompts": 0,
        "before": report,
        "after": report,
        "calibration": {"temperature": None, "raw": reading, "calibrated": None},
    }
    page = write_reward_page(tmp_path / "page.html", "a run", summary, []).read_text()
    assert "cannot be scaled into probabilities" in page and "<b>tiny" not in page
    summary["calibration"] = {"temperature": 2.0, "raw": reading, "calibrated": reading}
    assert "too sure of itself" in write_reward_page(tmp_path / "page.html", "a run", summary, []).read_text()
