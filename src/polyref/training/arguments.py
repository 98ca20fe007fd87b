"""What the settings of both trainers check alike, on top of transformers' TrainingArguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from transformers.integrations import get_available_reporting_integrations

from polyref.data.records import PROMPT_FORMATS
from polyref.data.truncate import check_truncation
from polyref.errors import ConfigError

COUNTS: Final = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")

_WITHOUT_EFFECT = {
    "label_smoothing_factor": (0.0, "use label_smoothing, with loss_type smoothed or robust"),
    "train_sampling_strategy": ("random", "leave it out: batches are grouped by length, in an order made from the seed"),
    "torch_compile": (False, "leave it out: the scoring path has not been tried under it"),
}
"""Settings of transformers that the trainers would ignore: their defaults, and what to do instead."""


def check_arguments(args: Any, counts: Sequence[str] = COUNTS) -> None:
    """ConfigError for a number out of range, a word that is none of the choices, or a setting that would have no effect.

    `counts` names the settings that are whole numbers of at least 1.
    """
    for name in counts:
        if getattr(args, name) < 1:
            raise ConfigError(f"{name} is {getattr(args, name)}", fix="give at least 1")
    if not args.learning_rate >= 0:
        raise ConfigError(f"learning_rate is {args.learning_rate}", fix="give at least 0")
    if not args.num_train_epochs > 0 and args.max_steps < 1:
        raise ConfigError(f"num_train_epochs is {args.num_train_epochs}", fix="give a number above 0, or max_steps")
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"seed is {args.seed}", fix="give a whole number from 0, below 2^32")
    check_truncation(args.max_length, args.truncation_mode)
    if args.prompt_format not in PROMPT_FORMATS:
        raise ConfigError(f"unknown prompt_format {args.prompt_format!r}", fix="use as_is, chat or transcript")
    for name, (default, instead) in _WITHOUT_EFFECT.items():
        if getattr(args, name) != default:
            raise ConfigError(f"{name} has no effect here", fix=instead)
    if args.remove_unused_columns:
        raise ConfigError("remove_unused_columns is true", fix="leave it false: the trainer makes its own columns")


def check_control(control: float | str, objective: str) -> None:
    """ConfigError for a control coefficient that is none, or that `objective` would ignore."""
    if control not in ("optimal", "estimated") and (isinstance(control, str) or not 0 <= control < math.inf):
        raise ConfigError(f"control_coefficient is {control!r}", fix="give a number of at least 0, or optimal, or estimated")
    if control != 1.0 and objective != "variance_reduced":
        what = f"control_coefficient has no effect with objective {objective}"
        raise ConfigError(what, fix="set objective to variance_reduced")


def finish_arguments(args: Any, finish: Callable[[], None]) -> None:
    """Run transformers' own `__post_init__`, `finish`, its errors as one line; refuse trackers that are not installed."""
    try:
        finish()
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(str(error), where="training settings", fix="change the setting that it names") from error
    args.dataloader_pin_memory &= torch.accelerator.is_available() and not args.use_cpu
    for tracker in args.report_to or ():
        if tracker not in get_available_reporting_integrations():
            raise ConfigError(f"report_to names {tracker!r}, which is not installed", fix="install it, or give none")


def check_run(args: Any, eval_dataset: Any) -> None:
    """Refuse several accelerators in one process, which transformers would split a batch over, and evaluation of nothing."""
    if args.n_gpu > 1:
        raise ConfigError(f"{args.n_gpu} GPUs are visible to one process", fix="start with torchrun or accelerate launch")
    if args.eval_strategy != "no" and eval_dataset is None:
        raise ConfigError("eval_strategy is set, but there is nothing to evaluate on", fix="give an eval_dataset")
