"""The geometric composition drawn exactly token by token, for members with one tokenizer, a failed draw stopped early.

Proposals p_t prop. to prod_i pi_i(. | prefix)^{a_i}, whose normaliser is z_t <= 1, kept with probability prod_t z_t: their law
is prod_t p_t z_t = prod_i pi_i^{a_i}, and the rate is F_a(x). The coin of z_t is tossed at token t, with the very number that
finds the token: one beyond the mass z_t stops the draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from polyref.samplers.composed_rounds import Outcome, draw_accepted
from polyref.samplers.composed_values import Drawn, Plan, Sample, Task, common_ends, decoded, uniforms
from polyref.samplers.members import Member
from polyref.samplers.members_draws import Row, chunks, draw_rows
from polyref.samplers.members_lockstep import LockStep


def draw_tokens(members: Sequence[Member], tasks: Sequence[Task], budgets: Sequence[int], plan: Plan) -> list[Drawn]:
    """Completions of each task, exactly from G_a; their acceptance estimates F_a."""

    def propose(requests: Sequence[tuple[int, int]]) -> list[Outcome]:
        return [_outcome(row, members) for row in propose_tokens(members, tasks, requests, plan, coins=True)]

    return draw_accepted("tokens", propose, len(members) * plan.max_new_tokens, budgets, plan)


def propose_tokens(
    members: Sequence[Member], tasks: Sequence[Task], requests: Sequence[tuple[int, int]], plan: Plan, *, coins: bool
) -> list[Row]:
    """A draw for each (task, number of the draw). Without `coins` nothing fails, and the law is that of composing tokens."""
    rows = [Row() for _ in requests]
    order = sorted(range(len(requests)), key=lambda i: (len(tasks[requests[i][0]].ids[0]), requests[i]))
    for some in chunks(order, plan.batch_size):
        wanted = [requests[i][0] for i in some]
        distinct = list(dict.fromkeys(wanted))
        steps = LockStep(members, [tasks[task].ids for task in distinct]).pick([distinct.index(task) for task in wanted])
        weights = torch.tensor([tasks[task].weights for task in wanted], dtype=torch.float64)
        numbers = np.stack([uniforms(plan, tasks[requests[i][0]], "tokens", requests[i][1], plan.max_new_tokens) for i in some])
        for i, row in zip(some, draw_rows(steps, weights, numbers, common_ends(members), coins=coins), strict=True):
            rows[i] = row
    return rows


def _outcome(row: Row, members: Sequence[Member]) -> Outcome:
    calls = row.steps * len(members)
    if not row.kept:
        return Outcome(None, calls)
    text = decoded(members[0], row.token_ids, row.ended)
    return Outcome(Sample(tuple(row.token_ids), text, row.ended, row.logps), calls)
