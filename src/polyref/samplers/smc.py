"""The geometric composition by sequential Monte Carlo: particles grow token by token and are weighed by what composing cost.

A particle's token comes from p_t prop. to prod_i pi_i(. | prefix)^{a_i}, whose normaliser z_t <= 1 multiplies its weight; one
that has ended is kept at increment 1. z_t depends on the prefix alone, so particles are weighed, and where the effective size
falls below a threshold resampled (systematically), before they draw token t. The mean weight of N particles is then an
UNBIASED estimate of F_a(x), its log biased low; weighted samples are consistent as N grows, not exact. Independent islands give
the interval, and their average keeps the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from polyref.objectives.metrics import Interval
from polyref.references.compose import geometric
from polyref.samplers.composed_values import Drawn, Plan, Sample, Task, common_ends, decoded, uniforms
from polyref.samplers.members import Member
from polyref.samplers.members_draws import find_tokens
from polyref.samplers.members_lockstep import LockStep
from polyref.samplers.weights import effective_size, systematic

ISLANDS = 4
"""Independent runs of a prompt, among which its particles are divided."""

THRESHOLD = 0.5
"""Particles are resampled when their effective size is below this share of their number."""


class Island(NamedTuple):
    """One run: the task it is for and its number among the task's, with `particles` particles."""

    task: int
    number: int
    particles: int


@dataclass
class Particles:
    """N particles of several islands: log-weights (N,), log-probs (N, K), tokens, which have ended; calls of each island."""

    log_weights: Tensor
    logps: Tensor
    tokens: list[list[int]]
    ended: Tensor
    calls: list[int] = field(default_factory=list)


def draw_smc(members: Sequence[Member], tasks: Sequence[Task], budgets: Sequence[int], plan: Plan) -> list[Drawn]:
    """At least n weighted completions of each task: ISLANDS runs of as many particles, fewer where the budget says so."""
    islands: list[Island] = []
    longest = len(members) * plan.max_new_tokens
    for task, budget in enumerate(budgets):
        runs = max(1, min(ISLANDS, plan.n, budget // longest))
        particles = min(-(-plan.n // runs), budget // (runs * longest))
        islands += [Island(task, number, particles) for number in range(runs) if particles]
    found: dict[int, list[Particles]] = {task: [] for task in range(len(tasks))}
    for batch in _batches(islands, tasks, plan.batch_size):
        for island, run in zip(batch, _run(members, tasks, batch, plan), strict=True):
            found[island.task].append(run)
            if plan.tally is not None:
                before = sum(len(earlier.tokens) for earlier in found[island.task][:-1])
                plan.tally.add(min(len(run.tokens), max(plan.n - before, 0)), sum(map(len, run.tokens)))
    return [_drawn(members, found[task], budget, plan) for task, budget in enumerate(budgets)]


def _batches(islands: Sequence[Island], tasks: Sequence[Task], size: int) -> list[list[Island]]:
    """Islands side by side, prompts of like length together, up to `size` particles; a larger island is a batch of its own."""
    batches: list[list[Island]] = []
    for island in sorted(islands, key=lambda island: (len(tasks[island.task].ids[0]), island)):
        if not batches or sum(other.particles for other in batches[-1]) + island.particles > size:
            batches.append([])
        batches[-1].append(island)
    return batches


def _run(members: Sequence[Member], tasks: Sequence[Task], islands: Sequence[Island], plan: Plan) -> list[Particles]:
    """The particles of each island at the end."""
    owner = [i for i, island in enumerate(islands) for _ in range(island.particles)]
    places = [slice(owner.index(i), owner.index(i) + island.particles) for i, island in enumerate(islands)]
    numbers = [_numbers(tasks[island.task], island, plan) for island in islands]
    weights = torch.tensor([tasks[islands[i].task].weights for i in owner], dtype=torch.float64)
    distinct = list(dict.fromkeys(island.task for island in islands))
    steps = LockStep(members, [tasks[task].ids for task in distinct]).pick([distinct.index(islands[i].task) for i in owner])
    size, ends = len(owner), common_ends(members)
    all_of = Particles(
        torch.zeros(size, dtype=torch.float64),
        torch.zeros(size, len(members), dtype=torch.float64),
        [[] for _ in owner],
        torch.zeros(size, dtype=torch.bool),
        [0] * len(islands),
    )
    alive = list(range(size))
    for step in range(plan.max_new_tokens):
        for particle in alive:
            all_of.calls[owner[particle]] += len(members)
        law = steps.law
        joint = geometric(law, weights[alive][:, None].to(law.device))
        all_of.log_weights[alive] += joint.logsumexp(-1).cpu()
        ancestors = _resampled(all_of, places, set(owner[particle] for particle in alive), [n[step, -1] for n in numbers])
        going = [p for p in range(size) if not all_of.ended[p] and all_of.log_weights[p] > -math.inf]
        if not going:
            break
        rows = torch.tensor([alive.index(ancestors[p]) for p in going])
        offsets = [p - places[owner[p]].start for p in going]
        numbers_now = torch.tensor([numbers[owner[p]][step, at] for p, at in zip(going, offsets, strict=True)])
        joint, law = joint[rows.to(joint.device)], law[rows.to(law.device)]
        token, _ = find_tokens(joint, numbers_now.to(joint.device), coins=False)
        all_of.logps[going] += law[torch.arange(len(going), device=law.device), token].cpu()
        for particle, chosen in zip(going, token.tolist(), strict=True):
            all_of.tokens[particle].append(chosen)
            all_of.ended[particle] = chosen in ends
        on = [place for place, particle in enumerate(going) if not all_of.ended[particle]]
        if step + 1 == plan.max_new_tokens or not on:
            break
        steps = steps.pick([int(rows[place]) for place in on])
        steps.step(token[torch.tensor(on, device=token.device)])
        alive = [going[place] for place in on]
    return [_part(all_of, place, calls) for place, calls in zip(places, all_of.calls, strict=True)]


def _numbers(task: Task, island: Island, plan: Plan) -> np.ndarray:
    """(T, particles + 1): a number for each particle's token, and one for resampling, at each step."""
    shape = (plan.max_new_tokens, island.particles + 1)
    return uniforms(plan, task, f"smc {island.particles}", island.number, shape[0] * shape[1]).reshape(shape)


def _resampled(particles: Particles, places: Sequence[slice], moving: set[int], numbers: Sequence[float]) -> list[int]:
    """The ancestor of each particle, itself where its island is not resampled; weights, tokens and the rest follow."""
    ancestors = list(range(len(particles.tokens)))
    for i in moving:
        place = places[i]
        log_weights = particles.log_weights[place]
        size = len(log_weights)
        if not log_weights.isfinite().any() or float(effective_size(log_weights)) >= THRESHOLD * size:
            continue
        chosen = systematic(log_weights, size, float(numbers[i]))
        ancestors[place] = [place.start + int(at) for at in chosen]
        particles.log_weights[place] = log_weights.logsumexp(-1) - math.log(size)
    particles.logps, particles.ended = particles.logps[ancestors], particles.ended[ancestors]
    particles.tokens = [list(particles.tokens[at]) for at in ancestors]
    return ancestors


def _part(particles: Particles, place: slice, calls: int) -> Particles:
    logps, ended = particles.logps[place], particles.ended[place]
    return Particles(particles.log_weights[place], logps, particles.tokens[place], ended, [calls])


def _drawn(members: Sequence[Member], islands: Sequence[Particles], budget: int, plan: Plan) -> Drawn:
    samples = []
    for island in islands:
        rows = zip(island.log_weights.tolist(), island.logps.tolist(), island.tokens, island.ended.tolist(), strict=True)
        for log_weight, logps, tokens, ended in rows:
            if log_weight > -math.inf:
                text = decoded(members[0], tokens, ended)
                samples.append(Sample(tuple(tokens), text, ended, tuple(logps), log_weight))
    made, calls = sum(len(island.tokens) for island in islands), sum(island.calls[0] for island in islands)
    log_mass = log_mean([float(island.log_weights.logsumexp(-1)) - math.log(len(island.tokens)) for island in islands])
    note = ""
    if not made:
        note = f"nothing drawn: a budget of {budget} calls does not cover one particle"
    elif not samples:
        note = f"none of {made} particles is left: the references share no completion, as far as was seen"
    elif made < plan.n:
        note = f"{made} of {plan.n} particles: a budget of {budget} calls allows no more"
    return Drawn("smc", tuple(samples), made, len(samples), log_mass, calls, False, note)


def log_mean(logs: Sequence[float], level: float = 0.95) -> Interval:
    """The log of the mean of independent estimates of F, from their logs, and its interval by the spread among them.

    log F -+ t s / (F sqrt(M)), s their standard deviation and t Student's with M - 1 degrees of freedom; above, at most 0. One
    estimate, or nothing but zeros, says nothing of its error: [-inf, 0].
    """
    top, m = max(logs, default=math.nan), len(logs)
    if m < 2 or top == -math.inf:
        return Interval(top, -math.inf, 0.0)
    values = np.exp(np.array(logs) - top)
    mean = top + math.log(values.mean())
    error = float(values.std(ddof=1) / values.mean()) / math.sqrt(m) * float(student.ppf((1 + level) / 2, m - 1))
    return Interval(mean, mean - error, min(mean + error, 0.0))
