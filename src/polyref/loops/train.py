"""The stage that fits the policy to a step's pairs, against the references, from where the step before it left off."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainerCallback

from polyref.files import write_bytes
from polyref.loops.generate import Progress
from polyref.loops.policies import Policy
from polyref.references.reference_set import ReferenceSet
from polyref.scoring.models import ModelSource, load_tokenizer
from polyref.stages import RunFolder, Stage
from polyref.training.checkpoints import save_policy
from polyref.training.config import PreferenceConfig
from polyref.training.course import metrics_writer, train_and_evaluate
from polyref.training.preference_trainer import PreferenceTrainer
from polyref.types import PreferenceRecord

Start = Literal["unknown", "moved", "anchor"]
"""Where a policy stands before a training: as the trainer finds, away from its references, or at them."""


class StartedTrainer(PreferenceTrainer):
    """A `PreferenceTrainer` that is told where its policy starts, `at`.

    One that moved is not where its references are, so that nothing is said of log-ratios that are not 0 at the first step;
    one that is its own reference is refused unless they are.
    """

    def __init__(self, at: Start, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if at != "unknown":
            self._start_check = "refuse" if at == "anchor" else None


@dataclass(frozen=True)
class Training:
    """What every training of a loop has in common.

    `references` are the anchor, never the policy of the step before. `settings` makes the configuration of a training from its
    beta and the folder of its checkpoints; `adapter` makes the PEFT configuration of the first, None where all weights train.
    `told` is what the manifest says of each.
    """

    references: ReferenceSet
    tokenizer: ModelSource
    settings: Callable[[float, str], PreferenceConfig]
    adapter: Callable[[Any], Any] | None
    callbacks: Sequence[TrainerCallback]
    progress: Progress
    told: Mapping[str, Any] = field(default_factory=dict)


def train(
    folder: RunFolder,
    stage: Stage,
    inputs: dict[str, str],
    policy: Policy,
    records: Sequence[PreferenceRecord],
    beta: float,
    how: Training,
    number: int,
    *,
    at: Start | None = None,
) -> tuple[Policy, dict[str, Any]]:
    """Round `number`: `policy` trained on `records` at `beta`, in `stage`'s model/, and what is to be told of it.

    A training that was interrupted goes on from its newest checkpoint. `inputs` are those of the stage. `at` says where
    `policy` stands; by default it moved after round 1. Its lines of metrics.jsonl are kept in the stage too, and put back where
    one of them is missing.
    """
    trained = policy.trained(stage.folder / "model", how.adapter is not None)
    told, metrics = stage.folder / "training.json", stage.folder / "metrics.json"
    if not stage.done:
        model, tokenizer = policy.load(), load_tokenizer(how.tokenizer)
        model.train()
        trainer = StartedTrainer(
            at or ("moved" if number > 1 else "unknown"),
            model,
            how.references,
            how.settings(beta, str(stage.folder)),
            list(records),
            None,
            tokenizer,
            how.adapter(model) if how.adapter is not None and policy.adapter is None else None,
            callbacks=[*how.callbacks, metrics_writer(folder, number)],
            reference_progress=how.progress,
        )
        train_and_evaluate(folder, stage, inputs, trainer, held_out=False, number=number)
        save_policy(trainer.model, tokenizer, stage.folder / "model")
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        about = {"train_pairs": len(trainer.train_dataset), "train_loss": losses[-1] if losses else None}
        write_bytes(told, json.dumps(about).encode())
        write_bytes(metrics, json.dumps(_lines(folder.read_metrics(), number)).encode())
        stage.finish([stage.folder / "model", told, metrics], info=how.told)
    for checkpoint in stage.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    _put_back(folder, json.loads(metrics.read_text()), number)
    about = json.loads(told.read_text())
    return trained, about


def _lines(rows: Sequence[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Those of the training of round `number`, without the one that says how it was judged."""
    return [row for row in rows if row.get("round") == number and "eval_reward" not in row]


def _put_back(folder: RunFolder, lines: list[dict[str, Any]], number: int) -> None:
    """Make `lines` those of the training of round `number` in metrics.jsonl, all in one write; nothing where they are there."""
    rows = folder.read_metrics()
    own = _lines(rows, number)
    if own != lines:
        before = [row for row in rows if row.get("round", 0) < number]
        after = [row for row in rows if row.get("round", 0) >= number and row not in own]
        folder.write_metrics([*before, *lines, *after])
