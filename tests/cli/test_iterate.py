"""What `polyref iterate` leaves behind, and that it ends alike however often it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cli_world import World, assert_ends_in_one_line
from crash import left_by
from polyref.data.sources import load_preferences
from polyref.loops import generate, label, pairing, train
from polyref.loops import iterate as loop
from polyref.training.preference_trainer import PreferenceTrainer


def summary_of(run: Path) -> dict[str, Any]:
    summary = json.loads((run / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert isinstance(summary, dict)
    return summary


def test_rounds_leave_a_policy_their_numbers_and_a_page(world: World, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"lora": {"r": 2}, "gold": {"model": "rule:length"}}
    outcome = world.run(world.iterate(**settings))
    assert outcome.code == 0, outcome.err
    assert caplog.text.count("2 judged prompts are too few for intervals: over-optimisation does not end this run") == 1
    run = world.path / "iterate"
    summary = summary_of(run)
    assert summary["anchor"] == "the original references, in every round" and summary["final_round"] == 2
    assert summary["dtypes"] == {"policy": "float32", "references": ["float32", "float32"]}
    assert [row["round"] for row in summary["rounds"]] == [0, 1, 2] and summary["stop"] is None
    first, second = summary["rounds"][1:]
    assert first["pairs"] <= 4 and second["train_pairs"] == first["pairs"] + second["pairs"] and first["completions"] == 12
    assert all(row["kl_anchor"] == row["kl"] and len(row["kl_each"]) == 2 for row in summary["rounds"])
    assert all(0 < row["distinct"][0] <= 1 for row in summary["rounds"]) and summary["rounds"][0]["win_rate"][0] == 0.5
    records = load_preferences(run / "stages" / "pair-2" / "pairs.jsonl")
    assert len(records) == second["pairs"] and all(0.5 <= one.chosen_probability < 1 for one in records)
    page = (run / "report.html").read_text()
    assert "Reward against KL" in page and "Gold reward against KL" in page and "Pairs of each round" in page
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in metrics if "eval_reward" in row] == [0, 1, 2]
    assert [row["round"] for row in metrics] == sorted(row["round"] for row in metrics)
    manifest = json.loads((run / "manifest.json").read_text())
    for name in ("train-1", "train-2", "write"):
        info = manifest["stages"][name]["info"]
        assert info["anchor"] == summary["anchor"] and info["dtypes"] == summary["dtypes"]
    before = left_by(run)
    (run / "stages/train-1/model/adapter_model.safetensors").write_bytes(b"torn")
    assert world.run(world.iterate(**settings)).code == 0 and left_by(run) == before, "a torn file is made again"
    assert world.run([*world.iterate(**settings), "--dry_run"]).code == 0 and left_by(run) == before
    for more in ([], ["--dry_run"]):
        changed = world.run([*world.iterate(**settings | {"beta": 3}), *more])
        assert_ends_in_one_line(changed, "made with another configuration: beta 2")
    world.pairs(*({"prompt": f"another {i}?"} for i in range(4)))
    for more in ([], ["--dry_run"]):
        changed = world.run([*world.iterate(**settings), *more])
        assert_ends_in_one_line(changed, "is complete, and what it was made from has changed since: held-out prompts, prompts")
    assert left_by(run) == before


def test_the_gold_reward_has_no_part_in_training(world: World) -> None:
    weights = []
    for gold in ("rule:length", "rule:length:characters"):
        run = world.path / gold.replace(":", "-")
        words = world.iterate(output_dir=run, gold={"model": gold}, rounds=1, patience="null", prompts_at_once=32)
        assert world.run(words).code == 0
        weights.append((run / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def after(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, and then a stop."""

    def stopped(*args: Any, **options: Any) -> Any:
        function(*args, **options)
        raise KeyboardInterrupt

    return stopped


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_stopped_anywhere_ends_with_the_bytes_of_an_unbroken_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"enhancer": {"temperature": 2.0, "completions": 2}, "label": "model", "anchor": "average", "save_steps": 1}
    settings |= {"labeller": {"reward": {"model": "rule:length:characters"}}, "gold": {"model": "rule:length"}}
    whole = world.iterate(output_dir=world.path / "unbroken" / "run", **settings)
    assert world.run(whole).code == 0
    words = world.iterate(output_dir=world.path / "broken" / "run", **settings)
    points = [(generate, "write_bytes"), (pairing, "write_preferences"), (pairing, "write_bytes"), (label, "write_preferences")]
    points += [(label, "write_bytes"), (PreferenceTrainer, "_save_checkpoint"), (train, "save_policy"), (train, "write_bytes")]
    stops = 0
    while True:
        place, name = points[stops % len(points)]
        with monkeypatch.context() as patch:
            patch.setattr(place, name, after(getattr(place, name)))
            outcome = world.run(words)
        if outcome.code == 0:
            break
        assert outcome.code == 1 and "the same command goes on from here" in outcome.err
        stops += 1
        assert stops < 80
    assert stops > 7 and left_by(world.path / "broken" / "run") == left_by(world.path / "unbroken" / "run")


@pytest.mark.slow
@pytest.mark.ci
def test_an_over_optimised_run_ends_with_the_policy_before_and_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, golds, known = loop.measured, [0.0, 1.0, 0.5, 0.4], list[Any]()

    def falling(prompts: Any, drawn: Any, *args: Any, **options: Any) -> dict[str, Any]:
        known.append(drawn)
        proxy, gold = len(known) - 1.0, golds[len(known) - 1]
        estimates = {name: [value, value - 0.1, value + 0.1] for name, value in (("gold", gold), ("reward", proxy))}
        return measured(prompts, drawn, *args, **options) | estimates

    def change(prompts: Any, before: Any, after: Any, which: int, *, seed: int) -> list[float]:
        first, last = ([one is drawn for one in known].index(True) for drawn in (before, after))
        by = golds[last] - golds[first] if which else float(last - first)
        return [by, by - 0.2, by + 0.2]

    monkeypatch.setattr(loop, "measured", falling)
    monkeypatch.setattr(loop, "mean_change", change)
    world.pairs(*({"prompt": f"question {i}?", "chosen": "yes", "rejected": "no"} for i in range(12)))
    outcome = world.run(world.iterate(rounds=5, gold={"model": "rule:length"}, prompts_at_once=32, held_out=8))
    assert outcome.code == 0, outcome.err
    run = world.path / "iterate"
    summary = summary_of(run)
    assert summary["stop"]["rail"] == "over-optimisation" and (summary["final_round"], len(summary["rounds"])) == (1, 4)
    final, kept = (folder / "model.safetensors" for folder in (run / "model", run / "stages/train-1/model"))
    assert final.read_bytes() == kept.read_bytes()
    assert "ended after round 3 of 5: over-optimisation" in (run / "report.html").read_text().replace("It ended", "ended")


@pytest.mark.slow
@pytest.mark.ci
def test_one_adapter_is_trained_on_from_round_to_round_and_merged(world: World) -> None:
    assert world.run(world.iterate(lora={"r": 2}, merge_adapter="true")).code == 0
    run = world.path / "iterate"
    adapters = [load_file(run / "stages" / f"train-{number}" / "model" / "adapter_model.safetensors") for number in (1, 2)]
    assert all(not tensor.equal(adapters[1][name]) for name, tensor in adapters[0].items())
    assert (run / "model" / "model.safetensors").exists() and not list(run.rglob("checkpoint-*"))
