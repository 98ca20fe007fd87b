"""What `polyref auxiliary` writes by each way to g, that it can be trained on, and that a killed run ends alike."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli_world import World, assert_ends_in_one_line, assert_one_line, assert_refused, some_rows
from crash import Runs, Warm
from fakes import byte_tokenizer, saved_llama, word_tokenizer
from judge_world import judging
from polyref.cli import auxiliary_stages
from polyref.cli.auxiliary_summary import agreement
from polyref.cli.preference_source import KINDS, RewardSource
from polyref.data.sources import load_preferences
from polyref.rewards.functions import from_function
from polyref.rewards.reward_settings import read_reward_settings, write_reward_settings
from polyref.rewards.rules import RULES
from polyref.types import PreferenceRecord


def summary_of(world: World, run: str = "auxiliary") -> dict[str, Any]:
    summary = json.loads((world.path / run / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert isinstance(summary, dict)
    return summary


def written(world: World, run: str = "auxiliary") -> dict[str, bytes]:
    files = [file for file in (world.path / run).rglob("*") if file.is_file() and file.name not in (".lock", "timing.json")]
    return {str(file.relative_to(world.path / run)): file.read_bytes() for file in files}


def reward_model(world: World) -> Path:
    assert world.run(world.reward(max_steps=1, output_dir=world.path / "reward")).code == 0
    return world.path / "reward" / "model"


@pytest.mark.parametrize("kind", ["cross_encoder", "reward", "ensemble"])
def test_each_preference_model_fills_the_columns_that_training_reads(
    kind: str, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "polyref")
    models = [{"model": str(reward_model(world)), "temperature": 2.0}, {"model": "rule:length"}]
    encoder = {"model": str(world.model), "folds": 2, "epochs": 2, "lora": {"r": 2, "last_layers": 1}}
    source: Any = {"cross_encoder": encoder, "reward": models[0], "ensemble": models}[kind]
    outcome = world.run(world.auxiliary(**{"reward": None, kind: source}))
    assert outcome.code == 0, outcome.err
    assert "12 pairs of 6 prompts: 48 completions of at most 40 tokens, 1920 in all; then g of 36 pairs" in caplog.text
    assert json.loads((world.path / "auxiliary" / "timing.json").read_text())["tokens_a_second"] > 0
    file = world.path / "auxiliary" / "pairs.jsonl"
    records = load_preferences(file)
    assert [(r.prompt, r.chosen, r.rejected) for r in records] == [tuple(row.values()) for row in some_rows()]
    for record in records:
        assert record.predicted_probability is not None and 0 < record.predicted_probability < 1
        assert len(record.auxiliary_1 or ()) == len(record.auxiliary_2 or ()) == len(record.auxiliary_probability or ()) == 2
    assert len({record.auxiliary_1 for record in records}) == 12, "pairs of equal prompts have draws of their own"
    summary = summary_of(world)
    assert summary["auxiliary_pairs"] == summary["distinct_pairs"] == 24 and summary["pairs"] == 12 and summary["prompts"] == 6
    assert summary["completions_drawn"] == 48 + 2 * summary["equal_pairs_redrawn"] and 0 < summary["share_ended"] < 1
    g = summary["preference_model"]
    assert g["kind"] == kind and g["log_loss"] == pytest.approx(
        -sum(math.log(record.predicted_probability or 0) for record in records) / 12
    )
    trained = world.run(world.train(data=file, objective="variance_reduced", max_steps=2))
    assert trained.code == 0, trained.err


def test_held_out_pairs_take_no_part_and_are_written_beside_the_others(world: World) -> None:
    encoder = {"model": str(world.model), "folds": 2}
    settings = {"cross_encoder": encoder, "reward": None, "held_out": 4, "prompt_format": "chat", "file_name": "p.jsonl.gz"}
    assert world.run(world.auxiliary(**settings)).code == 0
    run = world.path / "auxiliary"
    summary = summary_of(world)
    assert (summary["pairs"], summary["held_out_pairs"]) == (8, 4) and summary["files"] == ["p.jsonl.gz", "held_out.jsonl.gz"]
    records, held_out = (load_preferences(run / name) for name in summary["files"])
    assert not {json.dumps(r.prompt) for r in records} & {json.dumps(r.prompt) for r in held_out}
    assert records[0].auxiliary_1 is not None and not isinstance(records[0].auxiliary_1[0], str)
    assert all(record.auxiliary_1 is None for record in held_out)
    data = {"data": run / "p.jsonl.gz", "eval_data": run / "held_out.jsonl.gz"}
    trained = world.run(world.train(**data, objective="variance_reduced", max_steps=1))
    assert trained.code == 0, trained.err


def test_votes_of_others_judge_other_pairs_of_the_prompt(world: World) -> None:
    pairs = [("a", "b"), ("a", "c"), ("b", "c"), ("c", "d")]
    votes = [{"prompt": x, "chosen": a, "rejected": b, "chosen_probability": 0.75} for x in "xy" for a, b in pairs]
    world.pairs(*({"prompt": x, "chosen": "b", "rejected": "a"} for x in "xy"))
    file = world.pairs(*votes, name="votes.jsonl")
    source = {"votes": file, "reward": None, "sampling_policy": None, "max_new_tokens": None}
    outcome = world.run(world.auxiliary(**source, pairs=3, file_name="pairs.parquet"))
    assert outcome.code == 0, outcome.err
    for record in load_preferences(world.path / "auxiliary" / "pairs.parquet"):
        assert record.predicted_probability == 0.25 and record.auxiliary_probability == (0.75,) * 3
        assert sorted(zip(record.auxiliary_1 or (), record.auxiliary_2 or (), strict=True)) == pairs[1:]
    assert "completions_drawn" not in summary_of(world)
    refused = world.run(world.auxiliary(**source, pairs=4, output_dir=world.path / "more"))
    assert_one_line(refused, ["row 1: its prompt has 3 other pairs with votes, and 4 are needed", "lower pairs"])
    source["output_dir"] = world.path / "more"
    names = {"prompt": "question"}
    renamed = [{names.get(k, k): v for k, v in row.items()} for row in votes]
    own = world.pairs(*({"question": x, "chosen": "b", "rejected": "a"} for x in "xy"), name="own.jsonl")
    source |= {"votes": world.pairs(*renamed, name="renamed.jsonl"), "output_dir": world.path / "renamed"}
    assert world.run(world.auxiliary(**source, data=own, columns=names, pairs=3)).code == 0, "columns are of the votes too"
    source |= {"votes": file, "output_dir": world.path / "more"}
    assert_refused(world, world.auxiliary(**source, data=file), ["votes and data are one source", "other annotators"])
    assert_refused(world, world.auxiliary(**source | {"redraws": 3}), ["redraws has no effect with votes", "leave it out"])
    world.pairs(*votes[:2], {"prompt": "x", "chosen": "b", "rejected": "c"}, name="votes.jsonl")
    assert_refused(world, world.auxiliary(**source), ["votes.jsonl, row 3, column chosen_probability: is missing", "share"])


def test_what_a_soft_label_prefers_may_be_the_rejected_completion() -> None:
    pairs = ((0.2, 0.3), (0.75, 0.9), (0.5, 0.9), (None, 0.6))
    records = [PreferenceRecord("x", "a", "b", chosen_probability=z, predicted_probability=g) for z, g in pairs]
    found = agreement(records)
    assert found["mean"] == pytest.approx((0.7 + 0.9 + 0.5 + 0.6) / 4)
    assert found["accuracy"] == pytest.approx((1 + 1 + 0.5 + 1) / 4)


def test_a_reward_is_known_by_all_that_its_values_depend_on(world: World) -> None:
    answers = world.file("answers.jsonl", '{"prompt": "x", "answer": "1"}')
    source = RewardSource(f"rule:exact_answer:{answers}")
    before = source.fingerprint
    world.file("answers.jsonl", '{"prompt": "x", "answer": "2"}')
    assert source.fingerprint != before

    base = Path(shutil.copytree(world.model, world.path / "base"))  # all tests have the other
    assert world.run(world.reward(model=base, lora={"r": 2}, max_steps=1, output_dir=world.path / "reward")).code == 0
    adapter = world.path / "reward" / "model"
    for source in (RewardSource(str(base), adapter=str(adapter)), RewardSource(str(adapter))):
        before = source.fingerprint
        kept = read_reward_settings(adapter)
        assert kept is not None
        write_reward_settings(adapter, replace(kept, temperature=(kept.temperature or 1.0) + 1))
        assert source.fingerprint != before

    sources = [RewardSource(str(base), adapter=str(adapter)), RewardSource(str(adapter))]
    before = [source.fingerprint for source in sources]
    saved_llama(base, byte_tokenizer(), seed=7)
    other_base = [source.fingerprint for source in sources]
    word_tokenizer(["yes", "no"]).save_pretrained(adapter)
    other_words = [source.fingerprint for source in sources]
    assert all(len(set(found)) == 3 for found in zip(before, other_base, other_words, strict=True))
    whole = RewardSource(str(base)).fingerprint
    word_tokenizer(["yes", "no"]).save_pretrained(base)
    assert RewardSource(str(base)).fingerprint != whole


def test_a_reward_that_is_no_number_is_named_by_its_row_of_the_data(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "broken", lambda: from_function(lambda x, y: math.nan if y == "no 9" else 1.0, "broken"))
    outcome = world.run(world.auxiliary(reward={"model": "rule:broken"}))
    assert_ends_in_one_line(outcome, "broken", "pairs.jsonl, row 10: gave nan as reward; a reward is a finite number")


RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("auxiliary_*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_open_with_a_command_that_is_understood(recipe: Path, world: World) -> None:
    command = recipe.read_text(encoding="utf-8").splitlines()[0].removeprefix("# polyref ")
    outcome = world.run([*command.replace(f"configs/{recipe.name}", str(recipe)).split(), "--print_config"])
    assert outcome.code == 0, outcome.err
    kind = recipe.stem.removeprefix("auxiliary_")
    shown = yaml.safe_load(outcome.out)
    assert [name for name in KINDS if shown[name] is not None] == [kind] and shown["pairs"] == 4
    assert (shown["sampling_policy"] is None) == (kind == "votes")


def test_every_way_to_g_has_a_recipe() -> None:
    assert {recipe.stem.removeprefix("auxiliary_") for recipe in RECIPES} == set(KINDS)


def by_letters(first: str, second: str) -> float:
    return len(first) / (len(first) + len(second) + 1)


def test_a_judge_is_asked_once_and_one_without_a_verdict_stops_or_is_left_out(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    silent = "no 3"

    def share(first: str, second: str) -> float:
        return 7.77 if silent in (first, second) else by_letters(first, second)

    with judging(share) as server:
        judge = {"base_url": server.url, "model": "j", "max_requests": 10, "tries": 1, "first_wait": 0.01}
        words = world.auxiliary(reward=None, judge=judge, leave_out=False)
        assert_ends_in_one_line(world.run(words), "max_requests")
        words = world.auxiliary(reward=None, judge=judge | {"max_requests": 1000}, leave_out=False)
        assert_ends_in_one_line(world.run(words), "pairs.jsonl, row 4: no verdict on 1 pairs", "set leave_out")
        asked = len(server.bodies)
        words = world.auxiliary(reward=None, judge=judge | {"max_requests": 1000}, leave_out=True)
        outcome = world.run(words)
        assert outcome.code == 0, outcome.err
        assert len(server.bodies) == asked, "nothing is asked twice"
    summary = summary_of(world)
    assert summary["left_out"] == {"prompt too long": 0, "no verdict": 1} and summary["pairs"] == 11
    assert "1 pairs were left out: no verdict" in caplog.text


def test_a_run_killed_anywhere_ends_with_the_bytes_of_an_unbroken_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {"members": [{"model": str(world.model)}, {"model": str(world.model), "system_prompt": "be brief"}]}
    encoder = {"model": str(world.model), "folds": 2}
    settings = {
        "sampling_policy": members | {"composition": "arithmetic", "weights": [0.7, 0.3]},
        "cross_encoder": encoder,
        "reward": None,
        "prompt_format": "chat",
    }
    assert world.run(world.auxiliary(**settings, output_dir=world.path / "unbroken")).code == 0
    words, keep, kills = world.auxiliary(**settings, output_dir=world.path / "broken"), auxiliary_stages.keep, 0

    def stop(file: Path, value: Any) -> None:
        keep(file, value)
        raise KeyboardInterrupt

    while True:
        with monkeypatch.context() as patch:
            patch.setattr(auxiliary_stages, "keep", stop)
            outcome = world.run(words)
        if outcome.code == 0:
            break
        kills += 1
        assert outcome.code == 1 and kills < 9, outcome.err
    assert kills == 3 + 1, "three chunks and the probabilities"
    assert written(world, "broken") == written(world, "unbroken")
    before = written(world, "broken")
    assert world.run(words).code == 0 and written(world, "broken") == before


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_run_with_a_rule_that_is_killed_outright_ends_with_the_same_bytes(world: World) -> None:
    with Warm(world.environment) as warm:
        runs = Runs(warm, world.path, lambda name: world.auxiliary(output_dir=world.path / name / "run", prompts_at_once=3))
        runs.survive_kills(6)


def test_a_fold_that_is_fitted_is_not_fitted_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"cross_encoder": {"model": str(world.model), "folds": 3}, "reward": None}
    words, train = world.auxiliary(**settings), train_cross_encoder()
    fits: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        fits.append(len(fits))
        if len(fits) == 2:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr("polyref.rewards.cross_encoder.train_cross_encoder", counted)
    assert world.run(words).code == 1
    assert world.run(words).code == 0
    assert len(fits) == 4


def train_cross_encoder() -> Any:
    from polyref.rewards.cross_encoder import train_cross_encoder

    return train_cross_encoder
