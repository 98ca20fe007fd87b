"""Verdicts: an interval bears a claim out, contradicts it, or leaves it open, whatever the experiment."""

from __future__ import annotations

import math

import pytest
import torch

from polyref.theory.experiments import (
    _words,
    auxiliary_pairs,
    composition,
    doubly_robust,
    references,
    settings,
    variance_reduction,
)
from polyref.theory.experiments._data import growing_wins
from polyref.theory.preferences import MISSPECIFICATIONS, bradley_terry, pair_law
from polyref.theory.regression import Estimates, SlopeFit
from polyref.theory.results import Estimate

BELOW, ABOVE, AROUND, TIGHT = (Estimate(*one) for one in ((0.5, 0.4, 0.6), (2.0, 1.5, 3.0), (1.0, 0.5, 1.5), (1.0, 0.98, 1.02)))


def test_an_interval_is_below_above_or_around_and_a_tight_one_leaves_no_gain() -> None:
    assert [_words.side(one) for one in (BELOW, ABOVE, AROUND, TIGHT)] == [-1, 1, 0, 0]
    assert [_words.lower(one) for one in (BELOW, ABOVE, AROUND, TIGHT)] == [1, -1, 0, -1]
    assert _words.lower(Estimate(0.98, 0.97, 0.99)) == -1
    assert _words.lower(Estimate(-0.1, -0.2, -0.01), 0.0) == 1 and _words.lower(TIGHT, 2.0) == 1


@pytest.mark.parametrize(
    ("signs", "agreement"),
    [
        ((1, 1), "agrees"),
        ((1, 0), "undecided"),
        ((0, 0), "undecided"),
        ((1, -1), "misses the claim"),
        ((0, -1), "misses the claim"),
    ],
)
def test_a_claim_in_parts_needs_all_of_them(signs: tuple[int, ...], agreement: str) -> None:
    assert _words.joint(signs) == agreement


def test_numbers_and_slopes_in_sentences() -> None:
    assert _words.told(BELOW) == "0.50 [0.40, 0.60]" and _words.told(ABOVE, "+.1f") == "+2.0 [+1.5, +3.0]"
    assert _words.shown(slope(-0.6, -0.5)) == "-0.55 [-0.60, -0.50]"
    assert _words.shown(SlopeFit("", "mean", math.nan, math.nan, math.nan, math.nan, (1.0,), note="no slope")) == "no slope"
    assert "(to 0.05)" in _words.verdict("agrees")
    assert _words.verdict("beats the claim", beats="slower") == "slower"
    found = Estimates(*(torch.tensor([value, 2 * value]).numpy() for value in (1.0, 0.5, 3.0)))
    assert _words.cells(found) == [Estimate(1, 0.5, 3), Estimate(2, 1, 6)]


def slope(low: float, high: float) -> SlopeFit:
    return SlopeFit("", "mean", (low + high) / 2, low, high, 0.0, (1.0, 2.0), -0.5)


@pytest.mark.parametrize(
    ("right", "neither", "agreement"),
    [
        ((-0.55, -0.45), (-0.2, -0.1), "agrees"),
        ((-0.7, -0.6), (-0.2, -0.1), "agrees"),
        ((-0.9, 0.1), (-0.2, -0.1), "undecided"),
        ((-0.55, -0.45), (-0.55, -0.45), "undecided"),
        ((-0.3, -0.2), (-0.2, -0.1), "misses the claim"),
    ],
)
def test_doubly_robust(right: tuple[float, float], neither: tuple[float, float], agreement: str) -> None:
    fits = {case: slope(*(right if any(models) else neither)) for case, models in doubly_robust.CASES.items()}
    assert doubly_robust._agreement(fits) == agreement


@pytest.mark.parametrize(
    ("one", "halved", "four", "agreement"),
    [
        (TIGHT, BELOW, BELOW, "agrees"),
        (AROUND, BELOW, BELOW, "undecided"),
        (TIGHT, AROUND, BELOW, "undecided"),
        (BELOW, BELOW, BELOW, "misses the claim"),
        (TIGHT, TIGHT, BELOW, "misses the claim"),
    ],
)
def test_auxiliary_pairs(one: Estimate, halved: Estimate, four: Estimate, agreement: str) -> None:
    assert auxiliary_pairs._agreement(one, halved, four) == agreement


@pytest.mark.parametrize(
    ("wrong", "right", "agreement"),
    [
        (BELOW, TIGHT, "agrees"),
        (AROUND, TIGHT, "undecided"),
        (BELOW, AROUND, "undecided"),
        (TIGHT, TIGHT, "misses the claim"),
        (BELOW, ABOVE, "misses the claim"),
    ],
)
def test_variance_reduction(wrong: Estimate, right: Estimate, agreement: str) -> None:
    shares = {
        (law, quality): right if law == variance_reduction.WELL_SPECIFIED else wrong
        for law in MISSPECIFICATIONS
        for quality in variance_reduction.G_QUALITIES
    }
    found, finding = variance_reduction._finding(shares, shares)
    assert found == agreement and f"; {_words.outcome(found)}." in finding
    assert ("less under 4 of 4" in finding) == (wrong is BELOW)


@pytest.mark.parametrize(
    ("greedy", "mended", "agreement"),
    [(ABOVE, BELOW, "agrees"), (AROUND, BELOW, "undecided"), (BELOW, BELOW, "misses the claim")],
)
def test_settings(greedy: Estimate, mended: Estimate, agreement: str) -> None:
    names = (settings.GREEDY, settings.PESSIMIST, settings.HYBRID)
    ratios = {(kind, name): greedy for kind in settings.DATA for name in names}
    assert settings._finding(ratios, dict.fromkeys(settings.DATA, mended))[0] == agreement


@pytest.mark.parametrize(
    ("geometric", "forward", "spread", "agreement"),
    [(-0.2, -0.2, 0.01, "agrees"), (-0.02, -0.2, 0.01, "misses the claim"), (-0.2, -0.02, 1.0, "undecided")],
)
def test_references_are_judged_by_both_objectives_and_not_by_the_mixture(
    geometric: float, forward: float, spread: float, agreement: str
) -> None:
    noise = spread * torch.linspace(-1, 1, 40, dtype=torch.float64)
    lost = {"best": 0.0, "any": 0.0, "geometric": geometric, "forward": forward, "mixture": 5.0}
    drawn = {
        f"{scenario} {arm} lost": (lost[arm] + (arm != "best") * noise)[:, None]
        for scenario in references.SCENARIOS
        for arm in lost
    }
    beyond = references._beyond(drawn)
    found, finding = references._finding(beyond)
    assert found == agreement and f"; {_words.outcome(found)}." in finding
    assert "+5.000" in references._elsewhere(beyond) and "5.000" not in finding


def test_composition_says_nothing_at_one_token_only_where_there_is_nothing() -> None:
    def told(first: float, later: float) -> tuple[str, str]:
        values = torch.tensor([first, *[later] * 4], dtype=torch.float64).numpy()
        found = Estimates(values, values, values)
        return composition._finding({(name, spread): found for name in composition.MEASURES for spread in composition.SPREADS})

    assert told(0.0, 0.1)[0] == "agrees" and "nothing at one token" in told(0.0, 0.1)[1]
    assert told(0.2, 0.1)[0] == "misses the claim" and "nothing at one token" not in told(0.2, 0.1)[1]
    assert told(0.0, 0.0)[0] == "undecided"


def test_a_finding_is_one_sentence() -> None:
    assert _words.finding("a", "b of 0.5", "as claimed") == "Claimed: a; measured b of 0.5; as claimed."
    fit = SlopeFit("", "mean", -1.0, -1.1, -0.9, 0.0, (1000.0, 2000.0), -1.0)
    assert _words.fitted(fit) == "-1.00 [-1.10, -0.90] from 1,000 on"
    assert _words.fitted(fit, "pairs") == "-1.00 [-1.10, -0.90] from 1,000 pairs on"
    assert _words.fitted(SlopeFit("", "mean", math.nan, math.nan, math.nan, math.nan, (1.0,), note="no slope")) == "no slope"


def test_data_sets_hold_the_ones_before_them() -> None:
    generator = torch.Generator().manual_seed(0)
    preference = bradley_terry(torch.rand(3, 2, 4, generator=generator, dtype=torch.float64))
    law = pair_law(torch.full((2,), 0.5, dtype=torch.float64), torch.zeros(3, 2, 4, dtype=torch.float64).log_softmax(-1))
    few, more, most = growing_wins(law, preference, (5, 50, 200), generator)
    assert [set(wins.sum((1, 2, 3)).tolist()) for wins in (few, more, most)] == [{5.0}, {50.0}, {200.0}]
    assert (few <= more).all() and (more <= most).all()
