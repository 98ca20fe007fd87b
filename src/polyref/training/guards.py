"""What a careful person watches during preference training, watched for them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from polyref.errors import ModelError, TrainingDivergedError
from polyref.files import write_bytes

logger = logging.getLogger(__name__)


def check_starts_at_reference(logps: Tensor, anchor: Tensor, dtype: torch.dtype) -> None:
    """Refuse to train a policy whose log-ratios to its own starting point are not 0: logps, anchor (B, 2) in nats.

    Rounding of `dtype` is allowed for. A larger gap means dropout, another dtype or another adapter state, and every reward
    would be measured from the wrong origin.
    """
    gap = (logps.detach() - anchor).abs().max()
    roundings = 64 if torch.finfo(dtype).bits >= 32 else 2  # half types: a sequence's rounding errors average out
    allowed = roundings * torch.finfo(dtype).eps * anchor.abs().max() + 1e-4
    if gap > allowed:
        raise ModelError(
            f"policy and reference are the same model, but their log-probabilities differ by {float(gap):.3g} nats at step 0",
            fix="switch dropout off and score both in one dtype; where the policy starts from a trained adapter, "
            "give references: the base model with that adapter, or without it",
        )


class FallingChosenWarning(TrainerCallback):
    """Says once, in plain words, when the chosen completions lose probability while the margins grow.

    `logps/chosen` averaged over the last `window` log lines is compared with its first value; a fall of more than `share` of
    it, with margins above their first value, warns. It reads the log that checkpoints keep, so a resumed run judges alike.
    """

    def __init__(self, window: int = 3, share: float = 0.05) -> None:
        self.window, self.share = window, share
        self.warned = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Judge the newest log line."""
        if self.warned or not logs or "logps/chosen" not in logs:
            return
        history = [(line["logps/chosen"], line["rewards/margins"]) for line in state.log_history if "logps/chosen" in line]
        if len(history) <= self.window:
            return
        (first, first_margin), recent = history[0], history[-self.window :]
        now = sum(chosen for chosen, _ in recent) / self.window
        margin = sum(m for _, m in recent) / self.window
        if now < first - self.share * abs(first) and margin > first_margin:
            self.warned = True
            logger.warning(
                "chosen completions lost probability (mean log-prob %.1f, at first %.1f) while margins grew: the policy learns "
                "to avoid the rejected ones by moving mass to completions in neither column. Raise beta, lower learning_rate, "
                "stop earlier, or mix in supervised training on the chosen completions.",
                now,
                first,
            )


class WholeWindows(TrainerCallback):
    """Logs before every evaluation and checkpoint and at the end of training, where logging is on at all.

    The means of a log line are then never cut in two by a kill: a resumed run logs the lines of an unbroken one. A checkpoint
    at the end of an epoch waits for that epoch's evaluation, which a run resumed from it would not do any more.
    """

    def __init__(self) -> None:
        self._evaluated: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """No step of this training is evaluated yet."""
        self._evaluated = None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After an evaluation."""
        self._evaluated = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """After an optimiser step."""
        epoch = state.epoch or 0.0
        last_of_epoch = epoch.is_integer() or control.should_training_stop
        if control.should_save and last_of_epoch and args.eval_strategy == "epoch" and args.eval_delay <= epoch:
            control.should_evaluate = True
        return self._log_first(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """After the last step of an epoch, whose evaluation may have been done already."""
        if self._evaluated == state.global_step:
            control.should_evaluate = False
        return self._log_first(args, control)

    @staticmethod
    def _log_first(args: TrainingArguments, control: TrainerControl) -> TrainerControl:
        if args.logging_strategy != "no" and (control.should_save or control.should_evaluate or control.should_training_stop):
            control.should_log = True
        return control


def mean_loss(log_history: Sequence[Mapping[str, Any]], *, otherwise: float) -> float:
    """Mean loss over all logged steps, each line standing for the steps since the one before; `otherwise` if there is none.

    transformers divides by the steps of the last call to `train` alone.
    """
    total, last = 0.0, 0
    for line in log_history:
        if "loss" in line:
            total, last = total + (line["step"] - last) * line["loss"], line["step"]
    return total / last if last else otherwise


def stop_diverged(folder: str | None, step: int, dataset: Any, index: Tensor) -> NoReturn:
    """Save which rows of `dataset`, at `index`, the loss broke on, and stop before the optimiser sees it."""
    rows = [{"source": p.record.source, "row": p.record.row} for p in map(dataset.__getitem__, index.tolist())]
    file = Path(folder or ".") / "nonfinite_batch.json"
    write_bytes(file, json.dumps({"step": step, "rows": rows}, indent=2).encode())
    raise TrainingDivergedError(
        f"the loss is not finite at step {step}; its rows are in {file}; "
        "lower learning_rate, set max_grad_norm, or train in float32"
    )
