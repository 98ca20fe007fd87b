"""`polyref quickstart` on a model of a few thousand weights, and what a refused or interrupted one leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from cli_world import World, assert_refused
from fakes import saved_llama
from polyref.cli import quickstart
from polyref.data import load_preferences
from polyref.scoring import demo_model

OUTPUTS = ("metrics.jsonl", "summary.json", "report.html", "config.yaml", "model/adapter_model.safetensors")


@pytest.fixture
def small(world: World, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with room for bytes, and a run of 6 and 4 pairs."""
    for name, value in {
        "TRAIN_PAIRS": 6,
        "HELD_OUT_PAIRS": 4,
        "MAX_LENGTH": 300,
        "REPLY_PROMPTS": 1,
        "REPLY_TOKENS": 3,
    }.items():
        monkeypatch.setattr(quickstart, name, value)
    return saved_llama(world.path / "model", tiny_tokenizer, max_position_embeddings=512)


def outputs(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in OUTPUTS}


def test_an_interrupted_quickstart_ends_like_an_unbroken_one(
    world: World, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, broken = world.path / "run", world.path / "broken" / "run"
    words = ["quickstart", "--model", small, "--output_dir"]
    done = world.run([*words, run])
    assert (done.code, done.out, done.err) == (0, "", "")
    page, summary = (run / "report.html").read_text(), json.loads((run / "summary.json").read_text())
    assert summary["train_pairs"] == 6 and summary["after"]["pairs"] == 4 and summary["shared_prompts"] == 0
    assert "Three people compared replies" in page and "none of them trained on" in page
    assert "This run used 6 training and 4 held-out pairs: it demonstrates, and proves nothing." in page
    assert "Replies side by side" in page

    backward, steps = torch.Tensor.backward, []

    def interrupted(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        steps.append(self)
        if len(steps) == 3:
            raise KeyboardInterrupt
        backward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", interrupted)
        assert world.run([*words, broken]).code == 1
    assert world.run([*words, broken]).code == 0
    assert outputs(broken) == outputs(run)

    assert_refused(world, [*words, run, "--seed", 1], ["another configuration", "seed 0 -> 1"])
    with FileLock(run / ".lock"):
        assert_refused(world, [*words, run, "--seed", 1], ["in use by another process"])


def test_the_demonstration_model_has_one_name_wherever_it_comes_from(
    world: World, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["quickstart", "--output_dir", world.path / "run"]
    monkeypatch.setattr(demo_model, "demonstration_model", lambda: str(small))
    assert world.run(words).code == 0
    elsewhere = small.rename(world.path / "elsewhere")
    monkeypatch.setattr(demo_model, "demonstration_model", lambda: str(elsewhere))
    before = world.tree()
    assert world.run(words).code == 0 and world.tree() == before
    assert demo_model.HUB_ID in (world.path / "run" / "config.yaml").read_text()
    assert json.loads((world.path / "run" / "summary.json").read_text())["model"] == demo_model.HUB_ID


def test_a_few_pairs_cover_many_prompts() -> None:
    records = load_preferences([{"prompt": p, "chosen": f"yes {i}", "rejected": "no"} for i, p in enumerate("aaabbc")])
    assert [record.row for record in quickstart._spread(records)] == [1, 4, 6, 2, 5, 3]
