"""Rules as rewards: lengths, patterns, sentiment, verified answers, and what they refuse."""

from __future__ import annotations

import json
import math
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyref.data.sources import read_rows
from polyref.errors import ConfigError, DataError, InputError, ModelError
from polyref.rewards.exact_answer import exact_answer, final_number
from polyref.rewards.functions import from_function
from polyref.rewards.rules import RULES, length, matches, rule, sentiment
from polyref.types import Message

TURN: tuple[Message, ...] = ({"role": "assistant", "content": "two words"},)
QUESTIONS = [{"prompt": "How many?", "answer": "1080"}, {"prompt": "And now?", "answer": -2.5}]


def test_a_function_of_one_row_is_a_reward():
    reward = from_function(lambda prompt, completion: len(prompt) - len(completion), "difference")
    values = reward(["abc", "x", TURN], ["a", "yyy", TURN])
    assert reward.name == "difference" and reward.fingerprint is None
    assert values.dtype == torch.float64 and values.tolist() == [2, -2, 0]
    assert reward([], []).shape == (0,)


def test_what_a_function_returns_is_checked():
    with pytest.raises(ModelError, match="^bad, row 2: gave nan as reward"):
        from_function(lambda _, y: {"a": 0.0}.get(y, math.nan), "bad")(["x", "x"], ["a", "b"])
    with pytest.raises(ModelError, match="^none: gave no numbers"):
        from_function(lambda *_: None, "none")(["x"], ["a"])  # type: ignore[arg-type, return-value]
    with pytest.raises(InputError, match="^r: 1 completions for 2 prompts"):
        from_function(lambda *_: 0.0, "r")(["x", "x"], ["a"])


def test_length_in_every_unit(tiny_tokenizer):
    completions = ["", " one  two\nthree ", TURN]
    for unit, expected in (("characters", [0, 16, 9]), ("words", [0, 3, 2]), ("tokens", [0, 16, 9])):
        assert length(unit, tokenizer=tiny_tokenizer)(["x"] * 3, completions).tolist() == expected
    assert length("words", target=2.5)(["x"] * 3, completions).tolist() == [-2.5, -0.5, -0.5]
    names = {reward.fingerprint for reward in (length(), length("characters"), length(target=3), length(target=4.5))}
    assert len(names) == 4 and length().fingerprint == length("words").fingerprint


def test_length_refuses_what_it_cannot_count():
    for arguments, message in (
        ({"unit": "tokens"}, "length in 'tokens'; give a tokenizer"),
        ({"unit": "pages"}, "length in 'pages'; choose characters, words or tokens"),
        ({"target": math.nan}, "target is nan; give a length of at least 0"),
        ({"target": -1}, "target is -1; give a length of at least 0"),
    ):
        with pytest.raises(ConfigError) as error:
            length(**arguments)
        assert str(error.value) == f"rule:length: {message}"


def test_matches_searches_the_text():
    reward = matches(r"(?i)\btwo\b")
    assert reward(["x"] * 4, ["Two.", "twofold", "", TURN]).tolist() == [1, 0, 0, 1]
    with pytest.raises(ConfigError, match=r"^rule:matches: '\(' is no regular expression \(.*\); mend it$"):
        matches("(")


def test_sentiment_is_signed_by_the_lexicon():
    good, bad, none, empty = sentiment()(["x"] * 4, ["I love this, it is great!", "A horrible, sad day.", "a table", ""])
    assert -1 <= bad < -0.3 < none == empty == 0 < 0.3 < good <= 1
    assert sentiment()(["x"], [TURN]).shape == (1,)


def test_sentiment_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ModelError) as error:
        rule("rule:sentiment")
    assert str(error.value) == "rule:sentiment: needs the package vaderSentiment; pip install 'polyref[sentiment]'"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("He has 7.\n#### 1,080", "1080"),
        ("16 - 3 = 13.", "13"),
        ("16-3", "3"),
        ("It costs -$1,080.50!", "-1080.50"),
        ("$-5", "-5"),
        ("(\u22124)", "-4"),
        ("**109,200,000** people", "109200000"),
        ("1,00,000 rupees", "100000"),
        ("1, 2, 3", "3"),
        ("\\boxed{18}", "18"),
        ("A: .5%", "0.5"),
        ("about 2e5", "200000"),
        ("is...18", "18"),
        ("答えは18です", "18"),
        ("#### 5\n#### 7 of 9\nQuestion: 12", "9"),
        ("1\n####\nso\n3 and 4\n5", "4"),
        ("$5.00", "5"),
        ("It is 5.", "5"),
        ("-3", "-3"),
        ("\u22123 000", "-3000"),
        ("3%", "3"),
        ("1 000 and 1\u00a0000.5 and 1\u202f000\u202f000", "1000000"),
        ("2020 300", "300"),
        ("12 345 678", "12345678"),
        ("1/2", "1/2"),
        ("-$10/4 each", "-5/2"),
        ("1.5/2", "3/4"),
        ("1 3/4 cups", "7/4"),
        ("4 10/2", "5"),
        ("1 000/3", "1000/3"),
        ("1/2 of 3", "3"),
        ("x/2", "2"),
        ("on 1/2/2025", "2025"),
        ("3/0", None),
        ("5\n#### ", None),
        ("5\n####\n", None),
        ("#### 5\n#### ", None),
        ("9" * 1001, None),
        ("v1.5, x2 and H2O", None),
        ("3 it is\n#### none", None),
        ("", None),
    ],
)
def test_the_final_number_of_a_text(text: str, number: str | None):
    assert final_number(text) == (None if number is None else Fraction(number))


@given(st.integers(-(10**15), 10**15), st.integers(0, 4))
def test_a_number_is_read_however_it_is_written(units: int, places: int):
    value = Decimal(units).scaleb(-places)
    for shown in (f"{value:f}", f"{value:,f}"):
        assert final_number(f"The 3 answers:\n#### {shown}\n") == value
        assert final_number(f"After 12 days it is {shown}.") == value


@pytest.mark.parametrize(
    "text",
    ["22," * 20_000 + "x", "1" * 200_000, "-" * 100_000, "1e" * 50_000, "####" * 50_000, "100 " * 50_000, "1 1/" * 50_000],
)
def test_long_hostile_text_is_read_in_linear_time(text: str):
    final_number(text)  # what backtracks here would take minutes


def test_exact_answer_compares_by_value(tmp_path: Path):
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    asked = ({"role": "system", "content": "Be brief. 3"}, {"role": "user", "content": " How many?\n"})
    prompts = ["How many?", "How many?", asked, "And now?", "And now?", "And now?"]
    completions = ["#### 1,080.0", "#### 1,081", TURN, "so -2.50", "2.5", ""]
    for reward in (exact_answer(QUESTIONS), rule(f"rule:exact_answer:{file}")):
        assert reward(prompts, completions).tolist() == [1, 0, 0, 1, 0, 0]
    assert exact_answer(QUESTIONS).fingerprint == rule(f"rule:exact_answer:{file}").fingerprint
    assert exact_answer(QUESTIONS[:1]).fingerprint != exact_answer(QUESTIONS).fingerprint


def test_exact_answer_refuses_what_is_not_known():
    with pytest.raises(DataError) as error:
        exact_answer(QUESTIONS)(["How many?", "What else?"], ["1", "1"])
    assert str(error.value) == "exact_answer, row 2: the answer to this prompt is not known; give its answer in memory"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, "column answer: is missing; map it to the column that holds it"),
        ({"answer": "3"}, "column prompt: is missing; map it to the column that holds it"),
        ({"prompt": 3, "answer": "3"}, "column prompt: is a number; give text, or a list of"),
        ({"prompt": "x", "answer": "three"}, "column answer: holds no number; give a number, or text that ends in one"),
        ({"prompt": "How many?", "answer": 3}, "answers 3, a row before it 1080; keep one of the rows"),
        ("text", "column prompt: is missing"),
    ],
)
def test_exact_answer_names_the_row_it_cannot_use(row: object, message: str):
    with pytest.raises(DataError) as error:
        exact_answer([*QUESTIONS, row])
    assert message in str(error.value) and str(error.value).startswith("memory, row 3") and "\n" not in str(error.value)


def test_exact_answer_of_no_rows_or_no_file(tmp_path: Path):
    with pytest.raises(DataError, match="^memory: holds no row"):
        exact_answer([])
    with pytest.raises(DataError, match="there is no such file"):
        rule(f"rule:exact_answer:{tmp_path / 'none.jsonl'}")
    (tmp_path / "torn.jsonl").write_text('{"prompt": ')
    with pytest.raises(DataError, match="torn.jsonl, row 1.*is not JSON"):
        exact_answer(tmp_path / "torn.jsonl")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("length", "there is no rule 'length'; choose one of rule:exact_answer, rule:length, rule:matches, rule:sentiment"),
        ("rule:none", "there is no rule 'rule:none'; choose one of "),
        ("rule:matches", "missing a required argument: 'pattern'; the rule matches takes pattern"),
        ("rule:sentiment:now", "too many positional arguments; the rule sentiment takes nothing"),
    ],
)
def test_a_rule_that_does_not_exist_is_one_line(spec: str, message: str):
    with pytest.raises(ConfigError) as error:
        rule(spec)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_rules_by_name():
    assert set(RULES) == {"exact_answer", "length", "matches", "sentiment"}
    assert rule("rule:length")(["x"], ["a b"]).tolist() == [2]
    assert rule("rule:length:characters", target=1)(["x"], ["a b"]).tolist() == [-2]
    assert rule("rule:matches:^a: b$")(["x"], ["a: b"]).tolist() == [1]


def test_every_gsm8k_solution_earns_its_answer(shared_data: Path):
    for name in ("train", "test"):
        file = shared_data / "gsm8k" / f"{name}.jsonl.gz"
        rows = [row.value for row in read_rows(file)]
        reward = exact_answer(file)
        prompts = [row["prompt"] for row in rows]
        assert [final_number(row["answer"]) for row in rows] == [Fraction(row["answer"]) for row in rows]
        assert reward(prompts, [row["solution"] for row in rows]).sum() == len(rows) > 1000
        plain = [row["solution"].replace("####", "The answer is") + "." for row in rows]
        assert reward(prompts, plain).sum() == len(rows)
        other = reward(prompts, [row["solution"] for row in rows[1:] + rows[:1]])
        assert other.mean() < 0.05
        assert exact_answer(file, columns={"answer": "solution"})(prompts, plain).sum() == len(rows)


def test_gsm8k_pairs_are_told_apart(shared_data: Path):
    """Solutions of real models, marked by the data's authors; they end in A: N."""
    rows = [row.value for row in read_rows(shared_data / "gsm8k-pairs" / "pairs.jsonl.gz")]
    reward, prompts = exact_answer(rows), [row["prompt"] for row in rows]
    right, wrong = (reward(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected"))
    assert right.mean() > 0.99 and wrong.mean() < 0.01
