"""What the settings of `polyref multistep` mean for the loop: its plan, and what it depends on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from polyref.cli.loop_plan import checked_settings, held_to, training_settings
from polyref.cli.multistep_settings import MultistepSettings
from polyref.cli.settings import peft_config
from polyref.errors import ConfigError
from polyref.training.config import PreferenceConfig

if TYPE_CHECKING:
    from polyref.cli.progress import Meter
    from polyref.cli.training_rewards import Opened
    from polyref.loops.multistep import Plan

ANCHOR = "the original references, at every step"

_REFUSED: dict[str, tuple[object, str]] = {
    "divergence": ("reverse", "the steps lead to the optimum of reverse KL"),
    "objective": ("plain", "what a step draws has no auxiliary pairs"),
    "length_normalise": (False, "the tilt is no optimum of log-ratios divided by lengths"),
    "load_best_model_at_end": (False, "there are no held-out pairs to choose by"),
}
"""Options of training that multi-step rejection sampling has no meaning for: what they must be, and why."""


def check_training(own: MultistepSettings, training: Mapping[str, Any]) -> PreferenceConfig:
    """The configuration of the last step. ConfigError for an option that is the run's own, or has no meaning here."""
    args = checked_settings(training, own.beta, own.output_dir)
    for name, (needed, why) in _REFUSED.items():
        if getattr(args, name) != needed:
            raise ConfigError(f"{name} is {getattr(args, name)}, but {why}", fix="leave it out")
    if args.eval_strategy != "no":
        raise ConfigError("eval_strategy is set, but steps are judged by completions", fix="leave it out")
    return args


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
