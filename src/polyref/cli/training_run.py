"""What the training verbs have in common: their options, the resumable course of a run, and what goes into its folder."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser
from transformers import TrainingArguments

from polyref.errors import ConfigError, RunFolderError

if TYPE_CHECKING:
    from transformers import Trainer

    from polyref.scoring.models import ModelSource
    from polyref.stages import RunFolder, Stage
    from polyref.training.dataset import ScoredPairs
    from polyref.types import PreferenceRecord

logger = logging.getLogger(__name__)

DEFAULTS: dict[str, Any] = {"save_steps": 0.25, "save_total_limit": 1, "report_to": "none", "disable_tqdm": True}
"""Where the command line differs from the trainers' settings: checkpoints to resume from, and progress bars of its own."""

MAY_CHANGE = ("logging_steps", "save_steps", "save_total_limit", "report_to", "disable_tqdm", "log_level", "cache_dir")

SECRETS = {field.name for field in fields(TrainingArguments) if field.name.endswith("_token")}
"""Options of the trainers that are no settings here: the run folder keeps settings, and says which ones changed."""


def add_training_arguments(parser: ArgumentParser, settings: type[TrainingArguments]) -> None:
    """Every option of `settings`, and the run folder."""
    parser.add_class_arguments(settings, skip={"output_dir", "resume_from_checkpoint"} | SECRETS)
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


def run_folder_of(values: dict[str, Any]) -> Path:
    """The run folder that `values` name, once nothing among them is a secret."""
    if given := sorted(name for name in SECRETS if values.pop(name) is not None):
        raise ConfigError(f"{given[0]} is a secret, and settings are kept in the run folder", fix="set HF_TOKEN instead")
    if not values["output_dir"].strip():
        raise ConfigError("output_dir is empty", fix="name the run folder")
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


def common_inputs(
    source: ModelSource, who: str, records: Sequence[PreferenceRecord], held_out: Sequence[PreferenceRecord]
) -> dict[str, str]:
    """What any training depends on beyond its configuration, by the words that a refusal uses for it."""
    from polyref.data.records import record_to_row
    from polyref.data.tokenize import tokenizer_fingerprint
    from polyref.scoring.models import check_config, load_config, load_tokenizer, weights_fingerprint
    from polyref.stages import content_digest

    check_config(load_config(source), source.model)
    return {
        "training pairs": content_digest([record_to_row(record) for record in records]),
        "held-out pairs": content_digest([record_to_row(record) for record in held_out]),
        "tokenizer": tokenizer_fingerprint(load_tokenizer(source)),
        f"weights of the {who}": weights_fingerprint(source),
    }


def refuse_changed(folder: RunFolder, inputs: dict[str, str], last: str = "train") -> None:
    """A complete run, one whose stage `last` is done, stays what it is."""
    entry = json.loads((folder.path / "manifest.json").read_text())["stages"].get(last, {})
    if entry.get("state") != "done":
        return
    old = entry["info"].get("depends_on", {})
    if changed := [name for name in sorted(old | inputs) if old.get(name) != inputs.get(name)]:
        raise RunFolderError(
            f"is complete, and what it was made from has changed since: {', '.join(changed)}",
            where=str(folder.path),
            fix="name a new run folder",
        )


def train_and_evaluate(
    folder: RunFolder, stage: Stage, inputs: dict[str, str], trainer: Trainer, *, held_out: bool
) -> dict[str, Any]:
    """Evaluate, train from the newest checkpoint, evaluate again: the part of the summary that every training has."""
    from transformers import PrinterCallback

    from polyref.training.checkpoints import last_checkpoint

    trainer.remove_callback(PrinterCallback)
    dataset: Any = trainer.eval_dataset
    shared = _shared_prompts(trainer) if held_out else 0
    before = _evaluated(folder, trainer, dataset, "before", inputs) if held_out else None
    checkpoint = last_checkpoint(stage.folder)
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    folder.keep_metrics(lambda row: row["step"] <= done and "total_flos" not in row)  # the last line is written anew
    _train_from(trainer, checkpoint)
    after = _evaluated(folder, trainer, dataset, "after", inputs) if held_out else None
    return {"shared_prompts": shared, "before": before, "after": after}


def _train_from(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train from `checkpoint`, or from the start. At the last step only the weights are taken, and the last line is written.

    transformers would train one step more where max_steps ends inside an epoch.
    """
    from transformers import TrainerState, set_seed

    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else None
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
    from polyref.data.sources import by_prompt

    train, held_out = (
        by_prompt(pair.record for pair in dataset.pairs).keys()  # type: ignore[union-attr]
        for dataset in (trainer.train_dataset, trainer.eval_dataset)
    )
    if shared := len(train & held_out):
        logger.warning("%d of %d held-out prompts are trained on too: their accuracy flatters", shared, len(held_out))
    return shared


def _evaluated(folder: RunFolder, trainer: Trainer, dataset: ScoredPairs, when: str, inputs: dict[str, str]) -> dict[str, Any]:
    """The held-out report, kept as a stage so that a resumed run does not make it twice."""
    from polyref.files import write_bytes
    from polyref.training.evaluate import plain_interval, preference_report

    stage = folder.stage(f"evaluate-{when}", inputs)
    file = stage.folder / "report.json"
    if not stage.done:
        report = preference_report(trainer, dataset, seed=trainer.args.seed)
        report |= {name: plain_interval(report[name]) for name in ("accuracy", "margin")}
        write_bytes(file, json.dumps(report).encode())
        stage.finish([file])
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def metrics_writer(folder: RunFolder) -> Any:
    from transformers import TrainerCallback

    class Writer(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            times = ("_runtime", "_preparation_time", "_per_second")
            timeless = {k: v for k, v in (logs or {}).items() if not k.endswith(times)}
            if not any("loss" in line for line in state.log_history):
                timeless.pop("train_loss", None)  # a mean over the steps since the last resume alone
            folder.append_metrics({"step": state.global_step} | timeless)

    return Writer()


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
