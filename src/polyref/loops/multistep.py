"""Multi-step rejection-sampling optimisation [IT], arXiv 2312.11456: to the tilt of the references, by way of larger betas.

Step k proposes from the policy fitted at step k-1 (from the references at first), keeps by exp(r (1/beta_k - 1/beta_{k-1})),
and fits pairs of what it kept at beta_k against the ORIGINAL references. With one step it is RSO, arXiv 2309.06657.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from polyref.data.prompt_rows import PromptRow
from polyref.errors import DataError
from polyref.loops.accept import Acceptance, accept_all
from polyref.loops.evaluate import evaluated
from polyref.loops.generate import Draw, Progress, Proposed, finite, generate, seed_of
from polyref.loops.pairing import Pairing, pair
from polyref.loops.policies import Policy, from_policy, from_references
from polyref.loops.train import Training, train
from polyref.objectives.metrics import mean_interval
from polyref.references.reference_set import ReferenceSet
from polyref.rewards.protocols import Reward
from polyref.samplers.engine import SamplingParameters
from polyref.samplers.sampled import Drawing
from polyref.samplers.schedule import adapted_beta, equal_steps, step_beta
from polyref.samplers.tilt import Kept
from polyref.scoring.models import ModelSource
from polyref.stages import RunFolder

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a multi-step run does, whatever it does it to.

    `steps` equal in 1/beta, or adapted to `acceptance`, at most `most_steps`. `open_gold` gives the gold reward, if there is
    one, which evaluation alone asks for.
    """

    model: ModelSource
    references: ReferenceSet
    open_reward: Callable[[], Reward]
    open_gold: Callable[[], Reward] | None
    beta: float
    steps: int | None
    acceptance: float | None
    most_steps: int
    proposals: int
    keep: int
    method: str
    budget: int | None
    parameters: SamplingParameters
    r_max: float | None
    correct: bool
    pairing: Pairing
    eval_completions: int
    batch_size: int
    prompts_at_once: int
    seed: int
    training: Training
    progress: Progress


def multistep(
    folder: RunFolder, plan: Plan, prompts: Sequence[PromptRow], held_out: Sequence[PromptRow], inputs: dict[str, str]
) -> tuple[Policy, list[Row]]:
    """The policy fitted at the last step, and a row of numbers for the start and each step. `inputs` are those of the run.

    Every stage is one of `folder`: what is done there is not done again.
    """
    policy = Policy(plan.model)
    judged = held_out or prompts
    start, told = _evaluate(folder, plan, policy, judged, None, inputs, 0)
    rows: list[Row] = [{"step": 0, "beta": None} | told]
    previous: float | None = None
    outputs = inputs
    while previous != plan.beta and len(rows) <= (plan.steps or plan.most_steps):
        step = len(rows)
        proposed, outputs = _propose(folder, plan, policy, prompts, outputs, step)
        beta = _next_beta(plan, previous, proposed, step)
        row = {"step": step, "beta": beta, "step_beta": step_beta(previous, beta)}
        row |= _counted(proposed)
        original = plan.references if plan.correct and step > 1 else None
        how = Acceptance(beta, previous, plan.keep, plan.r_max, seed_of(plan.seed, "accept", step), original)
        kept = accept_all(prompts, proposed, how, step)
        row |= _kept(kept, plan)
        stage = folder.stage(f"pair-{step}", outputs)
        records, counts = pair(stage, prompts, proposed, kept, plan.pairing)
        outputs = inputs | stage.outputs
        stage = folder.stage(f"train-{step}", outputs)
        policy, about = train(folder, stage, outputs, policy, records, beta, plan.training, step)
        outputs = inputs | stage.outputs
        _, told = _evaluate(folder, plan, policy, judged, start, outputs, step)
        rows.append(row | counts | about | told)
        previous = beta
    return policy, rows


def _next_beta(plan: Plan, previous: float | None, proposed: Sequence[Proposed], step: int) -> float:
    """beta_k of the schedule, or the one at which proposals are accepted as often as asked."""
    if plan.acceptance is None:
        return plan.beta if step == plan.steps else equal_steps(plan.beta, plan.steps or 1)[step - 1]
    rewards = [torch.tensor([p.rewards[0] for p in one.proposals], dtype=torch.float64) for one in proposed if one.proposals]
    if not rewards:
        fix = "raise budget, or take method smc"
        raise DataError(f"no prompt got a proposal at step {step}", where="multistep", fix=fix)
    known = None if plan.r_max is None else [plan.r_max] * len(rewards)
    return adapted_beta(rewards, previous, plan.beta, plan.acceptance, r_max=known)


def _propose(
    folder: RunFolder, plan: Plan, policy: Policy, prompts: Sequence[PromptRow], inputs: dict[str, str], step: int
) -> tuple[list[Proposed], dict[str, str]]:
    """Scored proposals of step `step`, and what later stages depend on."""
    stage, seed = folder.stage(f"propose-{step}", inputs), seed_of(plan.seed, "propose", step)
    how = Drawing(plan.proposals, plan.proposals, plan.parameters, plan.method, plan.budget, plan.batch_size, seed)

    def open_draw() -> Draw:
        if step == 1:
            return from_references(plan.references, prompts, how)
        options: Row = {"batch_size": plan.batch_size, "seed": seed}
        options["scored"] = plan.references if plan.correct else None
        return from_policy(policy, plan.model, prompts, plan.proposals, plan.parameters, **options)

    options: Row = {"prompts_at_once": plan.prompts_at_once, "progress": plan.progress}
    proposed = generate(stage, prompts, open_draw, lambda: [plan.open_reward()], **options)
    return proposed, inputs | stage.outputs


def _evaluate(
    folder: RunFolder,
    plan: Plan,
    policy: Policy,
    prompts: Sequence[PromptRow],
    start: Sequence[Proposed] | None,
    inputs: dict[str, str],
    step: int,
) -> tuple[list[Proposed], Row]:
    """Completions of `policy` as it is after `step`, drawn with the same randomness at every step, and what they say."""
    stage, seed = folder.stage(f"evaluate-{step}", inputs), seed_of(plan.seed, "evaluate", 0)
    options: Row = {"batch_size": plan.batch_size, "seed": seed, "scored": plan.references}

    def open_draw() -> Draw:
        return from_policy(policy, plan.model, prompts, plan.eval_completions, plan.parameters, **options)

    openers = [one for one in (plan.open_reward, plan.open_gold) if one is not None]
    how: Row = {"prompts_at_once": plan.prompts_at_once, "progress": plan.progress}
    drawn = generate(stage, prompts, open_draw, lambda: [one() for one in openers], **how)
    return drawn, evaluated(prompts, drawn, start if start is not None else drawn, plan.references, seed=plan.seed)


def _counted(proposed: Sequence[Proposed]) -> Row:
    return {
        "proposals": sum(one.drawn for one in proposed),
        "scored": sum(len(one.proposals) for one in proposed),
        "tokens": sum(one.calls for one in proposed),
        "exact_prompts": sum(one.exact for one in proposed),
        "prompts_without_proposals": sum(not one.proposals for one in proposed),
    }


def _kept(kept: Sequence[Kept | None], plan: Plan) -> Row:
    """What was kept, with the acceptance of each prompt, None where proposals were weighed instead.

    `above_r_max` counts prompts of which a proposal was above the bound that was claimed: their tilt is approximate.
    """
    rates = [None if one is None or one.acceptance is None else one.acceptance.mean for one in kept]
    known = [rate for rate in rates if rate is not None]
    rejected = [one for one in kept if one is not None and one.acceptance is not None]
    return {
        "acceptance": [finite(end) for end in mean_interval(known, seed=plan.seed)] if known else None,
        "acceptance_by_prompt": rates,
        "kept": sum(len(one.indices) for one in kept if one is not None),
        "ess": sum(one.ess for one in kept if one is not None),
        "kept_by_prompt": [0 if one is None else len(one.indices) for one in kept],
        "exact_tilts": sum(one is not None and one.exact for one in kept),
        "above_r_max": 0 if plan.r_max is None else sum(not one.exact for one in rejected),
    }
