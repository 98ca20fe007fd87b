"""What stands beside a reward model's weights decides how it is read, explicit arguments win, and anything odd is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from polyref.errors import ConfigError, DataError, ModelError
from polyref.rewards.cached import cached
from polyref.rewards.preference_model import from_reward, probability_of
from polyref.rewards.reward_model import RewardModel
from polyref.rewards.reward_settings import FILE, RewardModelSettings, read_reward_settings, write_reward_settings

KEPT = RewardModelSettings("bfloat16", 12, "keep_end", "chat", 2.5)


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A saved reward model without settings."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 1}
    config = LlamaConfig(vocab_size=len(tiny_tokenizer), pad_token_id=0, initializer_range=0.3, **sizes)
    for part in (LlamaForSequenceClassification(config), tiny_tokenizer):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def of(reward: RewardModel) -> RewardModelSettings:
    dtype = str(next(reward.model.parameters()).dtype).removeprefix("torch.")
    return RewardModelSettings(dtype, reward.max_length, reward.truncation_mode, reward.prompt_format, reward.temperature)


def test_what_is_kept_is_how_a_model_is_loaded_unless_an_argument_says_otherwise(folder: Path) -> None:
    assert read_reward_settings(folder) is None and of(RewardModel.load(folder, device="cpu")) == RewardModelSettings()
    write_reward_settings(folder, KEPT)
    assert read_reward_settings(str(folder)) == KEPT and of(RewardModel.load(folder, device="cpu")) == KEPT
    assert not list(folder.glob(".*")), "written whole, and nothing left beside it"
    others = {
        "dtype": "float32",
        "max_length": None,
        "truncation_mode": "keep_start",
        "prompt_format": "as_is",
        "temperature": None,
    }
    for name, value in others.items():
        assert of(RewardModel.load(folder, device="cpu", **{name: value})) == replace(KEPT, **{name: value})


def test_the_prompt_format_is_that_of_training(folder: Path) -> None:
    prompt, completion = "What is it?", "A fish."
    turns = ({"role": "user", "content": prompt},), ({"role": "assistant", "content": completion},)
    transcript = f"\n\nHuman: {prompt}\n\nAssistant:", f" {completion}"
    loaded = {name: RewardModel.load(folder, prompt_format=name, device="cpu") for name in ("as_is", "chat", "transcript")}
    chat = loaded["as_is"]([turns[0]], [turns[1]])
    assert torch.equal(loaded["chat"]([prompt], [completion]), chat)
    assert torch.equal(loaded["transcript"]([transcript[0]], [transcript[1]]), chat)
    assert torch.equal(loaded["transcript"]([turns[0]], [turns[1]]), chat), "messages are left alone"
    assert not torch.equal(loaded["as_is"]([prompt], [completion]), chat)
    assert len({reward.fingerprint for reward in loaded.values()}) == 3
    with pytest.raises(DataError, match="model, row 2, column prompt: does not begin with a Human: or Assistant: turn"):
        loaded["transcript"]([transcript[0], prompt], [transcript[1], completion])


def test_the_temperature_of_its_calibration_makes_a_preference_model(folder: Path, tmp_path: Path) -> None:
    write_reward_settings(folder, RewardModelSettings(temperature=2.5))
    reward = RewardModel.load(folder, device="cpu")
    texts = ["x", "x"], ["a", "b"], ["bb", "c"]
    h = reward(texts[0], texts[1]) - reward(texts[0], texts[2])
    for source in (reward, cached(reward, tmp_path / "cache")):
        torch.testing.assert_close(from_reward(source)(*texts), probability_of(h / 2.5))
        torch.testing.assert_close(from_reward(source, 1.0)(*texts), probability_of(h))
    plain = RewardModel.load(folder, temperature=None, device="cpu")
    torch.testing.assert_close(from_reward(plain)(*texts), probability_of(h))
    assert plain.fingerprint == reward.fingerprint, "rewards themselves are not divided"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("{torn", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "is not of the form 'polyref reward model 1'"),
        ("{}", "is not of the form"),
        ({"format": "polyref reward model 2"}, "is not of the form"),
        ({"pooling": "mean"}, "the setting 'pooling' is not known"),
        ({"dtype": None}, "dtype is None"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"max_length": 1}, "max_length is 1"),
        ({"max_length": 12.0}, "max_length is 12.0"),
        ({"truncation_mode": ["keep_end"]}, r"truncation_mode is \['keep_end'\]"),
        ({"prompt_format": "poem"}, "prompt_format is 'poem'"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": "2"}, "temperature is '2'"),
        ({"gguf_file": 1}, "gguf_file is 1"),
    ],
)
def test_a_file_that_is_odd_is_refused_in_one_line(folder: Path, change: Any, says: str) -> None:
    write_reward_settings(folder, KEPT)
    whole = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(change if isinstance(change, str) else json.dumps(whole | change))
    with pytest.raises(ModelError, match=f"reward_model.json: {says}.*; restore the file, or remove it") as error:
        RewardModel.load(folder, device="cpu")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_setting_that_is_missing_is_refused_and_one_that_cannot_be_is_not_written(folder: Path) -> None:
    write_reward_settings(folder, KEPT)
    whole = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({name: value for name, value in whole.items() if name != "temperature"}))
    with pytest.raises(ModelError, match="the setting 'temperature' is missing"):
        RewardModel.load(folder, device="cpu")
    with pytest.raises(ConfigError, match="temperature is -1.0"):
        RewardModelSettings(temperature=-1.0)


def test_settings_come_with_a_model_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_reward_settings(folder, KEPT)
    asked = []

    def download(model: str, file: str, *, revision: str | None) -> str:
        asked.append((model, revision))
        if model == "owner/none":
            raise EntryNotFoundError("not there")
        if model == "owner/down":
            raise RuntimeError("the hub\nis down")
        return str(folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert read_reward_settings("owner/model", "v1") == KEPT and asked == [("owner/model", "v1")]
    assert read_reward_settings("owner/none") is None
    with pytest.raises(ModelError, match="owner/down: cannot load the reward model's settings from this hub id") as error:
        read_reward_settings("owner/down")
    assert "\n" not in str(error.value)
