"""Rewards less their uncertainty, in loops that tilt by them: the same settings, and the same refusals, in both verbs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_world import World, assert_refused, table
from polyref.cli import training_rewards
from polyref.cli.preference_source import RewardSource
from polyref.cli.training_rewards import TrainingRewards
from polyref.errors import ConfigError
from polyref.rewards.functions import from_function
from polyref.rewards.protocols import Reward
from polyref.types import PreferenceRecord, Text

ENSEMBLE = [{"model": "rule:length:words"}, {"model": "rule:length:characters"}]


def low(text: str, k: float) -> float:
    """The mean of both lengths less k standard deviations of one more such reward."""
    words, letters = len(text.split()), len(text)
    return (words + letters) / 2 - k * abs(words - letters) / 2**0.5


def test_pessimism_is_subtracted_before_the_tilt_of_a_step(world: World) -> None:
    settings: dict[str, Any] = {"reward": None, "ensemble": ENSEMBLE, "steps": 1, "prompts_at_once": 32, "held_out": None}
    outcome = world.run(world.multistep(**settings, pessimism=0.5, eval_completions=1))
    assert outcome.code == 0, outcome.err
    run = world.path / "multistep"
    rows = json.loads((run / "stages/propose-1/chunk-000000.json").read_text())
    proposals = [one for row in rows for one in row["proposals"]]
    assert len(proposals) == 48
    for one in proposals:
        assert one["rewards"][0] == pytest.approx(low(one["text"], 0.5))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["pessimism"] == 0.5 and summary["reward"] == "an ensemble of rule:length:words, rule:length:characters"
    assert "pessimism" in (run / "report.html").read_text()


def test_neither_reward_is_loaded_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = list[str]()

    def load(source: RewardSource) -> Reward:
        loaded.append(source.model)
        return from_function(lambda prompt, text: 0.0, source.model)

    monkeypatch.setattr(training_rewards, "load_reward", load)
    own = TrainingRewards(RewardSource("rule:length"), None, 0.0, None, 1.0, RewardSource("rule:length:words"))
    reward, gold, _ = own.open(list, None, None)
    assert reward() is reward()
    assert loaded == ["rule:length"], "what draws loads no judge, and once is enough"
    assert gold is not None and gold() is gold()
    assert loaded == ["rule:length", "rule:length:words"]


class Lettered:
    """A reward with one feature, the number of letters."""

    name, fingerprint = "lettered", "1"

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> torch.Tensor:
        return self.features(prompts, completions).sum(-1)

    def features(self, prompts: Sequence[Text], completions: Sequence[Text]) -> torch.Tensor:
        return torch.tensor([[float(len(str(y)))] for y in completions], dtype=torch.float64)


def test_pessimism_of_a_function_is_subtracted_or_refused() -> None:
    own, fitted = TrainingRewards(None, None, 2.0, "pairs.jsonl", 1.0, None), [PreferenceRecord("p", "aaa", "a")]
    opened = own.open(lambda: fitted, Lettered(), None)
    bonus = 2.0 * 4 / 5**0.5  # nu = 2, S = 1 + 2 * 2
    assert opened.reward()(["p"], ["abcdef"])[0] == pytest.approx(6 - bonus)
    assert opened.plain is not None and opened.plain()(["p"], ["abcdef"])[0] == 6
    with pytest.raises(ConfigError, match="pessimism is 2, and the reward is a function without features"):
        own.open(lambda: fitted, from_function(lambda prompt, text: 0.0, "flat"), None)
    unchanged = TrainingRewards(None, None, 0.0, None, 1.0, None).open(list, Lettered(), None)
    assert unchanged.reward()(["p"], ["abcdef"])[0] == 6


@pytest.mark.slow
@pytest.mark.ci
def test_a_reward_model_is_less_sure_beside_the_pairs_it_was_fitted_to(world: World) -> None:
    assert world.run(world.reward(output_dir="reward")).code == 0
    fitted = world.path / "pairs.jsonl"
    reward = {"reward": {"model": "reward/model"}, "bonus_data": fitted, "steps": 1, "prompts_at_once": 32}
    means: list[float] = []
    for k in (None, 1.0):
        settings = reward | ({"pessimism": k} if k else {"bonus_data": None}) | {"output_dir": world.path / f"run-{k}"}
        outcome = world.run(world.multistep(**settings))
        assert outcome.code == 0, outcome.err
        summary = json.loads((world.path / f"run-{k}" / "summary.json").read_text())
        means.append(summary["steps"][0]["reward"][0])
    assert means[1] < means[0], "of the same completions of the start"
    world.pairs(*({"prompt": f"question {i % 6}?", "chosen": "other", "rejected": f"{i}"} for i in range(12)))
    changed = world.run(world.multistep(**reward, pessimism=1.0, output_dir=world.path / "run-1.0"))
    assert changed.code == 2 and "pairs of bonus_data" in changed.err


@pytest.fixture(autouse=True)
def here(world: World, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs are named from the folder of the test."""
    monkeypatch.chdir(world.path)
    return world.path


@pytest.mark.parametrize("verb", ["iterate", "multistep"])
@table(
    {
        "two rewards": ({"ensemble": ENSEMBLE}, "reward and ensemble are both given"),
        "an ensemble of one": ({"reward": None, "ensemble": ENSEMBLE[:1]}, "fewer than 2 rewards"),
        "pessimism of a rule": ({"pessimism": 1.0}, "pessimism needs an ensemble"),
        "pessimism below 0": ({"pessimism": -1.0}, "pessimism is -1", "at least 0"),
        "a bonus of nothing": ({"bonus_data": "pairs.jsonl"}, "bonus_data has no effect without pessimism"),
        "a ridge of 0": ({"ridge": 0.0}, "ridge is 0", "above 0"),
        "a rule of an ensemble that is none": (
            {"reward": None, "ensemble": [*ENSEMBLE, {"model": "rule:beauty"}]},
            "there is no rule 'rule:beauty'",
        ),
    }
)
def test_both_verbs_refuse_the_same(given: dict[str, Any], says: list[str], verb: str, world: World) -> None:
    world.pairs()
    assert_refused(world, getattr(world, verb)(**given), says)
