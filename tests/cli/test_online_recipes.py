"""The recipes of configs/online_*.yaml as they stand, on tiny models, with sizes and places overridden on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli_world import World
from fakes import saved_llama
from served_world import saved_verdict_model, transformers_serve

pytestmark = [pytest.mark.slow, pytest.mark.ci]
RECIPES = Path(__file__).parents[2] / "configs"
SIZES = {"limit": 4, "held_out": 2, "max_new_tokens": 6, "eval_completions": 1, "num_train_epochs": 1}


def recipe(world: World, name: str, **settings: Any) -> list[str]:
    """`polyref iterate` of configs/`name` at tiny size; its references keep their names and prompts, of the tiny model."""
    data = world.path / "pairs.jsonl"
    usual = SIZES | {"data": data if data.exists() else world.pairs()}
    usual |= {} if name == "online_pessimistic" else {"reward.model": "rule:length:characters"}  # bytes make no words
    words = ["iterate", "--config", str(RECIPES / f"{name}.yaml")]
    return [*words, *(str(word) for key, value in (usual | settings).items() for word in (f"--{key}", value))]


def members(model: Path) -> str:
    """The two references of the recipes."""
    said = {"brief": "Answer in one or two short sentences.", "careful": "Answer carefully, and say when you are not sure."}
    return json.dumps([{"name": name, "model": str(model), "system_prompt": text} for name, text in said.items()])


@pytest.fixture
def roomy(world: World, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model with room for system prompts in bytes; the folder of the test is where commands are given."""
    monkeypatch.chdir(world.path)
    return saved_llama(world.path / "roomy", tiny_tokenizer, max_position_embeddings=1024)


def summary_of(world: World, run: str) -> dict[str, Any]:
    return json.loads((world.path / run / "summary.json").read_text())  # type: ignore[no-any-return]


def test_online_dpo(world: World, roomy: Path) -> None:
    settings = {"model": roomy, "references.members": members(roomy), "output_dir": "runs/online"}
    outcome = world.run(recipe(world, "online_dpo", **settings))
    assert outcome.code == 0, outcome.err
    summary = summary_of(world, "runs/online")
    assert len(summary["rounds"]) == 4 or summary["stop"] is not None
    assert summary["references"] == ["brief", "careful"] and summary["enhancer"]["temperature"] == 1.3


def test_online_hybrid(world: World, roomy: Path) -> None:
    offline = world.pairs(*({"prompt": f"o{i}?", "chosen": "yes", "rejected": "no"} for i in range(9)), name="offline.jsonl")
    (world.path / "pairs.jsonl").unlink(missing_ok=True)
    settings = {"model": roomy, "references.members": members(roomy), "offline_data": offline, "output_dir": "runs/hybrid"}
    outcome = world.run(recipe(world, "online_hybrid", **settings))
    assert outcome.code == 0, outcome.err
    summary = summary_of(world, "runs/hybrid")
    assert summary["composition"] == "arithmetic" and summary["enhancer"]["who"] == "references"
    online = 0
    for row in summary["rounds"][1:]:
        online += row["pairs"]
        assert row["train_pairs"] == online + round(0.33 * online / 0.67)


def test_online_pessimistic(world: World, roomy: Path) -> None:
    for number in (1, 2, 3):
        assert world.run(world.reward(model=roomy, output_dir=f"runs/reward_{number}", seed=number, lora={"r": 2})).code == 0
    words = recipe(world, "online_pessimistic", model=roomy, output_dir="runs/pessimistic")
    outcome = world.run(words)
    assert outcome.code == 0, outcome.err
    summary = summary_of(world, "runs/pessimistic")
    assert summary["pessimism"] == 1 and summary["reward"].startswith("an ensemble of runs/reward_1/model")
    assert len(summary["rounds"]) == 2 and summary["labels"] == 4 * summary["prompts"]


@pytest.mark.usefixtures("loopback")
def test_online_self_rewarding_by_a_real_server(world: World, roomy: Path, tmp_path: Path) -> None:
    settings = {"references.members": members(roomy), "model": roomy, "rounds": 1, "merge_adapter": "true"}
    outcome = world.run(recipe(world, "online_dpo", output_dir="runs/online", **settings))
    assert outcome.code == 0, outcome.err
    keeps = saved_verdict_model(world.path / "keeps", "VERDICT: 73")  # the earlier self itself would babble
    words = [*recipe(world, "online_self_rewarding", output_dir="runs/self"), "--labeller.judge.model", keeps]
    with transformers_serve(tmp_path) as url:
        outcome = world.run([*words, "--labeller.judge.base_url", url])
    assert outcome.code == 0, outcome.err
    summary = summary_of(world, "runs/self")
    asked = (world.path / "runs/self/judge.jsonl").read_text().splitlines()
    assert summary["label"] == "model" and len(summary["rounds"]) == 3 and summary["model"] == "runs/online/model"
    for row in summary["rounds"][1:]:
        assert row["unlabelled"] == 0 and row["ties"] == row["pairs"], "73 for either place is no preference"
    assert sum(json.loads(line)["event"] == "answered" for line in asked) == 2 * summary["labels"]
    assert world.run([*words, "--labeller.judge.base_url", url]).code == 0, "complete, and no server is asked"
