"""When a loop ends early: exactly where a limit is broken, and never without one."""

from __future__ import annotations

from typing import Any

import pytest

from polyref.errors import ConfigError
from polyref.loops import rails
from polyref.loops.rails import LEAST_PROMPTS, Change, Limits, Stop, told_before


def row(number: int, reward: float = 0.0, gold: float | None = 0.0, kl: float = 0.1, length: float = 10.0) -> dict[str, Any]:
    """A row whose intervals reach 0.1 to either side."""
    near = {"reward": reward, "gold": gold, "kl_anchor": kl, "length": length}
    return {"round": number} | {k: None if v is None else [v, v - 0.1, v + 0.1] for k, v in near.items()}


def apart(rows: list[dict[str, Any]]) -> Change:
    """Changes of means whose intervals reach 0.2 to either side; where an estimate of `rows` has no ends, nor has a change."""

    def change(name: str, before: int, after: int) -> list[float | None]:
        by = rows[after][name][0] - rows[before][name][0]
        return [by, None, None] if rows[after][name][1] is None else [by, by - 0.2, by + 0.2]

    return change


def stopped(rows: list[dict[str, Any]], limits: Limits, prompts: int = LEAST_PROMPTS) -> Stop | None:
    return rails.stopped(rows, limits, apart(rows), prompts)


def rows(**columns: list[float]) -> list[dict[str, Any]]:
    return [row(i, **dict(zip(columns, values, strict=True))) for i, values in enumerate(zip(*columns.values(), strict=True))]


def test_a_kl_budget_ends_the_loop_with_the_policy_before() -> None:
    stop = stopped(rows(kl=[0.0, 1.0, 2.1]), Limits(kl=2.0))
    assert stop is not None and (stop.rail, stop.at, stop.keep) == ("KL budget", 2, 1) and "2.1 nats" in stop.why
    assert stopped(rows(kl=[0.0, 1.0, 2.0]), Limits(kl=2.0)) is None and stopped(rows(kl=[0.0, 9.0]), Limits()) is None
    assert stopped(rows(kl=[9.0]), Limits(kl=2.0)) is None, "the start is nobody's round"


def test_over_optimisation_is_gold_that_falls_while_the_proxy_rises_for_so_many_rounds() -> None:
    proxy, gold = [0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 0.5, 0.4]
    assert stopped(rows(reward=proxy[:3], gold=gold[:3]), Limits(patience=2)) is None
    stop = stopped(rows(reward=proxy, gold=gold), Limits(patience=2))
    assert stop is not None and (stop.rail, stop.at, stop.keep) == ("over-optimisation", 3, 1)
    assert "since round 1 the gold reward fell from 1 to 0.4 while the proxy rose from 1 to 3" in stop.why
    assert stopped(rows(reward=proxy, gold=gold), Limits(patience=None)) is None
    assert stopped(rows(reward=[0.0, 1.0, 1.1, 1.15], gold=gold), Limits(patience=2)) is None, "within the proxy's intervals"
    assert stopped(rows(reward=proxy, gold=[0.0, 1.0, 0.9, 0.4]), Limits(patience=2)) is None, "within those of gold"
    assert stopped([row(i, float(i), None) for i in range(9)], Limits(patience=1)) is None, "nothing is known of gold"
    open_ended = rows(reward=proxy, gold=gold)
    open_ended[-1]["gold"] = [0.4, None, None]
    assert stopped(open_ended, Limits(patience=2)) is None


def test_a_few_prompts_give_no_interval_that_ends_a_run() -> None:
    falling = rows(reward=[0.0, 1.0, 2.0, 3.0], gold=[0.0, 1.0, 0.5, 0.4], kl=[0.1, 0.1, 0.1, 3.0])
    limits = Limits(patience=2)
    assert stopped(falling, limits) is not None and stopped(falling, limits, LEAST_PROMPTS - 1) is None
    assert (stop := stopped(falling, Limits(kl=2.0), 1)) is not None and stop.rail == "KL budget", "a mean needs no interval"


def test_what_a_rail_cannot_do_is_told_before_the_first_round() -> None:
    few = told_before(row(0), Limits(), LEAST_PROMPTS - 1)
    assert few == ["7 judged prompts are too few for intervals: over-optimisation does not end this run; hold out 8 or more"]
    quiet = ((row(0), Limits(), LEAST_PROMPTS), (row(0, gold=None), Limits(), 1), (row(0), Limits(patience=None), 1))
    assert not any(told_before(*one) for one in quiet), "enough prompts, no gold reward, or no rail"
    (line,) = told_before(row(0, gold=None, kl=14.2), Limits(kl=8.0), 1)
    assert "the start's KL to the anchor is 14.2 nats, above the budget of 8 already" in line
    assert not told_before(row(0, gold=None, kl=8.0), Limits(kl=8.0), 1)
    assert not told_before(row(0, gold=None) | {"kl_anchor": None}, Limits(kl=8.0), 1)


def test_lengths_may_drift_by_a_factor_either_way() -> None:
    for last, ends in ((21.0, True), (20.0, False), (5.0, False), (4.9, True)):
        stop = stopped(rows(length=[10.0, 11.0, last]), Limits(length=2.0))
        assert (stop is not None) == ends
        if stop is not None:
            assert (stop.rail, stop.keep) == ("length drift", 1) and "beyond a factor of 2" in stop.why


@pytest.mark.parametrize("given", [{"kl": 0.0}, {"patience": 0}, {"length": 1.0}, {"kl": float("nan")}])
def test_limits_that_are_none_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Limits(**given)
