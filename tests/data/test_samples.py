"""Samples files read, grouped and tokenised: weights, ends, cuts, and what is refused in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fakes import byte_tokenizer
from polyref.data.records import parse_record
from polyref.data.sample_tokens import tokenize_samples
from polyref.data.samples import load_samples, sample_row, split_prompts
from polyref.data.tokenize import tokenize_record
from polyref.errors import ConfigError, DataError

CHAT = {
    "prompt": [{"role": "user", "content": "why?"}],
    "completion": [{"role": "assistant", "content": "so"}],
}


def test_rows_are_read_as_they_are_written(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": " b", "log_weight": -0.5, "ended": True, "reward": 1.0},
        {"prompt": "a", "completion": "", "log_weight": 2.0},
        CHAT | {"log_weight": 0, "ended": False},
    ]
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = load_samples(file)
    assert [(s.log_weight, s.ended, s.row) for s in samples] == [(-0.5, True, 1), (2.0, True, 2), (0.0, False, 3)]
    assert load_samples([sample_row(sample) for sample in samples])[2].completion == tuple(CHAT["completion"])
    weights = load_samples([{"prompt": "a", "completion": "b", "weight": w} for w in (0, 0.5)])
    assert [s.log_weight for s in weights] == [-math.inf, math.log(0.5)]
    assert [sample_row(s)["log_weight"] for s in weights] == [None, math.log(0.5)]
    (named,) = load_samples([{"q": "a", "a": "b"}], columns={"prompt": "q", "completion": "a"}, prompt_format="chat")
    assert named.prompt == ({"role": "user", "content": "a"},) and named.completion[0]["role"] == "assistant"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "there are no rows"),
        ([{"prompt": "a", "chosen": "b"}], "row 1, column completion: is missing (the row has prompt, chosen)"),
        ([3], "row 1: is a number, not an object"),
        ([{"prompt": " ", "completion": "b"}], "column prompt: is empty"),
        ([{"prompt": "a", "completion": 3}], "column completion: is a number"),
        ([{"prompt": "a", "completion": CHAT["completion"]}], "column completion: is not of one kind with prompt"),
        ([CHAT | {"completion": CHAT["prompt"]}], "column completion: has the roles user"),
        ([{"prompt": "a", "completion": "", "ended": False}], "column completion: is empty, and has not ended"),
        ([{"prompt": "a", "completion": "b", "ended": 1}], "column ended: is a number, not true or false"),
        ([{"prompt": "a", "completion": "b", "log_weight": None}], "column log_weight: is null"),
        ([{"prompt": "a", "completion": "b", "log_weight": math.nan}], "column log_weight: is nan, not a finite number"),
        ([{"prompt": "a", "completion": "b", "weight": -1}], "column weight: is -1, and weights are at least 0"),
        ([{"prompt": "a", "completion": "b", "weight": 1, "log_weight": 0}], "column weight: is there beside log_weight"),
        (
            [{"prompt": "a", "completion": "b", "weight": 1}, {"prompt": "a", "completion": "b"}],
            "row 2, column weight: is missing, and row 1 has it",
        ),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "log_weight": 1}],
            "row 2, column log_weight: is there, and row 1 lacks it",
        ),
        (
            [{"prompt": p, "completion": "b", "weight": w} for p, w in (("a", 1), ("b", 0), ("b", 0))],
            "row 2: all samples of its prompt have weight 0",
        ),
    ],
)
def test_a_bad_row_is_named_in_one_line(rows: list[Any], says: str) -> None:
    with pytest.raises(DataError) as error:
        load_samples(rows)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_columns_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="columns maps 'chosen'"):
        load_samples([{"prompt": "a", "completion": "b"}], columns={"chosen": "x"})


@pytest.mark.parametrize("chat", [False, True])
def test_ended_completions_have_the_tokens_of_pairs_and_cut_ones_lack_the_end(
    tiny_tokenizer: PreTrainedTokenizerFast, chat: bool
) -> None:
    rows = [{"prompt": "why?", "completion": text, "ended": ended} for text in (" yes", " no no") for ended in (True, False)]
    (prompt,) = tokenize_samples(load_samples(rows, prompt_format="chat" if chat else "as_is"), tiny_tokenizer)
    row = {"prompt": "why?", "chosen": " yes", "rejected": " no no"}
    if chat:
        row = {"prompt": [{"role": "user", "content": "why?"}]} | {
            name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")
        }
    pair = tokenize_record(parse_record(row, source="memory", row_number=1), tiny_tokenizer)
    assert prompt.prompt_ids == pair.prompt_ids and prompt.cuts == (False, True, False, True)
    assert prompt.completions[::2] == pair.completions
    assert prompt.completions[1::2] == tuple(ids[:-1] for ids in pair.completions), "an atom without the end factor"


def test_weights_become_shares_of_their_prompt_and_weightless_samples_are_left_out(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [{"prompt": "a", "completion": f" {i}", "log_weight": 900.0 + math.log(i + 1)} for i in range(3)]
    rows += [{"prompt": "b", "completion": " x", "log_weight": -900.0}]
    first, second = tokenize_samples(load_samples(rows), tiny_tokenizer)
    assert first.shares == pytest.approx([1 / 6, 2 / 6, 3 / 6]) and second.shares == (1.0,)
    (only,) = tokenize_samples(
        load_samples([{"prompt": "a", "completion": f" {i}", "weight": w} for i, w in enumerate((0, 2, 2))]), tiny_tokenizer
    )
    assert only.shares == (0.5, 0.5) and [record.row for record in only.records] == [2, 3]


def test_a_longest_length_cuts_completions_then_leaves_prompts_out(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "0123", "completion": text} for text in ("abcdef", "a")] + [{"prompt": "0123456789", "completion": "a"}]
    samples = load_samples(rows)
    (prompt,) = tokenize_samples(samples, tiny_tokenizer, max_length=8)
    assert [len(ids) for ids in prompt.completions] == [3, 2] and prompt.cuts == (True, False)
    ends = tokenize_samples(samples, tiny_tokenizer, max_length=8, truncation_mode="keep_end")
    assert [(len(p.prompt_ids), len(p.completions[0])) for p in ends] == [(1, 7), (6, 2)]


def test_what_has_no_token_is_refused() -> None:
    samples = load_samples([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}])
    with pytest.raises(DataError, match="row 2, column completion: holds no token"):
        tokenize_samples(samples, byte_tokenizer(eos=False))


def test_half_a_character_at_the_end_of_a_cut_completion_is_left_out(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "a", "completion": text, "ended": False} for text in ("b\ufffd", "b")]
    (prompt,) = tokenize_samples(load_samples(rows), tiny_tokenizer)
    assert prompt.completions[0] == prompt.completions[1]


def test_held_out_prompts_go_with_all_their_samples() -> None:
    samples = load_samples([{"prompt": f"q{i % 5}", "completion": f"{i}"} for i in range(15)])
    for amount, count in ((2, 2), (0.4, 2)):
        train, held_out = split_prompts(samples, amount, seed=0)
        assert len(held_out) == 3 * count and len(train) == 15 - len(held_out)
        assert not {s.prompt for s in train} & {s.prompt for s in held_out}
    assert split_prompts(samples[::-1], 2, seed=0)[1] == split_prompts(samples, 2, seed=0)[1][::-1]
    for amount in (5, 0.01, 1.5, -1):
        with pytest.raises(ConfigError, match=f"held_out is {amount:g} of 5 prompts"):
            split_prompts(samples, amount, seed=0)
