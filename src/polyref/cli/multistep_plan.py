"""What the settings of `polyref multistep` mean for the loop: its plan, and what it depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from polyref.cli.multistep_settings import MultistepSettings
from polyref.cli.settings import peft_config
from polyref.cli.training_run import DEFAULTS, check_resumable
from polyref.errors import ConfigError
from polyref.training.config import PreferenceConfig

if TYPE_CHECKING:
    from polyref.cli.progress import Meter
    from polyref.cli.training_rewards import Opened
    from polyref.data.prompt_rows import PromptRow
    from polyref.loops.multistep import Plan
    from polyref.references.reference_set import ReferenceSet
    from polyref.scoring.models import ModelSource

_REFUSED: dict[str, tuple[object, str]] = {
    "divergence": ("reverse", "the steps lead to the optimum of reverse KL"),
    "objective": ("plain", "what a step draws has no auxiliary pairs"),
    "length_normalise": (False, "the tilt is no optimum of log-ratios divided by lengths"),
    "load_best_model_at_end": (False, "there are no held-out pairs to choose by"),
}
"""Options of training that multi-step rejection sampling has no meaning for: what they must be, and why."""


def check_training(own: MultistepSettings, training: Mapping[str, Any]) -> PreferenceConfig:
    """The configuration of the last step. ConfigError for an option that is the run's own, or has no meaning here."""
    if given := sorted({"beta", "prompt_format", "output_dir"} & training.keys()):
        raise ConfigError(f"training has {given[0]}, which is the run's own", fix="leave it out, or set it beside training")
    args = training_settings(training, own.beta, own.output_dir)
    for name, (needed, why) in _REFUSED.items():
        if getattr(args, name) != needed:
            raise ConfigError(f"{name} is {getattr(args, name)}, but {why}", fix="leave it out")
    if args.eval_strategy != "no":
        raise ConfigError("eval_strategy is set, but steps are judged by completions", fix="leave it out")
    return args


def training_settings(training: Mapping[str, Any], beta: float, folder: str) -> PreferenceConfig:
    """The configuration of one training. ConfigError for an option that there is none of, or under which no run resumes."""
    check_resumable(training)
    try:
        return PreferenceConfig(**DEFAULTS | dict(training) | {"beta": beta, "output_dir": folder})
    except TypeError as error:
        raise ConfigError(str(error), where="training settings", fix="name options of PreferenceConfig") from error


ANCHOR = "the original references, at every step"


def held_to(anchor: str, source: ModelSource, references: ReferenceSet) -> dict[str, Any]:
    """What manifest and summary say of the KL: the `anchor` in words, and the dtypes of the policy and of each reference."""
    dtypes = {"policy": source.dtype, "references": [member.scoring_dtype for member in references.members]}
    return {"anchor": anchor, "dtypes": dtypes}


def drawing_inputs(
    source: ModelSource,
    references: ReferenceSet,
    prompts: Sequence[PromptRow],
    held_out: Sequence[PromptRow],
    max_new_tokens: int,
) -> dict[str, str]:
    """What drawing depends on, by the words that a refusal uses for it: the prompts, the weights of policy and references.

    DataError for a prompt that leaves no room for a completion in the context of the policy or of a reference.
    """
    from polyref.references.reference_set import Reference, ReferenceSet
    from polyref.samplers.references import refuse_long, without_room
    from polyref.stages import content_digest, plain
    from polyref.training.inputs import model_inputs, reference_inputs

    inputs = {
        "prompts": content_digest([plain(row) for row in prompts]),
        "held-out prompts": content_digest([plain(row) for row in held_out]),
        **model_inputs(source, "policy"),
    }
    inputs |= reference_inputs(references, "reference", inputs["tokenizer"])
    own = Reference(**asdict(source))
    for members in (references, ReferenceSet((own,))):
        everything = [*prompts, *held_out]
        refuse_long(everything, without_room(everything, members, max_new_tokens), max_new_tokens)
    return inputs


def make_plan(own: MultistepSettings, training: Mapping[str, Any], seed: int, rewards: Opened, meter: Meter) -> Plan:
    """The plan of the loop."""
    from polyref.cli.progress import TrainingProgress
    from polyref.loops.multistep import Plan
    from polyref.loops.pairing import Pairing
    from polyref.loops.train import Training
    from polyref.samplers.engine import SamplingParameters

    how = Training(
        own.anchor,
        own.source,
        partial(training_settings, training),
        None if own.lora is None else partial(peft_config, own.lora),
        [TrainingProgress(meter)],
        meter,
        held_to(ANCHOR, own.source, own.anchor),
    )
    return Plan(
        model=own.source,
        references=own.anchor,
        open_reward=rewards.reward,
        open_gold=rewards.gold,
        beta=own.beta,
        steps=own.equal_steps,
        acceptance=own.acceptance,
        most_steps=own.most_steps,
        proposals=own.proposals,
        keep=own.keep,
        method=own.method,
        budget=own.budget,
        parameters=SamplingParameters(own.max_new_tokens),
        r_max=own.r_max,
        correct=own.correct,
        pairing=Pairing(own.pairing, own.pairs, own.labels, own.min_margin, own.tie_within, seed),
        eval_completions=own.eval_completions,
        batch_size=own.batch_size,
        prompts_at_once=own.prompts_at_once,
        seed=seed,
        training=how,
        progress=meter,
    )
