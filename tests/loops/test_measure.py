"""Changes from round to round, paired by prompt: against closed forms, and where the intervals of two means see nothing."""

from __future__ import annotations

import pytest

from polyref.data.prompt_rows import PromptRow
from polyref.errors import DataError
from polyref.loops.generate import Proposal, Proposed
from polyref.loops.measure import mean_change, measured
from polyref.loops.rails import Limits, stopped
from polyref.references.reference_set import Reference, ReferenceSet

REFERENCES = ReferenceSet((Reference("model"),))


def prompts(count: int) -> list[PromptRow]:
    return [PromptRow(f"question {i}?", None, "made up", i) for i in range(count)]


def drawn(*rewards: tuple[float, ...]) -> Proposed:
    """Completions of one prompt with these (reward, gold)."""
    return Proposed(tuple(Proposal("a b", 2, True, -1.0, (-1.0,), 0.0, both) for both in rewards), len(rewards), 2)


def test_a_change_is_the_mean_difference_and_its_interval_is_over_prompts() -> None:
    before = [drawn((float(i), 0.0), (float(i), 0.0)) for i in range(40)]
    by = [1.0 if i % 2 else 3.0 for i in range(40)]
    after = [drawn((i + one - 5, 0.0), (i + one + 5, 0.0)) for i, one in enumerate(by)]
    mean, low, high = mean_change(prompts(40), before, after, 0, seed=0)
    assert mean == pytest.approx(2.0) and low is not None and high is not None
    width = 2 * 1.96 * (1.0 / 40) ** 0.5  # each prompt's own mean change is 1 or 3: a standard deviation of 1
    assert high - low == pytest.approx(width, rel=0.1), "what cancels within a prompt adds nothing"
    assert mean_change(prompts(40), before, after, 1, seed=0) == [0.0, 0.0, 0.0]
    assert mean_change(prompts(1), before[:1], after[:1], 0, seed=0) == [pytest.approx(3.0), None, None]
    assert mean_change(prompts(2)[:1] * 2, before[:2], after[:2], 0, seed=0)[1:] == [None, None], "one prompt given twice"
    with pytest.raises(ValueError, match="shorter"):
        mean_change(prompts(2), before[:2], after[:1], 0, seed=0)
    with pytest.raises(DataError):
        mean_change([], [], [], 0, seed=0)


def test_a_fall_that_prompts_hide_is_seen_in_changes() -> None:
    ease = [float(i % 20) for i in range(60)]  # the rewards of prompts differ by far more than those of rounds
    rounds = [(0.0, 0.0), (1.0, 1.0), (2.0, 0.5), (3.0, 0.4)]
    each = [[drawn((one + proxy, one + gold)) for one in ease] for proxy, gold in rounds]
    rows = [
        {"round": number} | measured(prompts(60), now, each[0], REFERENCES, moving=False, seed=0)
        for number, now in enumerate(each)
    ]
    assert rows[3]["gold"][2] > rows[1]["gold"][1] and rows[3]["reward"][1] < rows[1]["reward"][2], "the intervals overlap"

    def change(name: str, before: int, after: int) -> list[float | None]:
        return mean_change(prompts(60), each[before], each[after], ("reward", "gold").index(name), seed=0)

    stop = stopped(rows, Limits(patience=2), change, 60)
    assert stop is not None and (stop.rail, stop.at, stop.keep) == ("over-optimisation", 3, 1)
    assert stopped(rows[:3], Limits(patience=2), change, 60) is None, "one round is not two"
