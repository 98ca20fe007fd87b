"""Who draws in a round: the main agent, and an enhancer whose completions are set against its.

Each is a policy and a way to draw. Source: the practice of iterative preference training [IT], arXiv 2312.11456.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from polyref.data.prompt_rows import PromptRow, places_among
from polyref.errors import ConfigError, DataError
from polyref.loops.generate import Draw, Proposed
from polyref.loops.policies import Policy, from_policy, from_references
from polyref.references.reference_set import ReferenceSet
from polyref.samplers.engine import SamplingParameters
from polyref.samplers.sampled import Drawing, stream
from polyref.samplers.weights import systematic
from polyref.scoring.models import ModelSource

logger = logging.getLogger(__name__)

STAYS = ("all", "best", "worst")


@dataclass(frozen=True)
class Agent:
    """What draws `n` completions of each prompt, and which of them `stays`: all, the best or the worst by the reward.

    `who` is policy (as it stands), start (before round 1), earlier (as it was `back` rounds ago, at most the start), references
    (their composition), or the label of a member of these.
    """

    who: str
    n: int
    parameters: SamplingParameters
    system_prompt: str | None = None
    back: int = 1
    stays: str = "all"

    def __post_init__(self) -> None:
        if self.n < 1 or self.back < 1:
            raise ConfigError(f"completions is {self.n} and back {self.back}", fix="give at least 1")
        if self.stays not in STAYS:
            raise ConfigError(f"unknown stays {self.stays!r}", fix=f"use one of {', '.join(STAYS)}")

    @property
    def staying(self) -> int:
        """How many completions of a prompt stay."""
        return self.n if self.stays == "all" else 1


@dataclass(frozen=True)
class Cast:
    """Those an agent may be: the `policies` that there were, the start first, and the `references`."""

    policies: Sequence[Policy]
    references: ReferenceSet
    tokenizer: ModelSource
    batch_size: int


def check_agent(agent: Agent, references: ReferenceSet, who: str) -> None:
    """ConfigError for an agent that is nobody, or asks for what a reference does not do."""
    known = agent.who in ("policy", "start", "earlier", "references")
    if known and agent.who in {member.label for member in references.members}:
        raise ConfigError(f"{who} is {agent.who}, which a reference is called too", fix="give the reference another name")
    if agent.who in ("policy", "start", "earlier"):
        return
    if agent.who != "references" and [member.label for member in references.members].count(agent.who) != 1:
        labels = ", ".join(member.label for member in references.members)
        what = f"{who} is {agent.who!r}, which names no one reference"
        raise ConfigError(what, fix=f"use policy, start, earlier, references, or the name of one of {labels}")
    if agent.system_prompt is not None:
        raise ConfigError(f"{who} is {agent.who}, which has its own system prompt", fix="set it in the reference")
    if agent.who == "references" and len(references) > 1 and (agent.parameters.temperature, agent.parameters.top_p) != (1, 1):
        fix = "leave temperature and top_p out"
        raise ConfigError(f"{who} is the composition of the references, which is drawn as it is", fix=fix)


def open_agent(agent: Agent, cast: Cast, prompts: Sequence[PromptRow], seed: int) -> Callable[[], Draw]:
    """What opens `agent` for `prompts`; nothing is loaded before it is called."""

    def opened() -> Draw:
        known = {"policy": -1, "start": 0, "earlier": max(-1 - agent.back, -len(cast.policies))}
        if agent.who in known:
            options: dict[str, Any] = {"batch_size": cast.batch_size, "seed": seed}
            policy = cast.policies[known[agent.who]]
            options["system_prompt"] = agent.system_prompt
            return from_policy(policy, cast.tokenizer, prompts, agent.n, agent.parameters, **options)
        how = Drawing(agent.n, agent.n, agent.parameters, "auto", None, cast.batch_size, seed)
        if agent.who == "references":
            return from_references(cast.references, prompts, how)
        (member,) = (one for one in cast.references.members if one.label == agent.who)
        draw = from_references(ReferenceSet((member,)), _alone(prompts), how)
        return lambda some: draw(_alone(some))

    return opened


def _alone(prompts: Sequence[PromptRow]) -> list[PromptRow]:
    return [replace(row, reference_weights=None) for row in prompts]


def staying(one: Proposed, agent: Agent) -> list[int]:
    """The indices of the completions of a prompt that stay; of equal rewards the first."""
    rewards = [proposal.rewards[0] for proposal in one.proposals]
    if agent.stays == "all" or not rewards:
        return list(range(len(rewards)))
    return [rewards.index((max if agent.stays == "best" else min)(rewards))]


def equal_draws(
    prompts: Sequence[PromptRow], drawn: Sequence[Proposed], agent: Agent, seed: int
) -> tuple[list[Proposed], dict[str, Any]]:
    """`drawn` with weighted particles resampled to `agent.n` that count alike, and what is to be told of a round's row.

    `inexact_prompts` are those of particles, `short_prompts` those with fewer completions than asked; `note` is the first one.
    Which particles are taken is a number of each prompt under its own weights and in its place among equal ones.
    """
    rows = zip(prompts, drawn, places_among(prompts)(prompts), strict=True)
    found = [_resampled(row, one, agent.n, seed, place) if one.weighted else one for row, one, place in rows]
    inexact, short = sum(not one.exact for one in drawn), sum(len(one.proposals) < agent.n for one in found)
    note = next((one.note for one in drawn if one.note), "")
    told = {"inexact_prompts": inexact, "short_prompts": short, "note": note}
    if inexact or short:
        of = "enhancer %s: %d of %d prompts are drawn by particles, which is approximate; %d got fewer than %d completions%s"
        first = note and f"; the first says: {note}"
        logger.warning(of, agent.who, inexact, len(drawn), short, agent.n, first)
    return found, told


def _resampled(row: PromptRow, one: Proposed, n: int, seed: int, place: int) -> Proposed:
    log_weights = torch.tensor([proposal.log_weight for proposal in one.proposals], dtype=torch.float64)
    uniform = float(stream(seed, "resample", row.prompt, row.reference_weights, place).random())
    chosen = systematic(log_weights, n, uniform).tolist()
    return replace(one, proposals=tuple(replace(one.proposals[i], log_weight=0.0) for i in chosen), exact=False)


def merged(main: Sequence[Proposed], enhancer: Sequence[Proposed]) -> tuple[list[Proposed], list[list[int]]]:
    """The proposals of both for each prompt, those of `main` first, and who made each: 0 or 1."""
    both = [
        Proposed(
            one.proposals + other.proposals,
            one.drawn + other.drawn,
            one.calls + other.calls,
            one.exact and other.exact,
            "; ".join(note for note in (one.note, other.note) if note),
        )
        for one, other in zip(main, enhancer, strict=True)
    ]
    groups = [[0] * len(one.proposals) + [1] * len(other.proposals) for one, other in zip(main, enhancer, strict=True)]
    return both, groups


def refuse_flat(proposed: Sequence[Proposed], number: int) -> None:
    """DataError where every completion of round `number` has the same reward: its labels would say nothing."""
    values = {proposal.rewards[0] for one in proposed for proposal in one.proposals}
    if len(values) == 1:
        what = f"every completion of round {number} has the reward {values.pop():g}"
        raise DataError(what, where="iterate", fix="take a reward that tells completions apart, or draw more or longer ones")
