"""Rejection for many prompts at once: proposals in rounds until each prompt has enough, or its budget is spent.

A proposal is made only while the budget allows the longest one. Whether it is made then depends on earlier ones alone, so that
the k-th accepted completion, where there is one, has exactly the target's law: a budget that looked at its length would not
leave it that. Rounds depend on neither batch size nor company.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from polyref.objectives.metrics import Interval
from polyref.samplers.composed_values import Drawn, Plan, Sample, log_interval
from polyref.samplers.weights import acceptance_rate


class Outcome(NamedTuple):
    """What became of a proposal: the sample, or None where it was rejected, and the `calls` it took."""

    sample: Sample | None
    calls: int


Propose = Callable[[Sequence[tuple[int, int]]], list[Outcome]]
"""(index of a task, number of the draw) of each proposal -> its outcome."""


def draw_accepted(method: str, propose: Propose, longest: int, budgets: Sequence[int], plan: Plan) -> list[Drawn]:
    """Accepted proposals of each prompt; `longest` is the most calls that one can take."""
    histories: list[list[Outcome]] = [[] for _ in budgets]
    left = list(budgets)
    while requests := [
        (task, draw)
        for task, history in enumerate(histories)
        for draw in range(len(history), len(history) + min(_wanted(history, plan), left[task] // longest))
    ]:
        for (task, _), outcome in zip(requests, propose(requests), strict=True):
            histories[task].append(outcome)
            left[task] -= outcome.calls
    return [_drawn(method, history, budget, plan) for history, budget in zip(histories, budgets, strict=True)]


def _wanted(history: Sequence[Outcome], plan: Plan) -> int:
    """How many more proposals to make next: as many as acceptances so far promise to be enough, at most twice those made."""
    if plan.fixed or not history:
        return plan.n - len(history)
    lacking = plan.n - sum(outcome.sample is not None for outcome in history)
    rate = (plan.n - lacking + 1) / (len(history) + 1)
    return min(math.ceil(lacking / rate), 2 * len(history)) if lacking > 0 else 0


def _drawn(method: str, history: Sequence[Outcome], budget: int, plan: Plan) -> Drawn:
    places = [place for place, outcome in enumerate(history) if outcome.sample is not None]
    stopped = not plan.fixed and len(places) >= plan.n
    used = history[: places[plan.n - 1] + 1] if stopped else history
    samples = tuple(outcome.sample for outcome in used if outcome.sample is not None)
    k, made = len(samples), len(used)
    mass = acceptance_rate(k, made, stopped=stopped) if made else Interval(math.nan, 0.0, 1.0)
    calls = sum(outcome.calls for outcome in history)
    short = made < plan.n if plan.fixed else k < plan.n
    note = _note(k, made, budget, plan, mass) if short else ""
    return Drawn(method, samples, made, k, log_interval(mass), calls, True, note)


def _note(accepted: int, made: int, budget: int, plan: Plan, mass: Interval) -> str:
    if not made:
        return f"nothing drawn: a budget of {budget} calls does not cover one proposal"
    if plan.fixed:
        return f"{made} of {plan.n} proposals: the budget of {budget} calls is spent"
    if not accepted:
        return f"none of {made} proposals was accepted (F is below {mass.high:.2g}), and the budget of {budget} calls is spent"
    return f"{accepted} of {plan.n} completions: the budget of {budget} calls is spent, and decided the number of proposals"
