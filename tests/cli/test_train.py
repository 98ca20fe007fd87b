"""What a training run depends on, what it refuses, and that it ends alike however it was interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_world import World, assert_one_line, assert_refused, some_rows
from fakes import byte_tokenizer, saved_llama
from polyref.training import course
from polyref.training.preference_trainer import PreferenceTrainer


def outputs(run: Path) -> dict[str, bytes]:
    files = [*(run / "model").iterdir(), *(run / name for name in ("metrics.jsonl", "summary.json", "report.html"))]
    return {file.name: file.read_bytes() for file in files}


def inside_an_epoch(world: World, run: str, **settings: Any) -> list[str]:
    """Three steps of an epoch of four, with a checkpoint at the last one."""
    usual = {"max_steps": 3, "num_train_epochs": None, "per_device_train_batch_size": 2, "learning_rate": 0.01, "held_out": 4}
    return world.train(output_dir=world.path / run / "run", **usual | settings)


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_kill_after_the_last_checkpoint_trains_no_step_more(
    logging_steps: int, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert world.run(inside_an_epoch(world, "unbroken", logging_steps=logging_steps)).code == 0
    words = inside_an_epoch(world, "broken", logging_steps=logging_steps)
    evaluated, whens = course._evaluated, []

    def stop(folder: Any, trainer: Any, dataset: Any, when: str, inputs: Any) -> Any:
        whens.append(when)
        if when == "after":
            raise KeyboardInterrupt
        return evaluated(folder, trainer, dataset, when, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(course, "_evaluated", stop)
        assert world.run(words).code == 1 and whens == ["before", "after"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", lambda *args, **kwargs: pytest.fail("a step too many"))
        assert world.run(words).code == 0
    assert outputs(world.path / "broken" / "run") == outputs(world.path / "unbroken" / "run")


@pytest.mark.parametrize("strategy", ["logging_strategy", "eval_strategy"])
@pytest.mark.parametrize(
    ("settings", "checkpoints", "ends"),
    [({"max_steps": 8, "save_steps": 4}, 2, [4, 8]), ({"max_steps": 7, "save_steps": 3}, 3, [4, 7])],
)
def test_a_kill_after_any_checkpoint_loses_no_line_of_an_epoch(
    strategy: str,
    settings: dict[str, Any],
    checkpoints: int,
    ends: list[int],
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings | {strategy: "epoch"}  # of four steps
    assert world.run(inside_an_epoch(world, "unbroken", **settings)).code == 0
    lines = (world.path / "unbroken" / "run" / "metrics.jsonl").read_text().splitlines()
    wanted = "eval_loss" if strategy == "eval_strategy" else "loss"
    assert set(ends) <= {line["step"] for line in map(json.loads, lines) if wanted in line}
    words, save = inside_an_epoch(world, "broken", **settings), PreferenceTrainer._save_checkpoint

    def stop(self: Any, *args: Any) -> None:
        save(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(PreferenceTrainer, "_save_checkpoint", stop)
    assert [world.run(words).code for _ in range(checkpoints + 1)] == [1] * checkpoints + [0]
    assert outputs(world.path / "broken" / "run") == outputs(world.path / "unbroken" / "run")


def test_the_best_checkpoint_is_found_where_the_run_folder_was_moved(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": None}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "rewards/margins", "greater_is_better": False}
    assert world.run(inside_an_epoch(world, "unbroken", **best)).code == 0
    save, saved = PreferenceTrainer._save_checkpoint, []

    def stop(self: Any, *args: Any) -> None:
        save(self, *args)
        saved.append(self.state.best_model_checkpoint)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PreferenceTrainer, "_save_checkpoint", stop)
        assert world.run(inside_an_epoch(world, "broken", **best)).code == 1
    assert saved[-1].endswith("checkpoint-1"), "margins grow: the first is the best that is asked for here"
    shutil.move(world.path / "broken", world.path / "moved")
    assert world.run(inside_an_epoch(world, "moved", **best)).code == 0
    assert outputs(world.path / "moved" / "run") == outputs(world.path / "unbroken" / "run")


def test_a_kill_before_the_first_checkpoint_leaves_no_trace_in_what_dropout_draws(
    world: World, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any
) -> None:
    model = saved_llama(world.path / "dropout", tiny_tokenizer, attention_dropout=0.3)
    settings = {"model": model, "disable_dropout": "false", "references": {"members": [{"model": str(world.model)}]}}
    assert world.run(inside_an_epoch(world, "unbroken", **settings)).code == 0
    words = inside_an_epoch(world, "broken", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(course, "_train_from", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert world.run(words).code == 1
    torch.rand(7)
    assert world.run(words).code == 0
    assert outputs(world.path / "broken" / "run") == outputs(world.path / "unbroken" / "run")


def test_a_run_goes_on_with_the_configuration_that_it_keeps(world: World) -> None:
    """As does one whose settings were printed, and are given as a file."""
    words, run = world.train(), world.path / "run"
    assert world.run(words).code == 0
    printed = world.file("printed.yaml", world.run([*words, "--print_config"]).out)
    before = outputs(run)
    for config in (printed, run / "config.yaml"):
        again = world.run(["train", "--config", config, "--output_dir", run])
        assert (again.code, again.err) == (0, "") and outputs(run) == before


def test_a_complete_run_whose_inputs_changed_is_refused(world: World, tiny_tokenizer: Any) -> None:
    model, reference = (saved_llama(world.path / name, tiny_tokenizer) for name in ("policy", "reference"))
    world.pairs(*some_rows(8))
    held_out = world.pairs(*some_rows(2), name="held_out.jsonl")
    words = world.train(model=model, eval_data=held_out, references={"members": [{"model": str(reference)}]})
    assert world.run(words).code == 0 and world.run(words).code == 0
    fix = ["is complete", "name a new run folder"]
    kept = held_out.read_bytes()
    world.pairs(*some_rows(3), name="held_out.jsonl")
    assert_refused(world, words, [*fix, "changed since: held-out pairs;"])
    held_out.write_bytes(kept)
    world.pairs(*some_rows(9))
    assert_refused(world, words, [*fix, "changed since: training pairs;"])
    world.pairs(*some_rows(8))
    shutil.copytree(saved_llama(world.path / "other", tiny_tokenizer, seed=1), reference, dirs_exist_ok=True)
    assert_refused(world, words, [*fix, "changed since: weights of reference 1;"])
    shutil.copytree(model, reference, dirs_exist_ok=True)
    shutil.copytree(world.path / "other", model, dirs_exist_ok=True)
    assert_refused(world, words, [*fix, "changed since: weights of the policy;"])


def test_the_tokenizers_of_references_are_among_the_inputs_of_a_run(world: World, tiny_tokenizer: Any) -> None:
    reference = saved_llama(world.path / "reference", byte_tokenizer([("e", "s")]))
    tokenizer = saved_llama(world.path / "words", byte_tokenizer([("e", "s")]))
    members = [{"model": str(world.model)}, {"model": str(reference), "tokenizer": str(tokenizer)}]
    words = world.train(references={"members": members})
    assert world.run(words).code == 0 and world.run(words).code == 0
    for other in (byte_tokenizer([("n", "o")]), tiny_tokenizer):
        other.save_pretrained(tokenizer)
        assert_refused(world, words, ["is complete", "changed since: tokenizer of reference 2;", "name a new run folder"])


def test_a_token_is_refused_without_being_shown_or_kept(world: World) -> None:
    outcome = world.run([*world.train(), "--hub_token", "hf_SECRET"])
    assert_one_line(outcome, ["hub_token", "HF_TOKEN"])
    assert "hf_SECRET" not in outcome.err and not (world.path / "run").exists()
    assert world.run(world.train()).code == 0
    assert "hub_token" not in (world.path / "run" / "config.yaml").read_text()


def test_several_processes_are_sent_to_the_trainer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(world, world.train(), ["WORLD_SIZE is 2", "the trainer in a script", "torchrun or accelerate"])
    assert_refused(world, ["quickstart", "--model", world.model, "--output_dir", world.path / "run"], ["WORLD_SIZE is 2"])


def test_prompts_on_both_sides_are_counted_and_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.pairs(*some_rows(5))
    held_out = world.pairs(*some_rows()[4:6], name="held_out.jsonl")
    with caplog.at_level("WARNING", logger="polyref"):
        assert world.run(world.train(eval_data=held_out)).code == 0
    assert "1 of 2 held-out prompts are trained on too" in caplog.text
    run = world.path / "run"
    assert json.loads((run / "summary.json").read_text())["shared_prompts"] == 1
    page = (run / "report.html").read_text()
    assert "2 prompts, 1 of them trained on" in page and "people" not in page and "human" not in page


def test_one_held_out_prompt_gives_valid_json_and_dashes(world: World) -> None:
    assert world.run(world.train(held_out=2)).code == 0
    run = world.path / "run"
    summary = json.loads((run / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert summary["after"]["accuracy"][1:] == [None, None]
    page = (run / "report.html").read_text()
    assert "[–, –]" in page and "one prompt gives no interval" in page and "nan" not in page


@pytest.mark.parametrize("verb", ["score", "validate"])
def test_score_and_validate_take_revision_and_code_of_the_tokenizer(
    verb: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyref.scoring import models

    load, sources = models.load_tokenizer, []

    def loaded(source: models.ModelSource) -> Any:
        sources.append(source)
        return load(source)

    monkeypatch.setattr(models, "load_tokenizer", loaded)
    given = {"revision": "v1", "trust_remote_code": "true"}
    words = world.score(**given) if verb == "score" else world.validate(**given)
    assert world.run(words).code == 0
    assert (sources[0].revision, sources[0].trust_remote_code) == ("v1", True)
    words = world.score(gguf_file="q8.gguf") if verb == "score" else world.validate(gguf_file="q8.gguf")
    assert_refused(world, words, ["tiny: no file q8.gguf there"])
