"""The checks that every reward and probability passes."""

from __future__ import annotations

import math

import pytest
import torch

from polyref.errors import DataError, InputError, ModelError
from polyref.rewards.protocols import check_probabilities, check_rewards, check_rows, rows_named


@pytest.mark.parametrize("check", [check_rewards, check_probabilities])
def test_good_values_are_float64_without_gradient(check):
    values = torch.tensor([0.0, 0.25, 1.0], requires_grad=True)
    for given in (values, [0.0, 0.25, 1.0], [0, 0.25, True]):
        checked = check(given, 3, "r")
        assert checked.dtype == torch.float64 and not checked.requires_grad and checked.tolist() == [0, 0.25, 1]
    assert check([], 0, "r").shape == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_names_its_row(bad):
    for check in (check_rewards, check_probabilities):
        with pytest.raises(ModelError, match=f"^r, row 2: gave {bad} as "):
            check([0.5, bad, bad], 3, "r")


@pytest.mark.parametrize("bad", [-1e-9, 1.5])
def test_a_probability_is_between_0_and_1_and_a_reward_need_not_be(bad):
    assert check_rewards([bad], 1, "r").tolist() == [bad]
    with pytest.raises(ModelError, match=rf"^judge, row 1: gave {bad} as probability; a probability is in \[0, 1\]$"):
        check_probabilities([bad], 1, "judge")


@pytest.mark.parametrize("values", [[1.0], [[1.0, 2.0]], 1.0, torch.ones(2, 1), [1.0, 2.0, 3.0]])
def test_other_counts_are_refused(values):
    with pytest.raises(ModelError, match=r"^r: gave shape \(.*\) for 2 rows; return one reward a row$"):
        check_rewards(values, 2, "r")


@pytest.mark.parametrize("values", [["good", "bad"], [None, 1.0], "text", [10**400, 1]])
def test_what_is_no_number_is_one_line(values):
    with pytest.raises(ModelError, match="^r: gave no numbers: ") as error:
        check_rewards(values, 2, "r")
    assert "\n" not in str(error.value)


def test_counts_of_texts_agree():
    assert check_rows("g", ["x", "x"], ["a", "b"], ["b", "a"]) == 2
    with pytest.raises(InputError, match="^g: 1 completions for 2 prompts; give one completion a prompt$"):
        check_rows("g", ["x", "x"], ["a", "b"], ["b"])


def test_rows_of_a_part_are_named_as_those_of_the_whole():
    places = ["a.jsonl, row 7", "a.jsonl, row 9"]
    with pytest.raises(ModelError, match="^r, a.jsonl, row 9: gave nan as reward; a reward"), rows_named(places):
        check_rewards([0.5, math.nan], 2, "r")
    for where in ("r, row 3", "r", "b.jsonl, row 1, column chosen", None):
        with pytest.raises(DataError) as error, rows_named(places):
            raise DataError("is wrong", where=where, fix="mend it")
        assert error.value.where == where
