"""The Python of docs/rewards.md about using rewards runs as it is written, on tiny reward models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from fakes import byte_tokenizer
from polyref.rewards.rules import RULES

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def saved_reward_model(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, initializer_range=0.3, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_the_blocks_that_use_rewards_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE[PAGE.index("## Use it") :], flags=re.S | re.M))
    for seed, name in enumerate(("reward-0", "reward-1", "reward-2", "reward")):
        saved_reward_model(tmp_path / "runs" / name / "model", seed)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["brief"](["x"], ["one two"]).item() == -18 and names["polite"](["x"], ["Tea, please."]).item() == 1
    assert (names["std"] > 0).all() and torch.equal(names["cautious"], names["mean"] - names["std"])
    assert (names["careful"] < names["reward"](names["prompts"], names["chosen"])).all()
    assert list((tmp_path / "runs" / "reward-cache").iterdir())


def test_every_rule_is_on_the_page() -> None:
    assert set(re.findall(r"^\| `rule:(\w+)", PAGE, flags=re.M)) == set(RULES)
