"""`polyref multistep`: prompts, references and a reward in; a policy led to the references' tilt in several steps out."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from polyref.cli.loop_settings import LoopPrompts
from polyref.cli.multistep_settings import MultistepSettings
from polyref.cli.training_run import MAY_CHANGE, add_training_arguments, pick, refuse_many_processes, run_folder_of
from polyref.training.config import PreferenceConfig

if TYPE_CHECKING:
    from polyref.rewards.protocols import Reward

logger = logging.getLogger(__name__)

OWN = ("beta", "prompt_format")
"""Options of preference training that are the verb's: each step has its beta, and prompts get their format before it."""


def add_arguments(parser: ArgumentParser) -> None:
    """The verb's settings: policy, rewards, steps, prompts, and the `PreferenceConfig` options of every step's training."""
    parser.add_class_arguments(MultistepSettings, skip={"output_dir"})
    parser.add_class_arguments(LoopPrompts)
    add_training_arguments(parser, PreferenceConfig, skip=OWN)


def run(settings: Namespace) -> None:
    """Take the steps; a killed run goes on with the same command."""
    values = vars(settings)
    run_folder_of(values)
    own, prompts = MultistepSettings(**pick(values, MultistepSettings)), LoopPrompts(**pick(values, LoopPrompts))
    training = {k: v for k, v in pick(values, PreferenceConfig).items() if k not in vars(own) and k not in vars(prompts)}
    make_multistep(own, prompts, training, {k: v for k, v in values.items() if k not in ("config", "output_dir")})


def make_multistep(
    own: MultistepSettings,
    source: LoopPrompts,
    training: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    *,
    reward: Reward | None = None,
    gold: Reward | None = None,
) -> dict[str, Any]:
    """One resumable run in `own.output_dir`; returns its summary, which is also in summary.json.

    `training` are options of `PreferenceConfig`; beta, prompt_format and output_dir are the run's own. `config` is what must
    not change when the run is taken up again, by default all settings. `reward` and `gold` stand in for those that the settings
    name; a run knows them again by their name and, where they have one, their `fingerprint`.
    """
    from polyref.cli.loop_plan import drawing_inputs
    from polyref.cli.multistep_plan import check_training, make_plan
    from polyref.cli.multistep_summary import summary_of, tell, write
    from polyref.cli.progress import Meter
    from polyref.loops.multistep import multistep
    from polyref.stages import RunFolder

    refuse_many_processes()
    args = check_training(own, training)
    fitted = cache(lambda: source.pairs(own.bonus_data))
    rewards = own.rewards.open(fitted, reward, gold)
    if config is None:
        config = {k: v for k, v in vars(own).items() if k != "output_dir"} | vars(source) | dict(training)
    run_dir = Path(own.output_dir)
    with RunFolder(run_dir, config, seeds={"seed": args.seed}, may_change=MAY_CHANGE) as folder:
        prompts, held_out = source.load()
        inputs = drawing_inputs(own.source, own.anchor, prompts, held_out, own.max_new_tokens)
        inputs |= own.rewards.inputs(fitted(), {"the reward": reward, "the gold reward": gold})
        folder.refuse_changed(inputs, "write")
        with Meter("done") as meter:
            plan = make_plan(own, training, args.seed, rewards, meter)
            policy, rows = multistep(folder, plan, prompts, held_out, inputs)
        stage = folder.stage("write", inputs | {"steps": rows})
        if stage.done:
            logger.info("%s is complete; nothing to do", run_dir)
        else:
            summary = summary_of(own, args, rows, prompts, held_out, fitted())
            stage.finish(write(folder, own, summary, policy), info={"depends_on": inputs})
        result: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
        tell(result, run_dir)
        return result
