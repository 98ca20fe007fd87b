"""Iterative preference training, online or hybrid [IT], arXiv 2312.11456: draw, score, pair, label, train on all, evaluate.

Round t draws from the policy of round t-1 (and from an enhancer), labels pairs of these completions, and trains on the pairs of
all rounds and the offline ones against the anchor, by default the ORIGINAL references. Every stage is one of a run folder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from polyref.data.prompt_rows import PromptRow
from polyref.data.sources import prompt_key
from polyref.loops.agents import Agent, Cast, equal_draws, merged, open_agent, refuse_flat, staying
from polyref.loops.anchors import Anchor, anchor_of, under, with_anchor
from polyref.loops.evaluate import Estimate
from polyref.loops.generate import Draw, Progress, Proposed, generate, seed_of
from polyref.loops.label import Labeller, label
from polyref.loops.measure import mean_change, measured
from polyref.loops.pairing import Apart, Pairing, pair
from polyref.loops.policies import Policy, from_policy
from polyref.loops.rails import Limits, Stop, stopped, told_before
from polyref.loops.replay import Pairs, Replay, mixed
from polyref.loops.train import Start, Training, train
from polyref.references.reference_set import ReferenceSet
from polyref.rewards.protocols import Reward
from polyref.samplers.engine import SamplingParameters
from polyref.samplers.tilt import Kept
from polyref.scoring.models import ModelSource
from polyref.stages import RunFolder, plain
from polyref.types import PreferenceRecord

Row = dict[str, Any]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a run does, whatever it does it to.

    `open_gold` gives the gold reward, if there is one, which no stage but evaluation asks for. `labeller` labels pairs where
    the reward does not; `apart` makes distances of the pairs of earlier rounds, for the pairing farthest. `batch` prompts are a
    round's own, None: all are every round's. `told` is told of each row.
    """

    model: ModelSource
    references: ReferenceSet
    open_reward: Callable[[], Reward]
    open_gold: Callable[[], Reward] | None
    beta: float
    rounds: int
    batch: int | None
    main: Agent
    enhancer: Agent | None
    pairing: Pairing
    labeller: Labeller | None
    apart: Callable[[Sequence[PreferenceRecord]], Apart] | None
    offline: Pairs
    replay: Replay
    anchor: Anchor
    from_start: bool
    limits: Limits
    parameters: SamplingParameters
    eval_completions: int
    batch_size: int
    prompts_at_once: int
    seed: int
    training: Training
    progress: Progress
    told: Callable[[Row], None]


@dataclass(frozen=True)
class Outcome:
    """The policies, the start first, a row of numbers for each, and why the loop ended before its last round, if it did."""

    policies: list[Policy]
    rows: list[Row]
    stop: Stop | None

    @property
    def kept(self) -> int:
        """The round whose policy is the final one: the last, or the last before a rail was broken."""
        return len(self.rows) - 1 if self.stop is None else self.stop.keep


def iterate(
    folder: RunFolder, plan: Plan, prompts: Sequence[PromptRow], held_out: Sequence[PromptRow], inputs: dict[str, str]
) -> Outcome:
    """Rounds until the last one, or until a rail is broken; what is done in `folder` is not done again.

    `inputs` are those of the run.
    """
    judged = held_out or prompts
    different = len({prompt_key(row.prompt) for row in judged})
    policies, pairs, outputs = [Policy(plan.model)], list[Pairs](), dict(inputs)
    anchor, _ = anchor_of(folder, plan.anchor, policies, plan.references, outputs)
    start, row = _evaluate(folder, plan, policies[0], judged, None, anchor, outputs, 0)
    rows, drawn, stop = [{"round": 0} | row], [start], None

    def change(name: str, before: int, after: int) -> Estimate:
        which = ("reward", "gold").index(name)
        return mean_change(judged, drawn[before], drawn[after], which, seed=plan.seed)

    _record(folder, plan, rows[0])
    for line in told_before(rows[0], plan.limits, different):
        logger.warning("%s", line)
    for number in range(1, plan.rounds + 1):
        counts = _pairs(folder, plan, policies, batch_of(prompts, plan, number), pairs, outputs, number)
        anchor, more = anchor_of(folder, plan.anchor, policies, plan.references, outputs)
        outputs |= more
        policy, about = _train(folder, plan, policies, pairs, anchor, outputs, number)
        policies.append(policy)
        now, row = _evaluate(folder, plan, policy, judged, start, anchor, outputs, number)
        drawn.append(now)
        rows.append({"round": number} | counts | about | row)
        _record(folder, plan, rows[-1])
        if (stop := stopped(rows, plan.limits, change, different)) is not None:
            break
    return Outcome(policies, rows, stop)


def batch_of(prompts: Sequence[PromptRow], plan: Plan, number: int) -> Sequence[PromptRow]:
    """The prompts of round `number`: all, or the next so many, none of them twice in a run."""
    return prompts if plan.batch is None else prompts[(number - 1) * plan.batch : number * plan.batch]


def _pairs(
    folder: RunFolder,
    plan: Plan,
    policies: Sequence[Policy],
    prompts: Sequence[PromptRow],
    pairs: list[Pairs],
    outputs: dict[str, str],
    number: int,
) -> Row:
    """Draw, score, pair and label: the round's pairs are added to `pairs`, its outputs to `outputs`; returns its counts."""
    earlier = [record for one in (plan.offline, *pairs) for record in one]
    main = _draw(folder, plan, plan.main, policies, prompts, outputs, "generate", number)
    kept, groups, proposed, enhanced = [staying(one, plan.main) for one in main], None, main, Row()
    if plan.enhancer is not None:
        drawn = _draw(folder, plan, plan.enhancer, policies, prompts, outputs, "enhance", number)
        other, enhanced = equal_draws(prompts, drawn, plan.enhancer, seed_of(plan.seed, "enhance", number))
        proposed, groups = merged(main, other)
        shifted = zip(kept, main, other, strict=True)
        kept = [own + [len(one.proposals) + i for i in staying(two, plan.enhancer)] for own, one, two in shifted]
    counts: Row = {"completions": sum(one.drawn for one in proposed), "tokens": sum(one.calls for one in proposed)} | enhanced
    if plan.labeller is None:
        refuse_flat(proposed, number)
    stage = folder.stage(f"pair-{number}", outputs)
    how, apart = replace(plan.pairing, seed=seed_of(plan.seed, "pair", number)), plan.apart(earlier) if plan.apart else None
    records, told = pair(stage, prompts, proposed, [_kept(some) for some in kept], how, groups=groups, apart=apart)
    outputs |= stage.outputs
    if plan.labeller is not None:
        stage = folder.stage(f"label-{number}", outputs)
        records, labelled = label(stage, records, plan.labeller, number)
        outputs |= stage.outputs
        told |= labelled
    pairs.append(records)
    return counts | told


def _draw(
    folder: RunFolder,
    plan: Plan,
    agent: Agent,
    policies: Sequence[Policy],
    prompts: Sequence[PromptRow],
    outputs: dict[str, str],
    name: str,
    number: int,
) -> list[Proposed]:
    """Completions of `agent` with the training reward, which alone is opened."""
    stage = folder.stage(f"{name}-{number}", outputs)
    cast = Cast(policies, plan.references, plan.model, plan.batch_size)
    opened = open_agent(agent, cast, prompts, seed_of(plan.seed, name, number))
    options: Row = {"prompts_at_once": plan.prompts_at_once, "progress": plan.progress}
    found = generate(stage, prompts, opened, lambda: [plan.open_reward()], **options)
    outputs |= stage.outputs
    return found


def _train(
    folder: RunFolder,
    plan: Plan,
    policies: Sequence[Policy],
    pairs: Sequence[Pairs],
    anchor: ReferenceSet,
    outputs: dict[str, str],
    number: int,
) -> tuple[Policy, Row]:
    """The policy of round `number`, trained on what `replay` takes, from the one before or from the start."""
    policy = policies[0] if plan.from_start else policies[-1]
    records = mixed(pairs, plan.offline, plan.replay, seed=seed_of(plan.seed, "offline", number))
    fixed = plan.anchor.kind == "references"
    own = not fixed and policy is policies[-1] and (number == 1 or plan.anchor.kind == "previous")
    at: Start = "anchor" if own else "unknown" if fixed and policy is policies[0] else "moved"
    stage, how = folder.stage(f"train-{number}", outputs), replace(plan.training, references=anchor)
    some = under(anchor, plan.references, records)
    policy, about = train(folder, stage, dict(outputs), policy, some, plan.beta, how, number, at=at)
    outputs |= stage.outputs
    return policy, about


def _evaluate(
    folder: RunFolder,
    plan: Plan,
    policy: Policy,
    prompts: Sequence[PromptRow],
    start: Sequence[Proposed] | None,
    anchor: ReferenceSet,
    outputs: dict[str, str],
    number: int,
) -> tuple[list[Proposed], Row]:
    """Completions of `policy` as it is after round `number`, drawn with the same randomness every time, and what they say."""
    stage, seed = folder.stage(f"evaluate-{number}", outputs), seed_of(plan.seed, "evaluate", 0)
    options: Row = {"batch_size": plan.batch_size, "seed": seed}
    references, rows = with_anchor(plan.references, anchor, prompts)

    def open_draw() -> Draw:
        draw = from_policy(policy, plan.model, rows, plan.eval_completions, plan.parameters, scored=references, **options)
        return lambda some: draw(with_anchor(plan.references, anchor, some)[1])

    openers = [one for one in (plan.open_reward, plan.open_gold) if one is not None]
    how: Row = {"prompts_at_once": plan.prompts_at_once, "progress": plan.progress}
    drawn = generate(stage, prompts, open_draw, lambda: [one() for one in openers], **how)
    moving = anchor is not plan.references
    return drawn, measured(prompts, drawn, drawn if start is None else start, plan.references, moving=moving, seed=plan.seed)


def _record(folder: RunFolder, plan: Plan, row: Row) -> None:
    """A line of metrics.jsonl for `row`, once, and tell of it. One of other numbers goes, with all that came after it."""
    number, values = row["round"], plain({f"eval_{name}": value for name, value in row.items() if name != "round"})

    def before(line: Row) -> bool:
        return line["round"] < number or (line["round"] == number and "eval_reward" not in line)

    rows = [line for line in folder.read_metrics() if line["round"] == number]
    if not any(values.items() <= line.items() for line in rows):
        folder.keep_metrics(before)
        step = max((line["step"] for line in rows if before(line)), default=0)
        folder.append_metrics({"round": number, "step": step} | values)
    plan.told(row)


def _kept(indices: Sequence[int]) -> Kept:
    """All of `indices`, chosen by no tilt."""
    chosen = torch.tensor(indices, dtype=torch.int64)
    return Kept(chosen, torch.zeros(len(indices), dtype=torch.float64), None, len(indices), None, len(indices), False, "")
