"""Settings that `polyref iterate` refuses, in one line and before anything is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cli_world import World, assert_ends_in_one_line, assert_refused, table
from judge_world import completion, listening
from polyref.cli.iterate import make_iterate
from polyref.cli.iterate_settings import IterateSettings
from polyref.cli.loop_settings import LoopPrompts
from polyref.errors import ConfigError
from polyref.rewards.functions import from_function


@table(
    {
        "a beta of 0": ({"beta": 0.0}, "beta is 0", "above 0"),
        "no rounds": ({"rounds": 0}, "rounds is 0", "at least 1"),
        "one completion": ({"completions": 1}, "completions is 1 without an enhancer"),
        "best alone": ({"stays": "best"}, "stays is best without an enhancer"),
        "too few for the pairs": (
            {"enhancer": {"stays": "best"}, "stays": "worst", "pairs": 2},
            "pairs is 2 of 1 completions against 1 of the enhancer",
        ),
        "no such enhancer": ({"enhancer": {"who": "nobody"}}, "enhancer.who is 'nobody'", "brief"),
        "a prompt of a reference": ({"enhancer": {"who": "brief", "system_prompt": "hi"}}, "has its own system prompt"),
        "a temperature of a composition": (
            {"enhancer": {"who": "references", "temperature": 2.0}},
            "which is drawn as it is",
        ),
        "no such stays": ({"enhancer": {"stays": "middle"}}, "unknown stays 'middle'"),
        "no such pairing": ({"pairing": "uncertain"}, "unknown pairing 'uncertain'", "farthest"),
        "features of a rule": ({"pairing": "farthest"}, "needs the features of one reward model"),
        "no such label": ({"label": "votes"}, "unknown label 'votes'", "soft, hard, model, human"),
        "no labeller": ({"label": "model"}, "label is model, with no preference model"),
        "a labeller of no use": ({"labeller": {"reward": {"model": "rule:length"}}}, "labeller has no effect on label soft"),
        "votes yet to be cast": ({"label": "model", "labeller": {"votes": "pairs.jsonl"}}, "yet to be drawn"),
        "ties of soft labels": ({"tie_within": 0.5}, "tie_within has no effect on label soft"),
        "no such anchor": ({"anchor": "moving"}, "unknown anchor 'moving'", "previous"),
        "a decay of 1": ({"anchor_decay": 1.0}, "anchor_decay is 1"),
        "no reward": ({"reward": None}, "no reward is given", "reward.model"),
        "no such rule": ({"gold": {"model": "rule:beauty"}}, "there is no rule 'rule:beauty'"),
        "a share of nothing": ({"offline_share": 0.5}, "offline_share has no effect without offline_data"),
        "prompts exhausted": (
            {"prompts_per_round": 3},
            "2 rounds of 3 fresh prompts take 6, and there are 4",
            "fewer rounds",
        ),
        "a budget of 0": ({"kl_budget": 0.0}, "kl_budget is 0"),
        "a drift below 1": ({"length_drift": 0.5}, "length_drift is 0.5"),
        "no patience": ({"patience": 0}, "patience is 0"),
        "auxiliary pairs": ({"objective": "variance_reduced"}, "objective is variance_reduced"),
        "evaluation of pairs": ({"eval_strategy": "epoch"}, "judged by completions"),
        "a prompt longer than the context": ({"max_new_tokens": 250}, "row 1", "leave no room for 250 new tokens"),
        "no run folder": ({"output_dir": ""}, "output_dir is empty"),
    }
)
def test_settings_are_refused_before_anything_is_drawn(given: dict[str, Any], says: list[str], world: World) -> None:
    world.pairs()
    assert_refused(world, world.iterate(**given), says)


@table(
    {
        "no reward": ({"reward": None}, "no reward is given"),
        "no labeller": ({"label": "model"}, "label is model, with no preference model"),
        "prompts exhausted": ({"prompts_per_round": 3}, "2 rounds of 3 fresh prompts take 6"),
    }
)
def test_a_dry_run_refuses_what_the_run_would(given: dict[str, Any], says: list[str], world: World) -> None:
    world.pairs()
    assert_refused(world, [*world.iterate(**given), "--dry_run"], says)


def test_a_judge_whose_budget_is_spent_is_asked_on_under_the_same_run_name(world: World, loopback: None) -> None:
    world.pairs()
    with listening(lambda body, _: completion("VERDICT: 70")) as server:
        judge = {"base_url": server.url, "model": "j", "max_requests": 1, "tries": 1, "first_wait": 0.01}
        words = world.iterate(rounds=1, label="model", labeller={"judge": judge})
        assert_ends_in_one_line(world.run(words), "max_requests")
        asked = len(server.bodies)
        outcome = world.run(world.iterate(rounds=1, label="model", labeller={"judge": judge | {"max_requests": 1000}}))
        assert outcome.code == 0, outcome.err
        texts = [body["messages"][-1]["content"] for body in server.bodies]
    assert len(texts) > asked == 1 and len(set(texts)) == len(texts), "nothing is asked twice"


def test_options_that_are_the_runs_own_are_refused(tmp_path: Path) -> None:
    prompts, reward = LoopPrompts("prompts.jsonl"), from_function(lambda prompt, text: 0.0, "flat")
    own = IterateSettings(str(tmp_path / "run"), "model")
    for training, says in (({"beta": 0.1}, "training has beta"), ({"no_such": 1}, "no_such")):
        with pytest.raises(ConfigError, match=says):
            make_iterate(own, prompts, training, reward=reward)
    with pytest.raises(ConfigError, match="needs a reward with features"):
        make_iterate(IterateSettings("run", "model", pairing="farthest"), prompts, {}, reward=reward)
