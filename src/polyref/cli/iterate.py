"""`polyref iterate`: prompts, references and a reward in; a policy trained in rounds on pairs of its own completions out."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from polyref.cli.iterate_settings import IterateSettings
from polyref.cli.loop_settings import LoopPrompts
from polyref.cli.preference_source import JUDGE_BUDGET
from polyref.cli.training_run import MAY_CHANGE, add_training_arguments, pick, refuse_many_processes, run_folder_of
from polyref.training.config import PreferenceConfig

if TYPE_CHECKING:
    from polyref.rewards.protocols import PreferenceModel, Reward

logger = logging.getLogger(__name__)

OWN = ("beta", "prompt_format")
"""Options of preference training that are the verb's."""

ASKING = ("label_how", "port", "annotator", *(f"labeller.{name}" for name in JUDGE_BUDGET))
"""What changes neither pairs nor who is asked: several people may vote, in several ways, and a judge may be asked on."""


def add_arguments(parser: ArgumentParser) -> None:
    """The verb's settings: policy, rewards, rounds, prompts, and the `PreferenceConfig` options of every round's training."""
    parser.add_class_arguments(IterateSettings, skip={"output_dir"})
    parser.add_class_arguments(LoopPrompts)
    add_training_arguments(parser, PreferenceConfig, skip=OWN)
    parser.add_argument("--dry_run", action="store_true", help="Print the plan, with time and disk, and do nothing.")


def run(settings: Namespace) -> None:
    """Take the rounds; a killed run goes on with the same command."""
    values = vars(settings)
    run_folder_of(values)
    dry = values.pop("dry_run")
    own, prompts = IterateSettings(**pick(values, IterateSettings)), LoopPrompts(**pick(values, LoopPrompts))
    training = {k: v for k, v in pick(values, PreferenceConfig).items() if k not in vars(own) and k not in vars(prompts)}
    config = {k: v for k, v in values.items() if k not in ("config", "output_dir")}
    if dry:
        from polyref.cli.iterate_estimate import print_plan

        return print_plan(own, prompts, training, config)
    make_iterate(own, prompts, training, config)
    return None


def make_iterate(
    own: IterateSettings,
    source: LoopPrompts,
    training: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    *,
    reward: Reward | None = None,
    gold: Reward | None = None,
    preference: PreferenceModel | None = None,
) -> dict[str, Any] | None:
    """One resumable run in `own.output_dir`; returns its summary, which is also in summary.json, or None while votes lack.

    `training` are options of `PreferenceConfig`; beta, prompt_format and output_dir are the run's own. `config` is what must
    not change when the run is taken up again, by default all settings. `reward`, `gold` and `preference` stand in for those
    that the settings name; a run knows them again by their name and, where they have one, their `fingerprint`.
    """
    from polyref.cli.iterate_plan import (
        check_labeller,
        check_training,
        inputs_of,
        make_plan,
        offline_of,
        open_labeller,
        open_rewards,
    )
    from polyref.cli.iterate_summary import summary_of, tell, tell_row, write
    from polyref.cli.progress import Meter
    from polyref.loops.iterate import iterate
    from polyref.loops.label import Paused
    from polyref.stages import RunFolder

    refuse_many_processes()
    args = check_training(own, training)
    check_labeller(own, preference)
    fitted = cache(lambda: source.pairs(own.bonus_data))
    rewards = open_rewards(own, fitted, reward, gold)
    if config is None:
        config = {k: v for k, v in vars(own).items() if k != "output_dir"} | vars(source) | dict(training)
    run_dir = Path(own.output_dir)
    with (
        RunFolder(run_dir, config, seeds={"seed": args.seed}, may_change=(*MAY_CHANGE, *ASKING)) as folder,
        ExitStack() as stack,
    ):
        prompts, held_out = source.load()
        offline = offline_of(own, source, held_out)
        given = {"the reward": reward, "the gold reward": gold, "the preference model": preference}
        inputs = inputs_of(own, prompts, held_out, offline.pairs, fitted(), given)
        folder.refuse_changed(inputs, "write")
        labeller = open_labeller(own, preference, run_dir, args.seed, stack)
        with Meter("done") as meter:
            plan = make_plan(own, training, args.seed, rewards, labeller, offline.pairs, meter, tell_row)
            try:
                found = iterate(folder, plan, prompts, held_out, inputs)
            except Paused as paused:
                logger.info("%s", paused)
                return None
        last = folder.stage("write", inputs | {"rounds": found.rows})
        if last.done:
            logger.info("%s is complete; nothing to do", run_dir)
        else:
            summary = summary_of(own, args, found, prompts, held_out, offline, fitted())
            last.finish(write(folder, own, summary, found), info={"depends_on": inputs, **plan.training.told})
        result: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
        tell(result, run_dir)
        return result
