"""Pairs from scored completions: which, in what order, with what label; and what gives none."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from polyref.errors import ConfigError, DataError
from polyref.samplers.pairing import PAIRINGS, best_random, best_second, best_worst, closest, farthest, uncertain, uniform
from polyref.samplers.pairs import Scored, make_pairs
from polyref.types import PreferenceRecord, Text

FOUR = Scored("x", "abcd", (1.0, 4.0, 3.0, -0.5), (0.1, 0.2, 0.3, 0.4), source="file", row=7)


@dataclass
class Lengths:
    """P(first preferred) by length of text."""

    name: str = "lengths"

    def __call__(self, prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text]) -> torch.Tensor:
        return torch.tensor([0.5 + (len(a) - len(b)) / 10 for a, b in zip(first, second, strict=True)])


def texts(record: PreferenceRecord) -> str:
    return f"{record.chosen}{record.rejected}"


def test_each_pairing_takes_the_two_it_names() -> None:
    for pairing, expected in ((best_worst, "bd"), (best_second, "bc"), (closest, "bc")):
        (record,) = make_pairs([FOUR], pairing, seed=0).records
        assert texts(record) == expected
        assert record == PreferenceRecord("x", expected[0], expected[1], source="file", row=7)
    assert [texts(r) for r in make_pairs([FOUR], best_worst, seed=0, pairs=3).records] == ["bd", "cd", "ba"]
    assert [texts(r) for r in make_pairs([FOUR], closest, seed=0, min_margin=1.6).records] == ["ca"]


def test_the_two_of_a_pair_keep_whether_they_ended() -> None:
    some = replace(FOUR, ended=(True, True, True, False))
    (hard,) = make_pairs([some], best_worst, seed=0).records
    assert (hard.chosen, hard.chosen_ended, hard.rejected, hard.rejected_ended) == ("b", True, "d", False)
    turning = replace(some, completions=("a", "b", "c", "dd"))
    (soft,) = make_pairs([turning], best_worst, seed=0, preference=Lengths()).records
    assert (soft.chosen, soft.chosen_ended, soft.rejected, soft.rejected_ended) == ("dd", False, "b", True)


def check_shares(pairing: str, scored: Scored, shares: dict[str, float], n: int = 2000) -> None:
    counts = Counter(texts(record) for record in make_pairs([scored] * n, PAIRINGS[pairing], seed=1).records)
    assert counts.keys() == shares.keys()
    total = sum(shares.values())
    assert chisquare([counts[pair] for pair in shares], [n * share / total for share in shares.values()]).pvalue > 0.001


def test_random_pairings_have_the_law_they_name() -> None:
    check_shares("best_random", FOUR, {"ba": 1, "bc": 1, "bd": 1})
    check_shares("random", FOUR, dict.fromkeys(("ba", "ca", "ad", "bc", "bd", "cd"), 1))
    variances = dict(zip("abcd", (0.01, 0.04, 0.09, 0.16), strict=True))
    pairs = ("ba", "ca", "ad", "bc", "bd", "cd")
    check_shares("uncertain", FOUR, {pair: variances[pair[0]] + variances[pair[1]] for pair in pairs})
    known = replace(FOUR, stds=(0.0, 0.0, 0.0, 1e-200))
    check_shares("uncertain", known, dict.fromkeys(("ad", "bd", "cd"), 1), n=300)


def test_equal_texts_are_never_a_pair_nor_is_a_pair_of_texts_taken_twice() -> None:
    twins = Scored("x", ("a", "b", "b", "c"), (0.0, 2.0, 1.9, 1.0))
    (record,) = make_pairs([twins], best_second, seed=0).records
    assert texts(record) == "bc"
    assert sorted(texts(r) for r in make_pairs([twins], uniform, seed=0, pairs=9).records) == ["ba", "bc", "ca"]
    same = Scored("y", ("a", "a"), (0.0, 1.0))
    found = make_pairs([same, twins, Scored("z", ("a",), (0.0,)), Scored("w", (), ())], best_worst, seed=0)
    assert found.without == [0, 2, 3] and len(found.records) == 1


def test_ties_are_soft_labels_unless_a_margin_is_asked_for() -> None:
    tied = Scored("x", ("a", "b"), (1.0, 1.0))
    close = Scored("y", ("a", "b"), (1.0, 1.1))
    found = make_pairs([tied, close], best_worst, seed=0)
    assert found.ties == 1 and [r.chosen_probability for r in found.records] == [0.5, None]
    found = make_pairs([tied, close], best_worst, seed=0, tie_within=0.2)
    assert found.ties == 2 and [r.chosen_probability for r in found.records] == [0.5, 0.5]
    assert make_pairs([tied, close], best_worst, seed=0, min_margin=0.05).without == [0]


def test_a_preference_model_labels_and_orders() -> None:
    scored = [Scored("x", ("aaa", "b"), (0.0, 1.0)), Scored("y", ("a", "bb"), (0.0, 1.0)), Scored("z", "ab", (0.0, 1.0))]
    records = make_pairs(scored, best_worst, seed=0, preference=Lengths()).records
    assert [(r.chosen, r.rejected, round(r.chosen_probability or 0, 6)) for r in records] == [
        ("aaa", "b", 0.7),
        ("bb", "a", 0.6),
        ("b", "a", 0.5),
    ]


SCORED = st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(-1e6, 1e6), st.floats(0, 1e3)), min_size=2, max_size=8).map(
    lambda rows: Scored("x", *zip(*rows, strict=True))
)


@settings(max_examples=60, deadline=None)
@given(SCORED, st.sampled_from(sorted(PAIRINGS)), st.integers(1, 5), st.floats(0, 10), st.integers(0, 100))
def test_whatever_the_pairing_its_pairs_are_what_the_contract_says(
    scored: Scored, name: str, pairs: int, min_margin: float, seed: int
) -> None:
    try:
        found = make_pairs([scored], PAIRINGS[name], seed=seed, pairs=pairs, min_margin=min_margin)
    except DataError:
        values = list(zip(scored.completions, scored.rewards, scored.stds or (), strict=True))
        some = [(a, b) for a in values for b in values if a[0] != b[0] and a[1] - b[1] >= min_margin]
        assert all(name == "uncertain" and a[2] == b[2] == 0 for a, b in some)
        return
    assert 1 <= len(found.records) <= pairs and found.without == []
    assert len({frozenset((r.chosen, r.rejected)) for r in found.records}) == len(found.records)
    for record in found.records:
        assert record.chosen != record.rejected
        best, worst = (
            [r for t, r in zip(scored.completions, scored.rewards, strict=True) if t == text]
            for text in (record.chosen, record.rejected)
        )
        assert any(a - b >= min_margin for a in best for b in worst)
        assert (record.chosen_probability == 0.5) <= any(a == b for a in best for b in worst)
    again = make_pairs([scored], PAIRINGS[name], seed=seed, pairs=pairs, min_margin=min_margin)
    assert again == found, "the seed decides"


def test_messages_are_completions_too() -> None:
    turns = tuple(({"role": "assistant", "content": text},) for text in "ab")
    scored = Scored(({"role": "user", "content": "x"},), turns, (0.0, 1.0))
    (record,) = make_pairs([scored], best_random, seed=0).records
    assert record.chosen == turns[1] and record.rejected == turns[0]


def test_what_gives_no_pairs_is_said_in_one_line() -> None:
    nan = Scored("what is\nthis", "ab", (0.0, math.nan))
    with pytest.raises(DataError, match="^memory, row 2, prompt 'what is this': the reward of completion 2 is nan; "):
        make_pairs([FOUR, nan], best_worst, seed=0)
    with pytest.raises(DataError, match="^file, row 7, prompt 'x': 1 rewards for 4 completions"):
        make_pairs([replace(FOUR, rewards=(1.0,))], best_worst, seed=0)
    with pytest.raises(DataError, match="the standard deviation of completion 1 is -1.0; .* at least 0"):
        make_pairs([replace(FOUR, stds=(-1.0, 0.0, 0.0, 0.0))], uncertain, seed=0)
    with pytest.raises(ConfigError, match="the pairing 'uncertain' needs a standard deviation"):
        make_pairs([replace(FOUR, stds=None)], uncertain, seed=0)
    with pytest.raises(DataError, match="pairs: none of 1 prompts gives a pair"):
        make_pairs([FOUR], best_worst, seed=0, min_margin=5)
    for wrong in ({"pairs": 0}, {"min_margin": math.nan}, {"tie_within": -1.0}):
        with pytest.raises(ConfigError, match="pairs is .*, min_margin .* and tie_within"):
            make_pairs([FOUR], best_worst, seed=0, **wrong)


def test_groups_pair_with_each_other_alone_and_the_farthest_are_taken() -> None:
    apart = np.array([[0.0, 9.0, 1.0], [9.0, 0.0, 2.0], [1.0, 2.0, 0.0]])
    scored = Scored("p", ["a", "b", "c"], [3.0, 2.0, 1.0], groups=[0, 0, 1], apart=apart)
    both = make_pairs([scored], uniform, seed=0, pairs=9).records
    assert {(one.chosen, one.rejected) for one in both} == {("a", "c"), ("b", "c")}
    (one,) = make_pairs([scored], farthest, seed=0).records
    assert (one.chosen, one.rejected) == ("b", "c")
    with pytest.raises(ConfigError, match="how far completions are apart"):
        make_pairs([Scored("p", ["a", "b"], [1.0, 0.0])], farthest, seed=0)
