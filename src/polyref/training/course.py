"""The resumable course of a training in a run folder: evaluated, trained from its newest checkpoint, evaluated again.

A run of several trainings numbers them from 1: each row of metrics.jsonl then says its `round`, as do the names of stages.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, set_seed

from polyref.data.sources import by_prompt
from polyref.files import write_bytes
from polyref.stages import RunFolder, Stage
from polyref.training.checkpoints import last_checkpoint, seal
from polyref.training.dataset import ScoredPairs
from polyref.training.evaluate import plain_interval, preference_report

logger = logging.getLogger(__name__)


def train_and_evaluate(
    folder: RunFolder, stage: Stage, inputs: dict[str, str], trainer: Trainer, *, held_out: bool, number: int = 0
) -> dict[str, Any]:
    """Evaluate, train from the newest checkpoint in `stage`, evaluate again: the part of the summary that every training has.

    `inputs` are those of the stage, `number` the round, 0 in a run of one training. Metrics past the checkpoint, and those of
    later rounds, are dropped.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Sealer())
    dataset: Any = trainer.eval_dataset
    shared = _shared_prompts(trainer) if held_out else 0
    suffix = f"-{number}" if number else ""
    before = _evaluated(folder, trainer, dataset, f"before{suffix}", inputs) if held_out else None
    checkpoint = last_checkpoint(stage.folder)
    if checkpoint and not _told(folder, checkpoint, number):  # an earlier round was done again, and took the lines along
        shutil.rmtree(checkpoint)
        checkpoint = None
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0

    def keep(row: dict[str, Any]) -> bool:  # the last line is written anew
        at = row.get("round", 0)
        return at < number or (at == number and row["step"] <= done and "total_flos" not in row)

    folder.keep_metrics(keep)
    _train_from(trainer, checkpoint)
    after = _evaluated(folder, trainer, dataset, f"after{suffix}", inputs) if held_out else None
    return {"shared_prompts": shared, "before": before, "after": after}


def _told(folder: RunFolder, checkpoint: Path, number: int) -> bool:
    """Whether metrics.jsonl has the lines of the steps before `checkpoint`."""
    logged = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).log_history
    return {line["step"] for line in logged} <= {row["step"] for row in folder.read_metrics() if row.get("round", 0) == number}


def _train_from(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train from `checkpoint`, or from the start. At the last step only the weights are taken, and the last line is written.

    transformers would train one step more where max_steps ends inside an epoch.
    """
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else None
    if checkpoint and state and state.best_model_checkpoint is not None:
        # the run folder may have another path by now, and transformers would go on without the best
        best = checkpoint.parent / Path(state.best_model_checkpoint).name
        state.best_model_checkpoint = str(best) if best.is_dir() else None
        trainer.add_callback(_Best(state.best_model_checkpoint))
    if state is None or state.global_step < state.max_steps:
        set_seed(trainer.args.seed)  # evaluation and scoring, found done or not, leave no trace in what is drawn
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return
    trainer.state = state
    trainer._load_from_checkpoint(str(checkpoint))
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        trainer._load_best_model()
    trainer.log({"total_flos": state.total_flos, "train_loss": 0.0})


def _shared_prompts(trainer: Trainer) -> int:
    """How many held-out prompts are trained on too; more than none is worth a warning."""
    train, held_out = (
        by_prompt(pair.record for pair in dataset.pairs).keys()  # type: ignore[union-attr]
        for dataset in (trainer.train_dataset, trainer.eval_dataset)
    )
    if shared := len(train & held_out):
        logger.warning("%d of %d held-out prompts are trained on too: their accuracy flatters", shared, len(held_out))
    return shared


def _evaluated(folder: RunFolder, trainer: Trainer, dataset: ScoredPairs, when: str, inputs: dict[str, str]) -> dict[str, Any]:
    def report() -> dict[str, Any]:
        found = preference_report(trainer, dataset, seed=trainer.args.seed)
        return found | {name: plain_interval(found[name]) for name in ("accuracy", "margin")}

    return kept_report(folder, when, inputs, report)


def kept_report(folder: RunFolder, when: str, inputs: dict[str, str], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The held-out report that `make` makes, kept as a stage so that a resumed run does not make it twice."""
    stage = folder.stage(f"evaluate-{when}", inputs)
    file = stage.folder / "report.json"
    if not stage.done:
        write_bytes(file, json.dumps(make()).encode())
        stage.finish([file])
    result: dict[str, Any] = json.loads(file.read_text())
    return result


class _Sealer(TrainerCallback):
    """Seals each checkpoint as it is saved."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class _Best(TrainerCallback):
    """Says where the best checkpoint so far is, as training goes on."""

    def __init__(self, folder: str | None) -> None:
        self.folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.best_model_checkpoint = self.folder


def metrics_writer(folder: RunFolder, number: int = 0) -> TrainerCallback:
    """What writes each log line of a training, round `number`, into metrics.jsonl; times are left out."""
    return _Writer(folder, {"round": number} if number else {})


class _Writer(TrainerCallback):
    def __init__(self, folder: RunFolder, start: dict[str, Any]) -> None:
        self.folder, self.start = folder, start

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        times = ("_runtime", "_preparation_time", "_per_second")
        timeless = {k: v for k, v in (logs or {}).items() if not k.endswith(times)}
        if not any("loss" in line for line in state.log_history):
            timeless.pop("train_loss", None)  # a mean over the steps since the last resume alone
        self.folder.append_metrics(self.start | {"step": state.global_step} | timeless)
