"""The arithmetic composition M_a = sum_i a_i pi_i, drawn exactly: a member by its weight, then a completion by that member.

Members with one tokenizer score the drawn tokens. With several, each scores the text by its own template and tokenizer: then
only texts that end count, within `max_new_tokens` tokens of each member, and a draw whose tokens are not the drawing member's
canonical encoding of its text is rejected (probabilities of texts are those of canonical encodings, and sum to at most 1; a
text that its encoding does not give back, as where a template trims it, has none).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from polyref.data.encode import Ids
from polyref.objectives.metrics import Interval
from polyref.samplers.composed_rounds import Outcome, draw_accepted
from polyref.samplers.composed_values import Drawn, Plan, Sample, Task, common_ends, decoded, uniforms
from polyref.samplers.members import Member
from polyref.samplers.members_draws import Row, chunks, draw_rows
from polyref.samplers.members_lockstep import LockStep
from polyref.samplers.members_scores import member_logps


class Proposal(NamedTuple):
    """A draw from M_a: None where its tokens are not canonical; a `coin` in [0, 1) that nothing was decided by; its calls."""

    sample: Sample | None
    coin: float
    calls: int


def draw_mixture(members: Sequence[Member], tasks: Sequence[Task], budgets: Sequence[int], plan: Plan) -> list[Drawn]:
    """Completions of each task, exactly from M_a; their acceptance is 1 where members have one tokenizer."""

    def propose(requests: Sequence[tuple[int, int]]) -> list[Outcome]:
        return [Outcome(drawn.sample, drawn.calls) for drawn in propose_mixture(members, tasks, requests, plan)]

    drawn = draw_accepted("mixture", propose, len(members) * plan.max_new_tokens, budgets, plan)
    return drawn if plan.by_text else [replace(some, log_mass=Interval(0.0, 0.0, 0.0)) for some in drawn]


def propose_mixture(
    members: Sequence[Member], tasks: Sequence[Task], requests: Sequence[tuple[int, int]], plan: Plan
) -> list[Proposal]:
    """A draw from M_a for each (task, number of the draw), with its log-probability under every member."""
    numbers = [uniforms(plan, tasks[task], "mixture", draw, 2 + plan.max_new_tokens) for task, draw in requests]
    drawers = [_pick(tasks[task].weights, float(mine[0])) for (task, _), mine in zip(requests, numbers, strict=True)]
    rows = [Row() for _ in requests]
    for place, member in enumerate(members):
        ends = member.ends if plan.by_text else common_ends(members)
        own = [i for i, drawer in enumerate(drawers) if drawer == place]
        own.sort(key=lambda i: (len(tasks[requests[i][0]].ids[place]), requests[i]))
        for some in chunks(own, plan.batch_size):
            prompts = [tasks[requests[i][0]].ids[place] for i in some]
            tokens = np.stack([numbers[i][2:] for i in some])
            for i, row in zip(some, _draw(member, prompts, tokens, ends), strict=True):
                rows[i] = row
    encodings = [
        _encodings(members, tasks[task], drawer, row, plan)
        for (task, _), drawer, row in zip(requests, drawers, rows, strict=True)
    ]
    logps = _score(members, [tasks[task] for task, _ in requests], drawers, rows, encodings, plan)
    proposals = []
    for drawer, row, mine, encoded, values in zip(drawers, rows, numbers, encodings, logps, strict=True):
        calls = row.steps + sum(len(ids) for at, ids in enumerate(encoded or ()) if ids is not None and at != drawer)
        text = decoded(members[drawer], row.token_ids, row.ended)
        sample = Sample(tuple(row.token_ids), text, row.ended, tuple(values)) if encoded else None
        proposals.append(Proposal(sample, float(mine[1]), calls))
    return proposals


def _pick(weights: Sequence[float], uniform: float) -> int:
    cumulative = np.cumsum(weights)
    return int(min(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"), len(weights) - 1))


def _draw(member: Member, prompts: Sequence[Ids], numbers: np.ndarray, ends: frozenset[int]) -> list[Row]:
    distinct = list(dict.fromkeys(prompts))
    steps = LockStep([member], [[ids] for ids in distinct]).pick([distinct.index(ids) for ids in prompts])
    return draw_rows(steps, torch.ones(len(prompts), 1, dtype=torch.float64), numbers, ends, coins=False)


def _encodings(members: Sequence[Member], task: Task, drawer: int, row: Row, plan: Plan) -> list[Ids | None] | None:
    """The completion in every member's tokens, None where a member gives it no probability; or None: not canonical."""
    own = tuple(row.token_ids)
    if not plan.by_text:
        return [own] * len(members)
    if not row.ended:
        return None
    text = decoded(members[drawer], row.token_ids, ended=True)
    if members[drawer].canonical_ids(task.prompt, text) != own:
        return None
    found = [own if at == drawer else _own_ids(member, task, text) for at, member in enumerate(members)]
    return [ids if ids is not None and len(ids) <= plan.max_new_tokens else None for ids in found]


def _own_ids(member: Member, task: Task, text: str) -> Ids | None:
    """The canonical encoding of `text`, if its tokens give back `text`: else no draw of `member` is ever this text.

    A template that trims and a tokenizer that does not know a character read several texts as the same tokens.
    """
    ids = member.canonical_ids(task.prompt, text)
    return ids if ids is not None and decoded(member, ids, ended=True) == text else None


def _score(
    members: Sequence[Member],
    tasks: Sequence[Task],
    drawers: Sequence[int],
    rows: Sequence[Row],
    encodings: Sequence[Sequence[Ids | None] | None],
    plan: Plan,
) -> list[list[float]]:
    """log pi_i of every draw, (N, K); that of the member that drew it is known."""
    logps = [[-math.inf] * len(members) for _ in tasks]
    for place, member in enumerate(members):
        items, places = [], []
        for i, encoded in enumerate(encodings):
            ids = encoded[place] if encoded else None
            if drawers[i] == place:
                logps[i][place] = rows[i].logps[0]
            elif ids is not None:
                items.append((tasks[i].ids[place], ids))
                places.append(i)
        for i, logp in zip(places, member_logps(member, items, plan.batch_size), strict=True):
            logps[i][place] = logp
    return logps
