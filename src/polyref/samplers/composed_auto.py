"""The geometric composition by the method that a pilot recommends: exact draws where they are affordable, particles elsewhere.

The pilot makes some token proposals whose random numbers nothing else uses, so that what follows is as exact, and its estimate
of F_a as unbiased, as if the method had been chosen beforehand. Its calls are part of the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from polyref.samplers.composed_values import Drawn, Plan, Task
from polyref.samplers.geometric_tokens import draw_tokens
from polyref.samplers.members import Member
from polyref.samplers.smc import draw_smc

PILOT = 16
"""Proposals of a pilot, and four times as many more where none is accepted. It takes a quarter of the budget at most."""


class Pilot(NamedTuple):
    """What a pilot's `proposals` came to, and the `calls` that they took."""

    accepted: int
    proposals: int
    calls: int


def draw_auto(members: Sequence[Member], tasks: Sequence[Task], budgets: Sequence[int], plan: Plan) -> list[Drawn]:
    """Token proposals for the tasks whose pilot promises n acceptances within the budget, sequential Monte Carlo for others."""
    pilots = _pilots(members, tasks, [budget // 4 for budget in budgets], plan)
    left = [budget - pilot.calls for budget, pilot in zip(budgets, pilots, strict=True)]
    affordable = [_promised(pilot, plan.n) <= some for pilot, some in zip(pilots, left, strict=True)]
    found: dict[int, Drawn] = {}
    for exact, draw in ((True, draw_tokens), (False, draw_smc)):
        some = [i for i, yes in enumerate(affordable) if yes == exact]
        drawn = draw(members, [tasks[i] for i in some], [left[i] for i in some], plan) if some else []
        for i, one in zip(some, drawn, strict=True):
            found[i] = replace(one, calls=one.calls + pilots[i].calls)
    return [found[i] for i in range(len(tasks))]


def _pilots(members: Sequence[Member], tasks: Sequence[Task], budgets: Sequence[int], plan: Plan) -> list[Pilot]:
    """A pilot of each task: of 16 proposals where some are accepted, else of 80, so that rates of some per cent are seen."""
    found = [Pilot(0, 0, 0)] * len(tasks)
    for name, n in (("pilot", PILOT), ("second pilot", 4 * PILOT)):
        some = [i for i, pilot in enumerate(found) if not pilot.accepted]
        own = [tasks[i]._replace(key=f"{name} {tasks[i].key}") for i in some]
        left = [budgets[i] - found[i].calls for i in some]
        drawn = draw_tokens(members, own, left, plan._replace(n=n, fixed=True, tally=None)) if some else []
        for i, one in zip(some, drawn, strict=True):
            before = found[i]
            found[i] = Pilot(one.accepted, before.proposals + one.proposals, before.calls + one.calls)
    return found


def _promised(pilot: Pilot, n: int) -> float:
    """The calls that n acceptances will take; infinite where a pilot that accepted nothing, or was not made, promises none."""
    if not pilot.accepted:
        return float("inf")
    return n * (pilot.proposals + 1) / (pilot.accepted + 0.5) * pilot.calls / pilot.proposals
