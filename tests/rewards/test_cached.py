"""Rewards through the cache: nothing is scored twice, by nobody, and nothing stale comes back."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyref.errors import ConfigError, DataError, InputError, ModelError
from polyref.rewards.cached import RewardKey, cached, text_key
from polyref.rewards.exact_answer import exact_answer
from polyref.rewards.functions import NamedReward, from_function, plain_text
from polyref.rewards.rules import length, matches
from polyref.scoring.cache import LogProbCache, ScorerKey, row_key
from polyref.types import Message, Text

TURN: tuple[Message, ...] = ({"role": "assistant", "content": "a"},)
TEXTS = st.text(max_size=4) | st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=2)}),
    min_size=1,
    max_size=2,
).map(tuple)

SLOW = """
    import os, sys, time
    from polyref.rewards.cached import cached
    from polyref.rewards.functions import from_function

    def slow(_, completion):
        time.sleep(0.01)
        print(completion, flush=True)
        return int(completion) / 3

    reward = cached(from_function(slow, "slow", "slow 1"), sys.argv[1], rows_at_once=5)
    writer = reward._cache.writer
    reward._cache.writer = lambda key: writer(key, flush_rows=5)
    reward(["x"] * 200, [str(i) for i in range(200)])
"""


class Counting:
    """The length of a completion plus 0.1, and a list of all that was asked."""

    name, fingerprint = "counting", "counting 1"

    def __init__(self) -> None:
        self.calls: list[list[Text]] = []

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> torch.Tensor:
        self.calls.append(list(completions))
        return torch.tensor([len(plain_text(y)) + 0.1 for y in completions], dtype=torch.float64)


def test_a_cached_reward_is_the_reward(tmp_path: Path):
    prompts, completions = ["x", "x", "y", "x", "x"], ["a", "bb", "a", "a", TURN]
    plain, told = Counting(), []
    reward = cached(Counting(), tmp_path, rows_at_once=3, progress=lambda *step: told.append(step))
    assert reward.name == "counting" and reward.fingerprint == "counting 1"
    for _ in range(2):
        assert torch.equal(reward(prompts, completions), plain(prompts, completions))
    assert reward.reward.calls == [["a", "bb", "a"], [TURN]]  # type: ignore[attr-defined]
    assert (reward.hits, reward.misses) == (4, 4) and told == [("counting", 3, 4), ("counting", 4, 4)]
    assert reward([], []).shape == (0,)


def test_another_run_scores_only_what_is_new_and_writes_only_then(tmp_path: Path):
    cached(Counting(), tmp_path)(["x", "x"], ["a", "b"])
    before = sorted(path.name for path in tmp_path.rglob("part-*"))
    again = Counting()
    assert cached(again, tmp_path)(["x", "x"], ["b", "a"]).tolist() == [1.1, 1.1]
    assert again.calls == [] and sorted(path.name for path in tmp_path.rglob("part-*")) == before
    cached(again, tmp_path)(["x", "x", "z"], ["b", "ccc", "b"])
    assert again.calls == [["ccc", "b"]]


def test_another_reward_finds_nothing(tmp_path: Path):
    for reward in (length(), length("characters"), length(target=2), matches("a"), matches("b")):
        through = cached(reward, tmp_path)
        assert torch.equal(through(["x"], ["a b c"]), reward(["x"], ["a b c"])) and through.misses == 1
    assert cached(length(), tmp_path, fingerprint="mine")(["x"], ["a"]).tolist() == [1]
    assert len(list(tmp_path.iterdir())) == 6


def test_a_function_needs_a_fingerprint(tmp_path: Path):
    unknown = from_function(lambda *_: 0.0, "f")
    with pytest.raises(ConfigError, match="^f: has no fingerprint to keep its values under; give one that changes whenever"):
        cached(unknown, tmp_path)
    assert cached(unknown, tmp_path, fingerprint="f 1")(["x"], ["a"]).tolist() == [0]
    with pytest.raises(ConfigError, match="rows_at_once is 0"):
        cached(length(), tmp_path, rows_at_once=0)


@given(TEXTS, TEXTS, TEXTS, TEXTS)
def test_texts_are_told_apart(a: Text, b: Text, c: Text, d: Text):
    assert (text_key(a, b) == text_key(c, d)) == ((a, b) == (c, d))


def test_the_layout_on_disk_is_pinned():
    """A change of either value abandons every cache in the world: raise the layout number and say so in the changelog."""
    assert RewardKey("abc").digest == "c3c80148ee0daea554a2eea8931e851a"
    assert text_key("a", TURN).hex() == "b63f66aff1b33bb7975aa411c0de756f"


def test_log_probabilities_and_rewards_share_a_folder(tmp_path: Path):
    import pyarrow.parquet as pq

    with LogProbCache(tmp_path).writer(ScorerKey("abc")) as writer:
        writer.add([row_key((1,), (2,))], [-1.0], [1])
    cached(length(), tmp_path)(["x"], ["a"])
    schemas = {tuple((f.name, str(f.type)) for f in pq.read_schema(path)) for path in tmp_path.rglob("part-*")}
    key = ("key", "fixed_size_binary[16]")
    assert schemas == {(key, ("logp", "double"), ("tokens", "int32")), (key, ("reward", "double"))}


def test_values_come_back_to_the_last_bit(tmp_path: Path):
    values = [-1 / 3, 1e-300, 1e300, -0.0]
    reward = NamedReward("r", lambda *_: values, "r 1")
    for _ in range(2):
        found = cached(reward, tmp_path)(["x"] * 4, list("abcd")).tolist()
        assert [value.hex() for value in found] == [value.hex() for value in values]


def test_what_was_scored_before_an_error_is_kept_and_the_row_is_named(tmp_path: Path):
    bad = from_function(lambda _, y: math.nan if y == "bad" else 1.0, "r", "r 1")
    prompts, completions = ["x"] * 5, ["a", "a", "b", "c", "bad"]
    with pytest.raises(ModelError, match="^r, row 5: gave nan as reward; a reward is a finite number$"):
        cached(bad, tmp_path, rows_at_once=2)(prompts, completions)
    kept = cached(bad, tmp_path)
    assert kept(prompts[:3], completions[:3]).tolist() == [1, 1, 1] and kept.misses == 0
    answers = cached(exact_answer([{"prompt": "x", "answer": 1}]), tmp_path)
    with pytest.raises(DataError, match="^exact_answer, row 3: the answer to this prompt is not known"):
        answers(["x", "x", "y"], ["1", "1", "1"])
    with pytest.raises(InputError, match="^r: 1 completions for 2 prompts"):
        kept(["x", "x"], ["a"])


def test_a_killed_scoring_goes_on_to_the_same_bytes(tmp_path: Path):
    command = [sys.executable, "-c", textwrap.dedent(SLOW), str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(22):
            process.stdout.readline()
        process.kill()
    assert process.returncode == -signal.SIGKILL
    asked: list[Text] = []
    again = from_function(lambda _, y: asked.append(y) or int(plain_text(y)) / 3, "slow", "slow 1")
    completions = [str(i) for i in range(200)]
    for folder in ("killed", "whole"):
        found = cached(again, tmp_path / folder)(["x"] * 200, completions)
        assert found.tolist() == [i / 3 for i in range(200)]
    assert asked[:-200] == completions[200 - len(asked[:-200]) :] and len(asked[:-200]) <= 180
    kept, whole = ({path.read_bytes() for path in (tmp_path / f).rglob("part-*")} for f in ("killed", "whole"))
    assert kept == whole and len(kept) == 1
