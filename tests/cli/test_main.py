"""The command line as a person meets it: help, one training from beginning to end, interruptions, and scoring twice."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml

from cli_world import World, some_rows
from crash import Runs, Warm
from polyref.cli.main import VERBS, _OneLine


def test_without_a_verb_it_says_what_there_is(world: World) -> None:
    overview = world.run([])
    assert overview.code == 0 and world.run(["--help"]).out == world.run(["-h"]).out == overview.out
    assert all(f"\n  {verb} " in overview.out and VERBS[verb] in overview.out for verb in VERBS)
    assert world.run(["--version"]).out == f"polyref {metadata.version('polyref')}\n"


def test_a_log_line_is_one_printable_line() -> None:
    """A reference's name comes from a recipe, a row's text from whoever wrote it."""
    record = logging.LogRecord("polyref", logging.INFO, "", 0, "reference %s: %d tokens", ("a\x1b[2J\nb\x07", 3), None)
    assert _OneLine().format(record) == r"reference a\x1b[2J b\x07: 3 tokens"


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_setting(verb: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shown = world.run([verb, "--help"])
    assert shown.code == 0 and not shown.err
    settings = re.findall(r"^  (--?\w.*?)(?=^  -|^\S|\Z)", shown.out, re.MULTILINE | re.DOTALL)
    names = {re.findall(r"--(\w+)", setting)[0]: setting for setting in settings}
    assert len(names) > 5
    for name, setting in names.items():
        words = re.sub(r"\((required|type|default)\b.*", "", setting.split(name, 1)[1], flags=re.DOTALL)
        assert len(re.findall(r"\b[a-z]{2,}\b", words)) >= 2, f"--{name} is not explained: {setting}"


def test_help_of_training_begins_with_what_is_polyrefs_own(world: World) -> None:
    shown = world.run(["train", "--help"]).out
    assert shown.startswith("usage: polyref train [--config FILE] --model MODEL --data DATA --output_dir OUTPUT_DIR [--flag")
    places = [shown.index(f"\n  --{name}") for name in ("model", "data", "beta", "loss_type", "num_train_epochs")]
    assert places == sorted(places)
    for verb, bare in {"validate": "[DATA ...]", "lab": "[NAME ...]"}.items():
        assert bare in world.run([verb, "--help"]).out.splitlines()[0]


def test_a_misspelt_setting_is_answered_with_the_nearest(world: World) -> None:
    typo = ["--config", world.file("typo.yaml", "learning_rte: 1\n")]
    for words in (["--learning-rate", "1"], ["--learning_rat", "1"], typo):  # an abbreviation is a misspelling too
        refused = world.run([*world.train(), *words])
        assert refused.code == 2 and "; did you mean learning_rate? see polyref train --help\n" in refused.err
    assert "did you mean" not in world.run([*world.train(), "--zzz", "1"]).err


def test_a_plain_value_for_a_group_of_settings_is_told_how_to_name_one(world: World) -> None:
    told = {"lora": "lora.help", "references": "references.help"}
    for group, shown in told.items():
        line = f"{group}: takes settings of its own, as in {group}.NAME or {{NAME: VALUE}}; see polyref train --{shown}\n"
        assert line in world.run([*world.train(), f"--{group}", "8"]).err
    sampled = world.run(["sample", "--references", "8", "--data", world.pairs(), "--output_dir", world.path / "sampled"])
    assert "references: takes settings of its own" in sampled.err and "see polyref sample --help" in sampled.err


def test_libraries_neither_draw_bars_nor_tell_of_each_attempt_to_reach_the_hub() -> None:
    code = "import logging; from polyref.cli.main import _quiet_libraries; _quiet_libraries(); from tqdm.auto import tqdm; "
    code += "from huggingface_hub.utils import logging as hub; print(tqdm([0]).disable, hub.get_verbosity() == logging.ERROR)"
    unset = {name: value for name, value in os.environ.items() if name not in ("TQDM_DISABLE", "HF_HUB_VERBOSITY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=unset, check=True)
    assert (done.stdout, done.stderr) == ("True True\n", "")


def test_printed_settings_are_a_configuration_file(world: World) -> None:
    printed = world.run([*world.train(beta=0.25, lora={"r": 2}), "--print_config"])
    assert printed.code == 0 and yaml.safe_load(printed.out)["beta"] == 0.25
    config = world.file("config.yaml", printed.out)
    again = world.run(["train", "--config", config, "--lora.r", "3", "--print_config"])
    for last in (["--config", config], [f"--config={config}"]):
        assert world.run(["train", "--lora.r", "3", "--print_config", *last]).out == again.out, "flags win wherever they stand"
    before, after = yaml.safe_load(printed.out), yaml.safe_load(again.out)
    assert after.pop("lora")["r"] == 3 and before.pop("lora")["r"] == 2
    assert before == after
    assert not (world.path / "run").exists()


def test_validate_reports_on_all_it_is_given(world: World) -> None:
    good, other = world.pairs(), world.pairs({"prompt": "question 1?", "chosen": "a", "rejected": "b"}, name="other.jsonl")
    alone = world.run(["validate", good])
    assert (alone.code, alone.err) == (0, "") and "12 rows, 12 usable pairs, 6 distinct prompts" in alone.out
    assert world.run(["validate", "--data", good]).out == alone.out
    assert world.run(["validate", "--config", world.file("data.yaml", f"data: {good}\n")]).out == alone.out
    both = world.run(["validate", good, "--eval_data", other, "--model", world.model, "--max_length", 18])
    assert both.code == 0 and world.run(["validate", good, other, "--model", world.model, "--max_length", 18]).out == both.out
    assert f"{other}: 1 rows" in both.out and "1  prompts in more than one split" in both.out
    assert "\ntokens " in both.out and "12  pairs cut at the maximum length" in both.out


def test_validate_reads_the_splits_of_a_folder(world: World) -> None:
    rows = datasets.Dataset.from_list(some_rows())
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(world.path / "saved")
    shown = world.run(["validate", world.path / "saved", "--split", "train,test"])
    assert shown.code == 0 and "train: 12 rows" in shown.out and "test: 1 rows" in shown.out
    assert "1  prompts in more than one split" in shown.out
    named = world.run(["validate", world.path / "saved", world.pairs(), "--split", "test"])
    assert f"{world.path / 'saved'}: 1 rows" in named.out and "pairs.jsonl: 12 rows" in named.out


def long_training(world: World, where: str, **settings: Any) -> list[str]:
    """Two references, a fresh adapter, held-out pairs, dropout in the adapter's place: all that a resume has to bring back."""
    members = [{"model": str(world.model), "system_prompt": words} for words in ("Be brief.", "Be kind.")]
    usual = {
        "references": {"members": members, "weights": [0.25, 0.75], "composition": "arithmetic"},
        "output_dir": world.path / where / "run",
        "cache_dir": world.path / where / "cache",
        "prompt_format": "chat",
        "held_out": 4,
        "lora": {"r": 2, "alpha": 4},
        "learning_rate": 0.01,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_steps": 2,
    }
    return world.train(**usual | settings)


def outputs(run: Path) -> dict[str, str]:
    """SHA-256 of everything that a run hands over."""
    files = [*(run / "model").iterdir(), *(run / name for name in ("metrics.jsonl", "summary.json", "report.html"))]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_training_from_beginning_to_end(world: World, caplog: pytest.LogCaptureFixture) -> None:
    words = long_training(world, "first")
    done = world.run(words)
    assert (done.code, done.out, done.err) == (0, "", "")
    run = world.path / "first" / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["train_pairs"] == 8 and summary["after"]["pairs"] == 4 and summary["weights"] == [0.25, 0.75]
    assert summary["after"]["margin"][0] > summary["before"]["margin"][0]
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        8,
    ]
    assert "<html" in (run / "report.html").read_text() and (run / "model" / "adapter_model.safetensors").is_file()

    before, tree = outputs(run), world.tree()
    with caplog.at_level(logging.INFO, logger="polyref"):
        assert world.run(words).code == 0
    assert f"{run} is complete; nothing to do" in caplog.messages
    assert world.tree() == tree

    assert world.run(long_training(world, "second")).code == 0
    assert outputs(world.path / "second" / "run") == before


def test_ctrl_c_leaves_a_run_that_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.run(long_training(world, "unbroken")).code == 0
    backward, steps = torch.Tensor.backward, []

    def interrupted(self: torch.Tensor, *args: object, **kwargs: object) -> None:
        steps.append(self)
        if len(steps) == 4:
            signal.raise_signal(signal.SIGINT)
        backward(self, *args, **kwargs)

    words = long_training(world, "broken")
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", interrupted)
        stopped = world.run(words)
    assert stopped.code == 1
    assert stopped.err == "polyref: interrupted; the same command goes on from here\n"
    assert world.run(words).code == 0
    assert outputs(world.path / "broken" / "run") == outputs(world.path / "unbroken" / "run")


@pytest.mark.slow
@pytest.mark.ci
def test_a_killed_run_ends_with_the_bytes_of_an_unbroken_one(world: World) -> None:
    with Warm(world.environment) as warm:
        Runs(warm, world.path, lambda name: long_training(world, name, cache_dir=None)).survive_kills(6)


def test_scoring_twice_finds_everything(world: World, caplog: pytest.LogCaptureFixture) -> None:
    first, second = world.path / "first.parquet", world.path / "second.parquet"
    with caplog.at_level(logging.INFO, logger="polyref"):
        assert world.run(world.score(output=first)).code == 0
        assert world.run(world.score(output=second)).code == 0
    told = [message for message in caplog.messages if "hit rate" in message]
    assert "24 completions scored, 0 found in the cache (hit rate 0.0%)" in told[0]
    assert "0 completions scored, 24 found in the cache (hit rate 100.0%); nothing to score" in told[1]
    assert first.read_bytes() == second.read_bytes()
