"""Bounds of both ways to cut a pair."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyref.data import truncate_pair
from polyref.errors import ConfigError
from polyref.types import TokenizedPair

IDS = st.lists(st.integers(0, 9), min_size=1, max_size=12).map(tuple)
PAIRS = st.builds(TokenizedPair, IDS, IDS, IDS)


def longest(pair):
    return len(pair.prompt_ids) + max(map(len, pair.completions))


@given(PAIRS, st.integers(2, 30))
def test_keep_start_cuts_ends_only(pair, max_length):
    cut = truncate_pair(pair, max_length)
    if len(pair.prompt_ids) >= max_length:
        assert cut is None
        return
    assert cut is not None and cut.prompt_ids == pair.prompt_ids and longest(cut) <= max_length
    for whole, kept in zip(pair.completions, cut.completions, strict=True):
        assert kept == (pair.prompt_ids + whole)[:max_length][len(pair.prompt_ids) :] != ()
    assert (cut.chosen_cut, cut.rejected_cut) == (cut.chosen_ids != pair.chosen_ids, cut.rejected_ids != pair.rejected_ids)


@given(PAIRS, st.integers(2, 30))
def test_keep_end_cuts_the_prompt_first_and_never_wholly(pair, max_length):
    cut = truncate_pair(pair, max_length, "keep_end")
    assert cut is not None and longest(cut) == min(longest(pair), max_length)
    assert len(cut.prompt_ids) >= 1 and pair.prompt_ids[-len(cut.prompt_ids) :] == cut.prompt_ids
    if cut.chosen_cut or cut.rejected_cut:
        assert len(cut.prompt_ids) == 1
    for whole, kept in zip(pair.completions, cut.completions, strict=True):
        assert whole[: len(kept)] == kept != ()


@given(PAIRS, st.integers(2, 30), st.integers(2, 30), st.sampled_from(["keep_start", "keep_end"]))
def test_cutting_twice_is_cutting_to_the_shorter(pair, first, second, mode):
    once = truncate_pair(pair, first, mode)
    twice = once and truncate_pair(once, second, mode)
    assert twice == truncate_pair(pair, min(first, second), mode)


def test_a_pair_that_fits_is_left_alone_and_cuts_are_remembered():
    pair = TokenizedPair((1,), (2, 3), (4,), rejected_cut=True)
    assert truncate_pair(pair, 3) == pair == truncate_pair(pair, 99, "keep_end")
    assert truncate_pair(pair, 2) == TokenizedPair((1,), (2,), (4,), True, True)
    assert truncate_pair(replace(pair, chosen_ids=()), 9) is None


@pytest.mark.parametrize("max_length", [1, 0, -5, 2.0, True])
def test_a_length_that_holds_no_pair(max_length):
    with pytest.raises(ConfigError, match="max_length is .*; give at least 2 tokens"):
        truncate_pair(TokenizedPair((1,), (2,), (3,)), max_length)
