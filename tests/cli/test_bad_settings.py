"""Settings, configuration files and folders to write to: wrong ones end in one line, and what was there stays as it was."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import pytest

from cli_world import World, assert_one_line, assert_refused, table

SETTINGS: dict[str, tuple[Any, ...]] = {
    "beta 0": ({"beta": 0}, "beta is 0", "above 0"),
    "beta negative": ({"beta": -0.1}, "beta is -0.1", "above 0"),
    "beta NaN": ({"beta": ".nan"}, "beta is nan", "above 0"),
    "beta infinite": ({"beta": ".inf"}, "beta is inf", "above 0"),
    "beta as text": ({"beta": "strong"}, "polyref train: beta: expected float, got strong", "--help"),
    "label_smoothing 0.5": ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing is 0.5", "below 0.5"),
    "label_smoothing negative": ({"loss_type": "smoothed", "label_smoothing": -1}, "label_smoothing is -1", "at least 0"),
    "label_smoothing for nothing": (
        {"loss_type": "ipo", "label_smoothing": 0.1},
        "'ipo' does not use label_smoothing",
        "robust",
    ),
    "a loss_type": ({"loss_type": "sigmod"}, "loss_type: expected one of 'sigmoid', 'hinge'", "got sigmod", "--help"),
    "a divergence": ({"divergence": "sideways"}, "divergence: expected one of 'reverse', 'forward', got sideways", "--help"),
    "max_length 1": ({"max_length": 1}, "max_length is 1", "at least 2"),
    "dr_beta 1": ({"dr_beta": 1}, "dr_beta is 1", "above 1"),
    "dr_beta with accumulation": ({"dr_beta": 2, "gradient_accumulation_steps": 2}, "dr_beta needs the whole", "to 1"),
    "a dtype": ({"dtype": "float7"}, "unknown dtype 'float7'", "float32"),
    "scoring batches of 0": ({"precompute_ref_batch_size": 0}, "precompute_ref_batch_size is 0", "at least 1"),
    "training batches of 0": ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0", "at least 1"),
    "accumulation of 0": ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0", "at least 1"),
    "checkpoints that none can go on from": ({"save_only_model": True}, "save_only_model would make", "leave it out"),
    "batches that a resumed run sees again": ({"ignore_data_skip": True}, "ignore_data_skip would make", "leave it out"),
    "an evaluation that a resumed run does again": ({"eval_on_start": True}, "eval_on_start would make", "leave it out"),
    "an end before the end": ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint would make", "leave it out"),
    "weights cast by an evaluation": ({"fp16_full_eval": True}, "fp16_full_eval would cast the weights", "or leave it out"),
    "a compiled model, by its backend": ({"torch_compile_backend": "eager"}, "torch_compile has no effect", "leave it out"),
    "another head": ({"use_liger_kernel": True}, "use_liger_kernel has no effect", "leave it out"),
    "no predictions": ({"prediction_loss_only": True}, "prediction_loss_only has no effect", "leave it out"),
    "predictions in pieces": ({"eval_do_concat_batches": False}, "eval_do_concat_batches has no effect", "leave it out"),
    "evaluation in 0 pieces": ({"eval_accumulation_steps": 0}, "eval_accumulation_steps is 0", "at least 1"),
    "a log_level": ({"log_level": "loud"}, "unknown log_level 'loud'", "passive"),
    "an adam_beta1": ({"adam_beta1": 5}, "training settings: Invalid beta parameter", "change"),
    "an adam_epsilon": ({"adam_epsilon": -1}, "training settings: Invalid epsilon", "change"),
    "an optimiser that is not installed": ({"optim": "galore_adamw"}, "training settings: ", "galore", "change"),
    "a schedule's settings": ({"lr_scheduler_kwargs": {"bad": 1}}, "training settings: ", "'bad'", "change"),
    "a schedule without its settings": ({"lr_scheduler_type": "cosine_with_min_lr"}, "training settings: ", "min_lr", "change"),
    "workers below 0": ({"dataloader_num_workers": -1}, "training settings: num_workers", "change"),
    "no workers that persist": ({"dataloader_persistent_workers": True}, "training settings: persistent_workers", "change"),
    "a metric of no evaluation": (
        {"metric_for_best_model": "margin", "held_out": 4, "eval_strategy": "epoch"},
        "unknown metric_for_best_model 'margin'",
        "use one of loss, rewards/chosen",
    ),
    "a hub out of reach": (
        {"push_to_hub": True},
        "push_to_hub: there can be no repository on the hub",
        "leave push_to_hub out",
    ),
    "batches that would be cut": (
        {"accelerator_config": {"dispatch_batches": True}},
        "dispatch_batches would cut batches",
        "leave it out",
    ),
    "an accelerator's setting": ({"accelerator_config": {"nothing": 1}}, "training settings: ", "'nothing'", "change"),
    "shards in one process": ({"fsdp": "full_shard"}, "training settings: ", "distributed", "change"),
    "a data_seed below 0": ({"data_seed": -1}, "data_seed is -1", "from 0"),
    "endless epochs": ({"num_train_epochs": ".inf"}, "num_train_epochs is inf", "above 0"),
    "no epochs": ({"num_train_epochs": 0}, "num_train_epochs is 0", "above 0"),
    "a learning rate below 0": ({"learning_rate": -1}, "learning_rate is -1", "at least 0"),
    "epochs as text": ({"num_train_epochs": "many"}, "num_train_epochs: expected float, got many", "--help"),
    "an optimiser": ({"optim": "sideways"}, "sideways is not a valid Optimizer", "change"),
    "a scheduler": ({"lr_scheduler_type": "sideways"}, "sideways is not a valid Scheduler", "change"),
    "a tracker that is not installed": ({"report_to": "wandb"}, "report_to names 'wandb', which is not installed", "none"),
    "best model without evaluations": ({"load_best_model_at_end": True}, "training settings: ", "strategy", "change"),
    "evaluations without pairs": ({"eval_strategy": "steps"}, "eval_strategy", "; give"),
    "columns removed": ({"remove_unused_columns": True}, "remove_unused_columns is true", "leave it false"),
    "lora of rank 0": ({"lora": {"r": 0}}, "lora r is 0", "at least 1"),
    "lora on more layers than there are": ({"lora": {"last_layers": 3}}, "last_layers is 3, but the model has 2", "at most 2"),
    "lora on layers of no name": (
        {"lora": {"target_modules": ["no_such"]}},
        "no_such",
        "name layers of this model in target_modules",
    ),
    "a setting of lora": ({"lora": {"rank": 1}}, "lora: Option 'rank' is not accepted", "--lora.help"),
    "an unknown flag": ({"betta": 1}, "unrecognized arguments: --betta", "--help"),
    "no output_dir": ({"output_dir": None}, "required: output_dir", "--help"),
    "no model": ({"model": None}, "required", "model", "--help"),
    "no data": ({"data": None}, "required", "data", "--help"),
    "an empty output_dir": ({"output_dir": ""}, "output_dir is empty", "name"),
}


@table(SETTINGS)
def test_a_bad_setting(given: dict[str, Any], says: list[str], world: World) -> None:
    assert_refused(world, world.train(**given), says)


def test_a_bad_verb(world: World) -> None:
    assert_refused(world, ["trian", "--model", "x"], ["unknown verb 'trian'", "use one of quickstart, validate, score, train"])
    assert_refused(world, ["\x1b[2J"], [r"\x1b[2J", "use one of"])
    assert_refused(world, ["train", "--beta"], ["--beta: expected one argument", "--help"])


FILES: dict[str, tuple[Any, ...]] = {
    "a syntax error": ("beta: 1\nmodel: [\n", "line 3, column 1", "--help"),
    "a Python object": ("model: !!python/object/apply:os.system ['touch owned']\n", "python/object/apply", "line 1", "--help"),
    "a list": ("- beta\n", "the file holds no mapping of settings", "--help"),
    "a key that is none": ("betta: 1\n", "Option 'betta' is not accepted", "--help"),
    "a value of the wrong type": ("beta: strong\n", "beta: expected float, got strong", "--help"),
    "a member's key that is none": (
        "references: {members: [{model: x, nmae: y}]}\n",
        "references.members: Option 'nmae'",
        "--help",
    ),
    "bytes that are no text": (b"\xff\xfe\x00", "utf-8", "--help"),
    "terminal escapes": (b"beta: '\x07'\n", "config.yaml", "--help"),
}


@table(FILES)
def test_a_bad_configuration_file(given: str | bytes, says: list[str], world: World) -> None:
    config = world.file("config.yaml", given)
    assert_refused(world, [*world.train(), "--config", config], [f"polyref train --config {config}: ", *says])


def test_a_configuration_file_that_is_not_there(world: World) -> None:
    absent = world.path / "absent.yaml"
    assert_refused(world, ["train", "--config", absent], [f"File does not exist: '{absent}'", "--help"])
    assert_refused(world, ["train", "--config", world.path], ["Path is not a file", "--help"])


# Where it is to be written


def test_files_where_folders_are_wanted(world: World) -> None:
    pairs = world.pairs()
    assert_refused(world, world.train(output_dir=pairs), ["pairs.jsonl: cannot be written", "another"])
    assert_refused(world, world.train(output_dir=pairs / "run"), ["run: cannot be written", "another"])
    assert_refused(world, world.score(cache_dir=pairs), ["pairs.jsonl/", "cannot be written", "another"])
    (world.path / "scores.parquet").mkdir()
    assert_refused(world, world.score(output=world.path / "scores.parquet"), ["scores.parquet: cannot be written", "another"])


def test_a_run_folder_of_another_configuration(world: World) -> None:
    assert world.run(world.train()).code == 0
    assert_refused(
        world, world.train(beta=0.3), ["run: was made with another configuration: beta 0.1 -> 0.3", "new run folder"]
    )
    (world.path / "run" / "config.yaml").write_text("!!python/object/apply:os.system ['touch owned']\n")
    assert_refused(world, world.train(), ["run/config.yaml, line 1: is not plain YAML", "new run folder"])
    assert not Path("owned").exists()


def test_a_run_folder_that_is_in_use(world: World) -> None:
    (world.path / "run").mkdir()
    with filelock.FileLock(world.path / "run" / ".lock"):
        assert_refused(world, world.train(), ["run: is in use by another process", "wait for it"])


def test_a_folder_that_only_may_be_read(world: World) -> None:
    world.pairs()
    with file_system(world.path / "kept", "ro") as kept:
        assert_refused(world, world.train(output_dir=kept / "run"), ["run: cannot be written: ", "may write to"])
        assert_refused(world, world.score(output=kept / "scores.parquet"), ["scores.parquet: cannot be written: ", "may write"])
        assert_refused(world, world.score(cache_dir=kept), ["cannot be written: ", "may write to"])


def test_a_full_disk(world: World) -> None:
    """Of 40 kB: too small for the model's weights, large enough to begin the run."""
    data = world.pairs()
    with file_system(world.path / "small", "size=40k") as small:
        outcome = world.run(world.train(output_dir=small / "run", data=data))
        assert_one_line(outcome, [str(small), "cannot be written", "space"])
        assert not (small / "run" / "model").exists()


@contextmanager
def file_system(path: Path, options: str) -> Iterator[Path]:
    """A small file system of its own, where this process may mount one."""
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True)
    if made.returncode and options == "ro" and os.getuid() != 0:
        path.chmod(0o555)
        yield path
        return
    if made.returncode:
        pytest.skip(f"a file system cannot be mounted here: {made.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("size", [20, 400, 3_000, 9_000, 14_000, 40_000])
def test_a_quota_that_runs_out(size: int, world: World) -> None:
    """No file may grow beyond `size` bytes: whichever write fails, it is one line, and the same command goes on afterwards."""
    words = world.train(save_steps=1, logging_steps=1, held_out=4)
    with file_size_limit(size):
        outcome = world.run(words)
    assert_one_line(outcome, ["cannot be written", "space"])
    assert not list(world.path.rglob("*.tmp"))
    assert world.run(words).code == 0


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
