"""The geometric composition G_a = prod_i pi_i^{a_i} / F_a, drawn exactly by rejection from the arithmetic one.

A draw y of M_a is accepted with probability prod_i pi_i^{a_i}(y) / sum_i a_i pi_i(y), at most 1 because a geometric mean is at
most the arithmetic one. The rate is F_a(x) = sum_y prod_i pi_i^{a_i}. Works on whole completions, so members may have different
tokenizers; where they share one, `geometric_tokens` draws the same law with fewer calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polyref.references.compose import arithmetic, geometric
from polyref.samplers.arithmetic import Proposal, propose_mixture
from polyref.samplers.composed_rounds import Outcome, draw_accepted
from polyref.samplers.composed_values import Drawn, Plan, Task
from polyref.samplers.members import Member


def draw_rejection(members: Sequence[Member], tasks: Sequence[Task], budgets: Sequence[int], plan: Plan) -> list[Drawn]:
    """Completions of each task, exactly from G_a; their acceptance estimates F_a."""

    def propose(requests: Sequence[tuple[int, int]]) -> list[Outcome]:
        drawn = propose_mixture(members, tasks, requests, plan)
        return [_decided(proposal, tasks[task]) for proposal, (task, _) in zip(drawn, requests, strict=True)]

    return draw_accepted("rejection", propose, len(members) * plan.max_new_tokens, budgets, plan)


def _decided(proposal: Proposal, task: Task) -> Outcome:
    if proposal.sample is None:
        return Outcome(None, proposal.calls)
    logps = torch.tensor(proposal.sample.logps, dtype=torch.float64)
    chance = (geometric(logps, task.weights) - arithmetic(logps, task.weights)).exp()
    return Outcome(proposal.sample if proposal.coin < float(chance) else None, proposal.calls)
