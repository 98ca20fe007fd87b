"""What `polyref reward` keeps beside the weights, so that they are read as they were trained, and training from a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli_world import World, assert_refused, some_rows
from fakes import byte_tokenizer, saved_gguf, tiny_llama
from polyref.rewards.reward_model import RewardModel
from polyref.rewards.reward_settings import RewardModelSettings, read_reward_settings


def ranks(folder: Path) -> bool:
    """Whether the reward model in `folder`, loaded by what is beside it, ranks pairs as labelled."""
    rows, reward = some_rows(4), RewardModel.load(folder, device="cpu")
    values = [reward([row["prompt"] for row in rows], [row[side] for row in rows]) for side in ("chosen", "rejected")]
    return bool((values[0] > values[1]).all())


def test_what_the_model_is_to_be_read_with_is_beside_it(world: World) -> None:
    how = {"dtype": "bfloat16", "max_length": 40, "truncation_mode": "keep_end", "prompt_format": "chat"}
    assert world.run(world.reward(max_steps=1, use_cpu=True, **how)).code == 0
    assert read_reward_settings(world.path / "run" / "model") == RewardModelSettings(**how)


def test_the_temperature_of_the_calibration_is_beside_it(world: World) -> None:
    world.pairs(*(row | {"chosen_probability": 0.8} for row in some_rows()))
    assert world.run(world.reward(held_out=4, num_train_epochs=8, learning_rate=0.02)).code == 0
    summary = json.loads((world.path / "run" / "summary.json").read_text())
    temperature = summary["calibration"]["temperature"]
    assert temperature > 0
    assert read_reward_settings(world.path / "run" / "model") == RewardModelSettings(max_length=1024, temperature=temperature)


@pytest.mark.parametrize(
    ("changes", "kept"), [({}, None), ({"lora": {"r": 2}}, "tiny.gguf"), ({"lora": {"r": 2}, "merge_adapter": True}, None)]
)
def test_a_gguf_file_is_trained_from(changes: Any, kept: str | None, world: World) -> None:
    tokenizer, folder = byte_tokenizer([("e", "s")]), world.path / "quantised"
    folder.mkdir()
    saved_gguf(folder / "tiny.gguf", tokenizer, tiny_llama(tokenizer))
    words = world.reward(model=folder, gguf_file="tiny.gguf", held_out=4, num_train_epochs=8, learning_rate=0.02, **changes)
    outcome = world.run(words)
    assert outcome.code == 0, outcome.err
    settings = read_reward_settings(world.path / "run" / "model")
    assert settings is not None and settings.gguf_file == kept
    assert ranks(world.path / "run" / "model")


def test_a_gguf_file_that_is_not_there_is_one_line(world: World) -> None:
    assert_refused(world, world.reward(gguf_file="q8.gguf"), ["tiny: no file q8.gguf there", "name a GGUF file"])
