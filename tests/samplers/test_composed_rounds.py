"""Rounds of proposals under a budget, over every outcome that there can be: what is estimated, what is told."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest

from polyref.samplers.composed_rounds import Outcome, draw_accepted
from polyref.samplers.composed_values import Drawn, Plan, Sample
from polyref.samplers.engine import Tally

KINDS = {(True, 1): 0.15, (True, 3): 0.25, (False, 1): 0.4, (False, 3): 0.2}
"""The law of a proposal: whether it is accepted, and its calls, at most 3; what is accepted tends to be long."""

RATE = sum(p for (accepted, _), p in KINDS.items() if accepted)


def drawn_of(script: Sequence[tuple[bool, int]], n: int, budget: int, *, fixed: bool = False, told: Any = None) -> Drawn:
    """What comes of proposals that are as `script` says, and of rejected ones after those, as rounds look ahead."""

    def propose(requests: Sequence[tuple[int, int]]) -> list[Outcome]:
        found = [script[draw] if draw < len(script) else (False, 1) for _, draw in requests]
        return [Outcome(Sample((1,) * calls, "", True, (0.0,)) if yes else None, calls) for yes, calls in found]

    tally = Tally(n, None if told is None else lambda done, total, rate: told.append((done, total, rate > 0)))
    (drawn,) = draw_accepted("script", propose, 3, [budget], Plan(n, 3, 0, 1, fixed, False, tally))
    return drawn


@pytest.mark.parametrize(("n", "budget", "fixed"), [(2, 7, False), (3, 7, False), (2, 9, False), (4, 8, True), (4, 100, True)])
def test_the_estimate_of_the_mass_is_unbiased_however_a_budget_ends_it(n: int, budget: int, fixed: bool) -> None:
    """Over every sequence of as many proposals as the budget can pay for, each with its probability."""
    most = min(n if fixed else budget - 2, budget - 2)
    total = share = 0.0
    for script in itertools.product(KINDS, repeat=most):
        p = math.prod(KINDS[kind] for kind in script)
        drawn = drawn_of(script, n, budget, fixed=fixed)
        assert drawn.calls <= budget and drawn.mass.low <= drawn.mass.mean <= drawn.mass.high
        total += p * drawn.mass.mean
        share += p * drawn.acceptance
    assert total == pytest.approx(RATE, abs=1e-12)
    assert (share == pytest.approx(RATE, abs=1e-12)) == (budget == 100), "the share accepted is biased, unless N is fixed"


def test_where_one_thing_ends_it_the_estimate_is_the_usual_one() -> None:
    yes, no = (True, 3), (False, 3)
    stopped = drawn_of([no, yes, no, no, yes], 2, 100)
    assert (stopped.accepted, stopped.proposals) == (2, 5) and stopped.mass.mean == pytest.approx(1 / 4)
    spent = drawn_of([no, yes, no, no, no], 2, 15)
    assert spent.mass.mean == pytest.approx(1 / 5) and "decided the number of proposals" in spent.note
    first = drawn_of([no, yes, no], 1, 100)
    assert first.mass.mean == pytest.approx(1 / 2), "no useful estimate is unbiased at the first acceptance"
    assert drawn_of([yes], 3, 3).mass.mean == 1 and math.isnan(drawn_of([], 3, 2).mass.mean)


def test_progress_counts_what_was_asked_for_and_no_more() -> None:
    yes, no, told = (True, 2), (False, 1), list[tuple[int, int, bool]]()
    drawn_of([no, yes, no, yes, yes, yes, yes], 3, 100, told=told)
    assert told == [(1, 3, True), (2, 3, True), (3, 3, True)]
    told.clear()
    drawn_of([no, yes, no], 3, 100, fixed=True, told=told)
    assert [done for done, *_ in told] == [1, 2, 3], "of a fixed number, proposals"
    told.clear()
    drawn_of([no, yes, no, no], 3, 6, told=told)
    assert [done for done, *_ in told] == [1], "a budget ended it"
