"""The ways of a round: enhancers, anchors, rails, offline pairs, pessimism, labels by models and people, the plan."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_world import World, assert_ends_in_one_line
from polyref.cli import training_rewards
from polyref.cli.iterate import make_iterate
from polyref.cli.iterate_plan import offline_of
from polyref.cli.iterate_settings import EnhancerSettings, IterateSettings
from polyref.cli.loop_settings import LoopPrompts
from polyref.cli.multistep_summary import judges_of
from polyref.cli.preference_source import RewardSource
from polyref.data.sources import load_preferences
from polyref.errors import ConfigError
from polyref.rewards.functions import NamedReward, from_function
from polyref.rewards.preference_model import from_reward
from polyref.samplers import composed_auto
from polyref.types import PreferenceRecord, Text

LETTERS = from_function(lambda prompt, text: float(len(str(text))), "letters", "1")


SLOW = (pytest.mark.slow, pytest.mark.ci)


def slow(test: Any) -> Any:
    """Not among the tests of every minute."""
    return pytest.mark.slow(pytest.mark.ci(test))


def quick(world: World, **settings: Any) -> list[str]:
    """One round over three prompts, judged by one completion of each."""
    world.pairs(*({"prompt": f"question {i}?", "chosen": f"yes, {i}", "rejected": f"no {i}"} for i in range(3)))
    usual = {"rounds": 1, "held_out": None, "eval_completions": 1, "completions": 2, "references": None}
    usual |= {"prompts_at_once": 32, "max_new_tokens": 4}
    return world.iterate(**usual | settings)


def summary_of(world: World) -> dict[str, Any]:
    return json.loads((world.path / "iterate" / "summary.json").read_text())  # type: ignore[no-any-return]


def drawn(world: World, stage: str) -> list[list[str]]:
    """The texts of each prompt's completions."""
    rows = json.loads((world.path / "iterate" / "stages" / stage / "chunk-000000.json").read_text())
    return [[one["text"] for one in row["proposals"]] for row in rows]


def test_best_against_the_worst_of_another_temperature(world: World) -> None:
    enhancer = {"temperature": 3.0, "completions": 3, "stays": "worst"}
    outcome = world.run(quick(world, enhancer=enhancer, stays="best", system_prompt="be long"))
    assert outcome.code == 0, outcome.err
    main, other = drawn(world, "generate-1"), drawn(world, "enhance-1")
    assert [len(one) for one in main + other] == [2] * 3 + [3] * 3
    records: list[Any] = load_preferences(world.path / "iterate/stages/pair-1/pairs.jsonl")
    assert records
    for record in records:
        number = int(record.prompt[-1]["content"].removeprefix("question ")[0])
        texts = {record.chosen[-1]["content"], record.rejected[-1]["content"]}
        assert texts == {max(main[number], key=len), min(other[number], key=len)}


@pytest.mark.parametrize("who", ["references", *(pytest.param(who, marks=SLOW) for who in ("brief", "earlier", "start"))])
def test_members_and_earlier_policies_are_enhancers(world: World, who: str) -> None:
    members = [{"model": str(world.model)}, {"model": str(world.model), "system_prompt": "be brief", "name": "brief"}]
    outcome = world.run(quick(world, enhancer={"who": who, "completions": 1}, completions=1, references={"members": members}))
    assert outcome.code == 0, outcome.err
    main, other = drawn(world, "generate-1"), drawn(world, "enhance-1")
    row = summary_of(world)["rounds"][1]
    assert main != other and row["completions"] >= 6 and row["inexact_prompts"] == row["short_prompts"] == 0


def test_particles_of_the_references_are_pairs_by_their_weights_and_are_told(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(composed_auto, "_promised", lambda pilot, n: float("inf"))  # too far apart to be drawn exactly
    members = [{"model": str(world.model)}, {"model": str(world.model), "system_prompt": "be brief", "name": "brief"}]
    outcome = world.run(quick(world, enhancer={"who": "references", "completions": 4}, references={"members": members}))
    assert outcome.code == 0, outcome.err
    assert "enhancer references: 3 of 3 prompts are drawn by particles" in caplog.text
    row = summary_of(world)["rounds"][1]
    assert (row["inexact_prompts"], row["short_prompts"], row["note"]) == (3, 0, "")
    assert "The enhancer drew for 3 prompts by particles" in (world.path / "iterate" / "report.html").read_text()
    rows = json.loads((world.path / "iterate/stages/enhance-1/chunk-000000.json").read_text())
    assert any(len({one["log_weight"] for one in prompt["proposals"]}) > 1 for prompt in rows)


@slow
@pytest.mark.parametrize(("anchor", "told"), [("previous", "the policy of the round before"), ("average", "a moving average")])
def test_an_anchor_that_moves_is_named_and_measured_apart(world: World, anchor: str, told: str) -> None:
    outcome = world.run(quick(world, anchor=anchor, anchor_decay=0.5, rounds=2))
    assert outcome.code == 0, outcome.err
    summary = summary_of(world)
    assert summary["anchor"].startswith(told) and summary["rounds"][1]["kl"] == summary["rounds"][1]["kl_anchor"]
    assert summary["rounds"][0]["kl_anchor"][0] == pytest.approx(0, abs=1e-4)
    assert summary["rounds"][2]["kl"] != summary["rounds"][2]["kl_anchor"]
    if anchor == "average":
        from safetensors.torch import load_file

        folders = (world.model, *(world.path / "iterate/stages" / name / "model" for name in ("train-1", "anchor-1")))
        start, trained, average = (load_file(folder / "model.safetensors") for folder in folders)
        assert all(torch.allclose(average[name], (start[name] + trained[name]) / 2) for name in average)


def test_a_kl_budget_ends_the_run_with_the_policy_before(world: World) -> None:
    outcome = world.run(quick(world, kl_budget=1e-6, rounds=3, learning_rate=0.05))
    assert outcome.code == 0, outcome.err
    summary = summary_of(world)
    assert len(summary["rounds"]) == 2 and summary["final_round"] == 0 and summary["stop"]["rail"] == "KL budget"
    page = (world.path / "iterate" / "report.html").read_text()
    assert "It ended after round 1 of 3" in page and "that of the start, the last before it" in page
    trained = (world.path / "iterate/model/model.safetensors").read_bytes()
    assert trained != (world.path / "iterate/stages/train-1/model/model.safetensors").read_bytes()


@slow
def test_offline_pairs_are_trained_on_beside_fresh_prompts(world: World, caplog: pytest.LogCaptureFixture) -> None:
    offline = world.file("offline.jsonl", "".join(f'{{"prompt": "o{i}", "chosen": "a", "rejected": "b"}}\n' for i in range(5)))
    judged = world.file("judged.jsonl", '{"prompt": "o3"}\n{"prompt": "another?"}\n')
    settings = {"rounds": 3, "prompts_per_round": 1, "replay": 0, "completions": 8, "eval_data": judged}
    outcome = world.run(quick(world, offline_data=offline, **settings))
    assert outcome.code == 0, outcome.err
    summary = summary_of(world)
    assert summary["judged_on"] == "2 held-out prompts (1 of them trained on too)" and "flatters" in caplog.text
    assert summary["offline_pairs"] == 5 and [row["completions"] for row in summary["rounds"][1:]] == [8, 8, 8]
    assert [row["train_pairs"] for row in summary["rounds"][1:]] == [6, 6, 6]


def test_offline_pairs_of_held_out_prompts_are_left_out_and_counted(world: World) -> None:
    data = str(world.pairs())  # 6 prompts, each twice
    own = IterateSettings("run", "model", offline_data=data)
    source = LoopPrompts(data, held_out=2)
    prompts, held_out = source.load()
    offline = offline_of(own, source, held_out)
    assert (len(offline.pairs), offline.left_out) == (8, 4)
    assert judges_of([*prompts, *offline.pairs], held_out, [])["judged_on"] == "2 held-out prompts"
    elsewhere = LoopPrompts(str(world.pairs({"prompt": "new?"}, name="new.jsonl")), eval_data=data)
    offline = offline_of(own, elsewhere, elsewhere.load()[1])
    assert offline.left_out == 0, "who names what judges may train on it, and is told"
    found = judges_of(offline.pairs, elsewhere.load()[1], source.pairs(data)[:3])
    assert (found["shared_prompts"], found["bonus_prompts"]) == (6, 3)
    assert found["judged_on"] == "6 held-out prompts (6 of them trained on too, 3 of them in bonus_data)"
    found = judges_of(elsewhere.load()[1], [], source.pairs(data)[:3])
    assert found["judged_on"] == "the prompts trained on (3 of them in bonus_data)" and found["shared_prompts"] == 0
    own.offline_data = str(
        world.pairs(*({"prompt": row.prompt, "chosen": "a", "rejected": "b"} for row in held_out), name="o.jsonl")
    )
    with pytest.raises(ConfigError, match="all 2 pairs of offline_data are of held-out prompts"):
        offline_of(own, source, held_out)


@slow
def test_pessimism_subtracts_the_spread_of_an_ensemble_before_pairing(world: World) -> None:
    own = IterateSettings("run", "model", ensemble=[RewardSource("rule:length"), RewardSource("rule:length:characters")])
    texts = ["a b", "abcdefgh"]
    mean = own.rewards.load([])(["p", "p"], texts)
    own.pessimism = 2.0
    low = own.rewards.load([])(["p", "p"], texts)
    assert mean[1] > mean[0] and low[1] < low[0], "the longer text is better in the mean, and less sure"
    ensemble = [{"model": "rule:length"}, {"model": "rule:length:characters"}]
    outcome = world.run(quick(world, reward=None, ensemble=ensemble, pessimism=1.0))
    assert outcome.code == 0, outcome.err
    assert summary_of(world)["pessimism"] == 1.0


class Counting:
    """A reward with two features, told apart by their letters."""

    name, fingerprint = "counting", "1"

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> torch.Tensor:
        return self.features(prompts, completions).sum(-1)

    def features(self, prompts: Sequence[Text], completions: Sequence[Text]) -> torch.Tensor:
        return torch.tensor([[float(len(str(y))), float(len(set(str(y))))] for y in completions], dtype=torch.float64)


def test_one_reward_is_less_sure_of_features_that_its_pairs_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    own = IterateSettings("run", "model", reward=RewardSource("model"), pessimism=1.0, bonus_data="pairs.jsonl")
    monkeypatch.setattr(training_rewards, "load_reward", lambda source: Counting())
    fitted = [PreferenceRecord("p", "aaa", "a")] * 9
    reward = own.rewards.load(fitted)
    low = Counting()(["p", "p"], ["aaaa", "abcd"]) - reward(["p", "p"], ["aaaa", "abcd"])
    assert 0 < low[0] < low[1], "of as long texts, one has letters that no pair told apart"


def test_functions_reward_label_and_pair_by_uncertainty(world: World) -> None:
    data = world.pairs()
    run = str(world.path / "iterate")
    own = IterateSettings(run, str(world.model), rounds=1, pairing="farthest", label="model", eval_completions=1)
    own.completions, own.max_new_tokens, own.enhancer = 2, 4, EnhancerSettings(completions=2)
    training = {"per_device_train_batch_size": 8, "num_train_epochs": 1}
    summary = make_iterate(own, LoopPrompts(str(data), limit=3), training, reward=Counting(), preference=from_reward(LETTERS))
    assert summary is not None and summary["label"] == "model" and summary["reward"] == "a function"
    labelled = load_preferences(Path(run) / "stages/label-1/labelled.jsonl")
    assert all(one.chosen_probability is not None and len(one.chosen) >= len(one.rejected) for one in labelled)


def vote_in(sheet: Path, vote: str) -> None:
    with sheet.open(newline="", encoding="utf-8-sig") as file:
        header, *rows = csv.reader(file)
    with sheet.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *([*row[:-1], vote] for row in rows)])


def test_people_vote_in_a_file_change_their_minds_and_the_run_goes_on(world: World) -> None:
    words = quick(world, label="human", label_how="file")
    outcome = world.run(words)
    sheet = world.path / "iterate" / "annotate-1.csv"
    assert outcome.code == 0 and not (world.path / "iterate" / "summary.json").exists()
    for _ in range(2):
        vote_in(sheet, "skip")
        skipped = world.run(words)
        assert_ends_in_one_line(skipped, "pairs of round 1 were skipped", "annotate-1.csv and run the same command again")
    vote_in(sheet, "A")
    outcome = world.run(words)
    assert outcome.code == 0, outcome.err
    summary = summary_of(world)
    assert summary["label"] == "human" and summary["labels"] == summary["rounds"][1]["pairs"] >= 1


def test_a_dry_run_prints_the_plan_and_leaves_nothing(world: World) -> None:
    words = [*quick(world, rounds=2, lora={"r": 2}), "--dry_run"]
    before = world.tree()
    outcome = world.run(words)
    assert outcome.code == 0 and world.tree() == before, outcome.err
    for text in ("2 rounds of 1 epochs", "generate 2", "train 2", "tokens drawn", "both measured now", "Assumed:", "Disk:"):
        assert text in outcome.out
    (train_two,) = (line.split() for line in outcome.out.splitlines() if line.split()[:2] == ["train", "2"])
    assert train_two[2] == "12", "pairs of two rounds, two texts each"


@slow
def test_a_reward_that_fails_in_mid_round_ends_in_a_line_and_a_mended_one_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[int]()

    def failing(prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        calls.append(1)
        return [float(len(str(y))) if len(calls) < 3 else float("nan") for y in completions]

    words = quick(world, prompts_at_once=2)
    with monkeypatch.context() as patch:
        patch.setattr(training_rewards, "load_reward", lambda source: NamedReward("failing", failing))
        assert_ends_in_one_line(world.run(words), "failing, row 1", "gave nan as reward")
    assert (world.path / "iterate/stages/evaluate-0/chunk-000001.json").exists()
    assert world.run(words).code == 0
    with monkeypatch.context() as patch:
        flat = quick(world, output_dir=world.path / "flat")
        patch.setattr(training_rewards, "load_reward", lambda source: from_function(lambda x, y: 1.0, "flat"))
        assert_ends_in_one_line(world.run(flat), "every completion of round 1 has the reward 1", "tells completions apart")
