"""What the training verbs have in common: their options, and what is said of a run."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from transformers import TrainingArguments

from polyref.cli import checks
from polyref.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULTS: dict[str, Any] = {"save_steps": 0.25, "save_total_limit": 1, "report_to": "none", "disable_tqdm": True}
"""Where the command line differs from the trainers' settings: checkpoints to resume from, and progress bars of its own."""

MAY_CHANGE = ("logging_steps", "save_steps", "save_total_limit", "report_to", "disable_tqdm", "log_level", "cache_dir")

SECRETS = {field.name for field in fields(TrainingArguments) if field.name.endswith("_token")}
"""Options of the trainers that are no settings here: the run folder keeps settings, and says which ones changed."""


def add_training_arguments(parser: ArgumentParser, settings: type[TrainingArguments], skip: Sequence[str] = ()) -> None:
    """Every option of `settings` but those to `skip`, and the run folder. Help shows polyref's own before transformers'."""
    parser.add_class_arguments(settings, skip={"output_dir", "resume_from_checkpoint", *skip} | SECRETS)
    inherited = {field.name for field in fields(TrainingArguments)}
    options = parser._action_groups[-1]
    options.title = "How it is trained: polyref's own options, then those of transformers.TrainingArguments"
    options._group_actions.sort(key=lambda action: action.dest in inherited)
    parser.add_argument("--output_dir", type=str, required=True, help="The run folder.")
    for name in sorted(SECRETS):
        parser.add_argument(f"--{name}", help="Refused, as settings are kept in the run folder: set HF_TOKEN instead.")
    parser.set_defaults(DEFAULTS)
    explanations = _explanations(settings)
    for action in parser._actions:
        action.help = action.help or explanations.get(action.dest)


def _explanations(settings: type[TrainingArguments]) -> dict[str, str]:
    """What each option of `settings` means: its field's own help, or the entry in transformers' docstring."""
    entry = re.compile(r"^ {8}(\w+) \(.*?\):\n((?: {12}.*\n| *\n)+)", re.MULTILINE)
    found = entry.findall(TrainingArguments.__doc__ or "")
    described = {name: " ".join(text.split("\n\n")[0].split()) for name, text in found}
    helps = {field.name: str(field.metadata["help"]) for field in fields(settings) if "help" in field.metadata}
    return {name: text.replace("%", "%%") for name, text in (described | helps).items()}


def check_resumable(values: Mapping[str, Any]) -> None:
    """ConfigError for an option of training under which a run that was killed would end otherwise than an unbroken one."""
    for name in ("save_only_model", "ignore_data_skip", "eval_on_start", "enable_jit_checkpoint"):
        if values.get(name):
            raise ConfigError(f"{name} would make a resumed run another one", fix="leave it out")


def run_folder_of(values: dict[str, Any]) -> Path:
    """The run folder that `values` name, once nothing among them is a secret, or keeps a run from being taken up again."""
    check_resumable(values)
    if given := sorted(name for name in SECRETS if values.pop(name) is not None):
        raise ConfigError(f"{given[0]} is a secret, and settings are kept in the run folder", fix="set HF_TOKEN instead")
    checks.named(values["output_dir"])
    return Path(values["output_dir"])


def stage_folder(run_dir: Path) -> str:
    """The trainer's own output_dir in the run folder."""
    return str(run_dir / "stages" / "train")


def refuse_many_processes() -> None:
    """Run folders are for one process."""
    if (processes := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
        raise ConfigError(
            f"the command line trains in one process, and WORLD_SIZE is {processes}",
            fix="start it without a launcher, or use the trainer in a script under torchrun or accelerate launch",
        )


def pick(values: dict[str, Any], settings: type) -> dict[str, Any]:
    """The entries of `values` that are fields of the dataclass `settings`."""
    names = {field.name for field in fields(settings) if field.init}
    return {name: value for name, value in values.items() if name in names}


def tell_accuracy(summary: Mapping[str, Any]) -> None:
    """The held-out accuracies of `summary`, on the log."""
    for when in ("before", "after"):
        if summary[when] is not None:
            mean, low, high = summary[when]["accuracy"]
            interval = "one prompt gives no interval" if low is None else f"95% interval {low:.3f} to {high:.3f}"
            logger.info("held-out preference accuracy %s training: %.3f (%s)", when, mean, interval)
