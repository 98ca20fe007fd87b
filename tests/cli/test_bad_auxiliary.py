"""What `polyref auxiliary` refuses: one line, exit code 2, and a folder that can be used again."""

from __future__ import annotations

import json
from typing import Any

from cli_world import World, assert_ends_in_one_line, assert_refused, some_rows, table
from fakes import byte_tokenizer, saved_llama


@table(
    {
        "no preference model": ({"reward": None}, "the preference model is not given", "give one of cross_encoder"),
        "two of them": ({"votes": "votes.jsonl"}, "the preference model is reward and votes", "give one of"),
        "no sampling policy": ({"sampling_policy": None}, "there is no sampling_policy", "drawn from"),
        "a judge without an address": ({"reward": None, "judge": {"model": "j"}}, "judge", "base_url", "--judge.help"),
        "a judge without its key": (
            {"reward": None, "judge": {"base_url": "http://127.0.0.1:9/v1", "model": "j", "key_variable": "NO_SUCH_KEY"}},
            "NO_SUCH_KEY",
        ),
        "fewer prompts than folds": (
            {"reward": None, "cross_encoder": {"model": "MODEL", "folds": 7}},
            "6 prompts cannot be split into 7 folds",
            "fewer folds",
        ),
        "a temperature of 0": ({"reward": {"model": "rule:length", "temperature": 0}}, "temperature of rule:length is 0"),
        "an ensemble of none": ({"reward": None, "ensemble": []}, "the ensemble has no member", "at least one"),
        "a rule with settings of a model": (
            {"reward": {"model": "rule:length", "max_length": 9}},
            "max_length has no effect on rule:length",
            "leave it out",
        ),
        "no such rule": ({"reward": {"model": "rule:beauty"}}, "there is no rule 'rule:beauty'", "choose one of"),
        "no such reward model": ({"reward": {"model": "./absent"}}, "no such folder"),
        "no such sampling policy": ({"sampling_policy": {"members": [{"model": "./absent"}]}}, "no such folder"),
        "a policy that never ends": (
            {"max_new_tokens": 1, "limit": 1, "pairs": 1},
            "completions ended within 1 tokens",
            "raise",
        ),
        "a policy of one completion": ({"top_p": 1e-6, "redraws": 1}, "prompts still lack a pair of different completions"),
        "a geometric mixture": (
            {"sampling_policy": {"members": [{"model": "MODEL"}, {"model": "MODEL", "system_prompt": "be brief"}]}},
            "geometric composition is no mixture",
            "arithmetic",
        ),
        "a member for each pair, of one": ({"member_per": "pair"}, "no effect with a sampling_policy of one member", "leave"),
        "no pairs to draw": ({"pairs": 0}, "pairs is 0", "at least 1"),
        "a negative seed": ({"seed": -1}, "seed is -1"),
        "negative redraws": ({"redraws": -1}, "redraws is -1"),
        "a file of no known kind": ({"file_name": "pairs.csv"}, "the kind of file is not known", ".jsonl"),
        "a file elsewhere": ({"file_name": "../pairs.jsonl"}, "file_name is ../pairs.jsonl", "run folder"),
        "no run folder": ({"output_dir": ""}, "output_dir is empty", "name the run folder"),
        "prompts too long": ({"max_new_tokens": 250}, "row 1: 12 prompts leave no room for 250 new tokens", "leave_out"),
    }
)
def test_what_is_wrong_is_said_in_one_line(given: dict[str, Any], says: tuple[str, ...], world: World) -> None:
    world.pairs()
    given = json.loads(json.dumps(given).replace('"MODEL"', json.dumps(str(world.model))))
    outcome = world.run(world.auxiliary(**{"prompts_at_once": 32} | given))
    assert_ends_in_one_line(outcome, *says)
    assert not (world.path / "auxiliary").exists() or not list((world.path / "auxiliary").iterdir())


def test_settings_of_a_fit_are_refused_before_anything_is_drawn(world: World) -> None:
    for name, value in (("epochs", 0), ("learning_rate", -1.0), ("batch_size", 0)):
        words = world.auxiliary(reward=None, cross_encoder={"model": str(world.model), "folds": 2, name: value})
        assert_refused(world, words, [f"{name} {value}", "learning_rate is above 0"])


def test_a_margin_is_refused_before_anything_is_drawn(world: World) -> None:
    world.pairs(*(row | {"margin": 0.5} for row in some_rows(2)))
    assert_refused(world, world.auxiliary(), ["row 1, column margin: has no counterpart for auxiliary pairs", "leave"])


def test_long_prompts_may_be_left_out(world: World) -> None:
    world.pairs(*some_rows(), {"prompt": "x" * 230, "chosen": "a", "rejected": "b"})
    assert_refused(world, world.auxiliary(), ["row 13: 1 prompts leave no room for 40 new tokens", "leave_out"])
    assert world.run(world.auxiliary(leave_out=True)).code == 0
    summary = json.loads((world.path / "auxiliary" / "summary.json").read_text())
    assert summary["left_out"] == {"prompt too long": 1, "no verdict": 0}


def test_what_stands_there_already_is_not_written_over(world: World) -> None:
    world.pairs()
    (world.path / "auxiliary").mkdir()
    world.file("auxiliary/pairs.jsonl", "mine")
    assert_refused(world, world.auxiliary(), ["pairs.jsonl: is there already", "name another file_name or output_dir"])


def test_a_run_refuses_other_settings_and_a_complete_one_other_inputs(world: World) -> None:
    sampler = saved_llama(world.path / "sampler", byte_tokenizer(), seed=5)
    words = {"sampling_policy": {"members": [{"model": str(sampler)}]}, "max_new_tokens": 60}
    outcome = world.run(world.auxiliary(**words))
    assert outcome.code == 0, outcome.err
    assert_refused(world, world.auxiliary(**words, pairs=3), ["another configuration: pairs 2 -> 3", "name a new run folder"])
    saved_llama(world.path / "sampler", byte_tokenizer(), seed=6)
    assert_refused(world, world.auxiliary(**words), ["changed since: weights of sampling policy 1", "name a new run folder"])
