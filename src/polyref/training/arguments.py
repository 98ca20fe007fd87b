"""What the settings of both trainers check alike, on top of transformers' TrainingArguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils.data import DataLoader
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import logging as transformers_logging

from polyref.data.records import PROMPT_FORMATS
from polyref.data.truncate import check_truncation
from polyref.errors import ConfigError, PolyrefError

if TYPE_CHECKING:
    from transformers import Trainer

COUNTS: Final = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")

_WITHOUT_EFFECT = {
    "label_smoothing_factor": (0.0, "use label_smoothing, with loss_type smoothed or robust"),
    "train_sampling_strategy": ("random", "leave it out: batches are grouped by length, in an order made from the seed"),
    "torch_compile": (False, "leave it out: the scoring path has not been tried under it"),
    "use_liger_kernel": (False, "leave it out: the scoring path has a head of its own"),
    "prediction_loss_only": (False, "leave it out: predictions are one number a row"),
    "eval_do_concat_batches": (True, "leave it out: predictions are one number a row"),
    "batch_eval_metrics": (False, "leave it out: metrics are means over pairs already"),
}
"""Settings of transformers that the trainers would ignore: their defaults, and what to do instead."""

_MANY = 1_000_000
"""Steps that a schedule is tried on where epochs are given, and nothing is known of the data yet."""

_HALF_EVALUATION = ("bf16_full_eval", "fp16_full_eval")
"""Under these transformers casts the very weights that are trained, where it is asked to evaluate before training."""


def check_arguments(args: Any, counts: Sequence[str] = COUNTS) -> None:
    """ConfigError for a number out of range, a word that is none of the choices, or a setting that would have no effect.

    `counts` names the settings that are whole numbers of at least 1.
    """
    for name in counts:
        if getattr(args, name) < 1:
            raise ConfigError(f"{name} is {getattr(args, name)}", fix="give at least 1")
    if not args.learning_rate >= 0:
        raise ConfigError(f"learning_rate is {args.learning_rate}", fix="give at least 0")
    if not 0 < args.num_train_epochs < math.inf and args.max_steps < 1:
        raise ConfigError(f"num_train_epochs is {args.num_train_epochs}", fix="give a number above 0, or max_steps")
    for name in ("seed", "data_seed"):
        if not 0 <= (getattr(args, name) or 0) < 2**32:
            raise ConfigError(f"{name} is {getattr(args, name)}", fix="give a whole number from 0, below 2^32")
    check_truncation(args.max_length, args.truncation_mode)
    if args.prompt_format not in PROMPT_FORMATS:
        raise ConfigError(f"unknown prompt_format {args.prompt_format!r}", fix="use as_is, chat or transcript")
    if args.eval_accumulation_steps is not None and args.eval_accumulation_steps < 1:
        raise ConfigError(f"eval_accumulation_steps is {args.eval_accumulation_steps}", fix="give at least 1, or leave it out")
    for name in _HALF_EVALUATION:
        if getattr(args, name):
            raise ConfigError(f"{name} would cast the weights that are trained", fix="use bf16 or fp16, or leave it out")
    _refuse_ignored(args)
    if args.remove_unused_columns:
        raise ConfigError("remove_unused_columns is true", fix="leave it false: the trainer makes its own columns")


def _refuse_ignored(args: Any) -> None:
    for name, (default, instead) in _WITHOUT_EFFECT.items():
        if (getattr(args, name) or False) != default:
            raise ConfigError(f"{name} has no effect here", fix=instead)


def check_control(control: float | str, objective: str) -> None:
    """ConfigError for a control coefficient that is none, or that `objective` would ignore."""
    if control not in ("optimal", "estimated") and (isinstance(control, str) or not 0 <= control < math.inf):
        raise ConfigError(f"control_coefficient is {control!r}", fix="give a number of at least 0, or optimal, or estimated")
    if control != 1.0 and objective != "variance_reduced":
        what = f"control_coefficient has no effect with objective {objective}"
        raise ConfigError(what, fix="set objective to variance_reduced")


def finish_arguments(args: Any, finish: Callable[[], None]) -> None:
    """Run transformers' own `__post_init__`, `finish`, its errors as one line; refuse trackers that are not installed."""
    with as_settings(LookupError, OSError, RuntimeError, TypeError):
        finish()
        _try_loading(args)
    _refuse_ignored(args)  # torch_compile is switched on by others
    if args.accelerator_config.dispatch_batches:
        fix = "leave it out: every process makes its own batches"
        raise ConfigError("dispatch_batches would cut batches whose tensors differ in length", fix=fix)
    if args.log_level not in (levels := transformers_logging.get_log_levels_dict()) and args.log_level != "passive":
        raise ConfigError(f"unknown log_level {args.log_level!r}", fix=f"use one of {', '.join(levels)}, or passive")
    args.dataloader_pin_memory &= torch.accelerator.is_available() and not args.use_cpu
    for tracker in args.report_to or ():
        if tracker not in get_available_reporting_integrations():
            raise ConfigError(f"report_to names {tracker!r}, which is not installed", fix="install it, or give none")


@contextmanager
def as_settings(*kinds: type[Exception]) -> Iterator[None]:
    """What transformers and torch say of settings that they cannot use, as one line: ImportError, ValueError, and `kinds`."""
    said: tuple[type[Exception], ...] = (ImportError, NotImplementedError, ValueError, *kinds)
    try:
        yield
    except PolyrefError:
        raise
    except said as error:
        raise ConfigError(str(error), where="training settings", fix="change the setting that it names") from error


def _try_loading(args: Any) -> None:
    """Make a loader of one row, which starts no worker, as the settings would have it."""
    names = ("num_workers", "persistent_workers", "multiprocessing_context", "prefetch_factor")
    DataLoader([0], **{name: getattr(args, f"dataloader_{name}") for name in names})  # type: ignore[arg-type]


def check_optimiser(trainer: Trainer) -> None:
    """ConfigError for an optimiser or a schedule that cannot be made of the settings, before anything is scored or trained.

    One that hooks into the model as it is made is left to the training itself.
    """
    args, given = trainer.args, trainer.lr_scheduler
    if trainer.optimizer is not None or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    if any(word in str(getattr(args.optim, "value", args.optim)) for word in ("lomo", "layerwise")):
        return
    with as_settings(LookupError, RuntimeError, TypeError):
        trainer.create_optimizer()
        trainer.create_scheduler(num_training_steps=args.max_steps if args.max_steps > 0 else _MANY)
    trainer.optimizer, trainer.lr_scheduler = None, given
    trainer._created_lr_scheduler = False  # or training would drop a schedule that is given later


def check_run(args: Any, eval_dataset: Any) -> None:
    """Refuse several accelerators in one process, which transformers would split a batch over, and evaluation of nothing."""
    if args.n_gpu > 1:
        fix = "set CUDA_VISIBLE_DEVICES to one of them, or start a script with torchrun or accelerate launch"
        raise ConfigError(f"{args.n_gpu} GPUs are visible to one process", fix=fix)
    if args.eval_strategy != "no" and eval_dataset is None:
        raise ConfigError("eval_strategy is set, but there is nothing to evaluate on", fix="give an eval_dataset")
