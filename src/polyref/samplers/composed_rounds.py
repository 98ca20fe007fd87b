"""Rejection for many prompts at once: proposals in rounds until each prompt has enough, or its budget is spent.

A proposal is made only while the budget allows the longest one. Whether it is made then depends on earlier ones alone, so that
the k-th accepted completion, where there is one, has exactly the target's law: a budget that looked at its length would not
leave it that. Rounds depend on neither batch size nor company.

F_a is estimated without bias however drawing ended [Girshick, Mosteller and Savage, 1946]: that the first proposal is accepted
has probability F_a, and given what was proposed, but not the order, it still is an estimate of F_a. Every order is as likely
whose last proposal could have been made last: so that those before it left room for the longest one, and accepted if the n-th
acceptance was the end. With k of N accepted, and a share b of those that could be last, it is (k - b)/(N - 1): k/N at a number
that was fixed, (k - 1)/(N - 1) where nothing but the k-th acceptance ended it, and neither where the budget may have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from polyref.objectives.metrics import Interval
from polyref.samplers.composed_values import Drawn, Plan, Sample, log_interval
from polyref.samplers.weights import acceptance_rate

_AT_ONCE = 8  # batches of proposals between one look at what came of them and the next


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
        for start in range(0, len(requests), _AT_ONCE * plan.batch_size):
            some = requests[start : start + _AT_ONCE * plan.batch_size]
            for (task, _), outcome in zip(some, propose(some), strict=True):
                histories[task].append(outcome)
                left[task] -= outcome.calls
                _count(histories[task], plan)
    return [_drawn(method, history, longest, budget, plan) for history, budget in zip(histories, budgets, strict=True)]


def _count(history: Sequence[Outcome], plan: Plan) -> None:
    """Tell the tally of the latest of `history`, if it is one of the completions asked for."""
    sample = history[-1].sample
    if plan.tally is None or (sample is None and not plan.fixed):
        return
    if plan.fixed or sum(outcome.sample is not None for outcome in history) <= plan.n:
        plan.tally.add(1, len(sample.token_ids) if sample is not None else 0)


def _wanted(history: Sequence[Outcome], plan: Plan) -> int:
    """How many more proposals to make next: as many as acceptances so far promise to be enough, at most twice those made."""
    if plan.fixed or not history:
        return plan.n - len(history)
    lacking = plan.n - sum(outcome.sample is not None for outcome in history)
    rate = (plan.n - lacking + 1) / (len(history) + 1)
    return min(math.ceil(lacking / rate), 2 * len(history)) if lacking > 0 else 0


def _drawn(method: str, history: Sequence[Outcome], longest: int, budget: int, plan: Plan) -> Drawn:
    places = [place for place, outcome in enumerate(history) if outcome.sample is not None]
    stopped = not plan.fixed and len(places) >= plan.n
    used = history[: places[plan.n - 1] + 1] if stopped else history
    samples = tuple(outcome.sample for outcome in used if outcome.sample is not None)
    k, made = len(samples), len(used)
    mass = estimate(used, stopped, budget - longest)
    calls = sum(outcome.calls for outcome in history)
    short = made < plan.n if plan.fixed else k < plan.n
    note = _note(k, made, budget, plan, mass) if short else ""
    return Drawn(method, samples, made, k, log_interval(mass), calls, True, note)


def estimate(used: Sequence[Outcome], stopped: bool, room: int) -> Interval:
    """F_a without bias from the proposals `used`, and Clopper-Pearson's interval, exact where the budget did not matter.

    `stopped`: the last one was the n-th acceptance. A proposal was made while those before it took at most `room` calls. At the
    first acceptance there is no useful estimate without bias, and 1/N is given.
    """
    if not used:
        return Interval(math.nan, 0.0, 1.0)
    accepted = [outcome.sample is not None for outcome in used]
    rate = acceptance_rate(sum(accepted), len(used), stopped=stopped)
    if len(used) == 1 or (stopped and sum(accepted) == 1):
        return rate
    before = sum(outcome.calls for outcome in used) - room
    last = [yes for yes, outcome in zip(accepted, used, strict=True) if outcome.calls >= before and (yes or not stopped)]
    mean = (sum(accepted) - sum(last) / len(last)) / (len(used) - 1)
    return Interval(mean, min(rate.low, mean), max(rate.high, mean))


def _note(accepted: int, made: int, budget: int, plan: Plan, mass: Interval) -> str:
    if not made:
        return f"nothing drawn: a budget of {budget} calls does not cover one proposal"
    if plan.fixed:
        return f"{made} of {plan.n} proposals: the budget of {budget} calls is spent"
    if not accepted:
        return f"none of {made} proposals was accepted (F is below {mass.high:.2g}), and the budget of {budget} calls is spent"
    return f"{accepted} of {plan.n} completions: the budget of {budget} calls is spent, and decided the number of proposals"
