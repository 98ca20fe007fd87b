"""`polyref train`: preference pairs and references in, an aligned policy and its page out."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from transformers import TrainingArguments

from polyref.cli.settings import DataSettings, LoraSettings
from polyref.errors import ConfigError, RunFolderError
from polyref.references.reference_set import ReferenceSet
from polyref.scoring.models import ModelSource
from polyref.training.config import PreferenceConfig

if TYPE_CHECKING:
    from polyref.report.page import SideBySide
    from polyref.stages import RunFolder, Stage
    from polyref.training.dataset import ScoredPairs
    from polyref.training.preference_trainer import PreferenceTrainer
    from polyref.types import PreferenceRecord

    Loaded = tuple[list[PreferenceRecord], list[PreferenceRecord]]

logger = logging.getLogger(__name__)

DEFAULTS: dict[str, Any] = {"save_steps": 0.25, "save_total_limit": 1, "report_to": "none", "disable_tqdm": True}
"""Where the command line differs from `PreferenceConfig`: checkpoints to resume from, and progress bars of its own."""

MAY_CHANGE = ("logging_steps", "save_steps", "save_total_limit", "report_to", "disable_tqdm", "log_level", "cache_dir")

SECRETS = {field.name for field in fields(PreferenceConfig) if field.name.endswith("_token")}
"""Options of `PreferenceConfig` that are no settings here: the run folder keeps settings, and says which ones changed."""


@dataclass
class PolicySettings:
    """The policy to train.

    Args:
        model: hub id or folder of the policy.
        gguf_file: a GGUF file inside model, dequantised on loading.
        dtype: of the policy's weights.
        revision: revision of a hub model.
        trust_remote_code: run code that comes with the model.
        lora: train a low-rank adapter instead of all weights.
        merge_adapter: write the trained adapter merged into the weights.
        references: what the policy is kept close to; the starting policy when left out.
    """

    model: str
    gguf_file: str | None = None
    dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    lora: LoraSettings | None = None
    merge_adapter: bool = False
    references: ReferenceSet | None = None

    @property
    def source(self) -> ModelSource:
        """Where its weights come from."""
        return ModelSource(self.model, self.gguf_file, self.dtype, self.revision, self.trust_remote_code)


def add_arguments(parser: ArgumentParser) -> None:
    """The verb's settings: policy, data, and every `PreferenceConfig` option."""
    parser.add_class_arguments(PolicySettings)
    parser.add_class_arguments(DataSettings)
    parser.add_class_arguments(PreferenceConfig, skip={"output_dir", "resume_from_checkpoint"} | SECRETS)
    parser.add_argument("--output_dir", type=str, required=True, help="The run folder.")
    for name in sorted(SECRETS):
        parser.add_argument(f"--{name}", help="Refused, as settings are kept in the run folder: set HF_TOKEN instead.")
    parser.set_defaults(DEFAULTS)
    explanations = _explanations()
    for action in parser._actions:
        action.help = action.help or explanations.get(action.dest)


def _explanations() -> dict[str, str]:
    """What each option of `PreferenceConfig` means: its field's own help, or the entry in transformers' docstring."""
    entry = re.compile(r"^ {8}(\w+) \(.*?\):\n((?: {12}.*\n| *\n)+)", re.MULTILINE)
    found = entry.findall(TrainingArguments.__doc__ or "")
    described = {name: " ".join(text.split("\n\n")[0].split()) for name, text in found}
    helps = {field.name: str(field.metadata["help"]) for field in fields(PreferenceConfig) if "help" in field.metadata}
    return {name: text.replace("%", "%%") for name, text in (described | helps).items()}


def run(settings: Namespace) -> None:
    """Train, evaluate before and after, and write model/, metrics.jsonl and report.html into the run folder."""
    refuse_many_processes()
    values = vars(settings)
    if given := sorted(name for name in SECRETS if values.pop(name) is not None):
        raise ConfigError(f"{given[0]} is a secret, and settings are kept in the run folder", fix="set HF_TOKEN instead")
    policy = PolicySettings(**pick(values, PolicySettings))
    data = DataSettings(**pick(values, DataSettings))
    if not values["output_dir"].strip():
        raise ConfigError("output_dir is empty", fix="name the run folder")
    run_dir = Path(values["output_dir"])
    args = PreferenceConfig(**pick(values, PreferenceConfig) | {"output_dir": str(run_dir / "stages" / "train")})
    shown = {k: v for k, v in values.items() if k not in ("config", "output_dir")}
    train(policy, lambda: data.load(args.prompt_format), args, run_dir, shown)


def refuse_many_processes() -> None:
    """Run folders are for one process."""
    if (processes := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
        raise ConfigError(
            f"the command line trains in one process, and WORLD_SIZE is {processes}",
            fix="start it without a launcher, or use PreferenceTrainer in a script under torchrun or accelerate launch",
        )


def train(
    policy: PolicySettings,
    load: Callable[[], Loaded],
    args: PreferenceConfig,
    run_dir: Path,
    config: dict[str, Any],
    *,
    title: str | None = None,
    opening: Callable[[dict[str, Any]], Sequence[str]] | None = None,
    replies: Callable[[PreferenceTrainer], list[SideBySide]] | None = None,
) -> dict[str, Any]:
    """One resumable training run in `run_dir`; returns its summary, which is also in summary.json.

    `load` gives (training, held-out) records; it is called once the folder is ours. `config` is what must not change when the
    run is taken up again, and its `model` is the policy's name on the page. `title` and the sentences that `opening` makes of
    the summary start the page; `replies` makes the replies it shows from the trained policy.
    """
    from polyref.files import write_bytes
    from polyref.report.training import write_training_page
    from polyref.stages import RunFolder

    with RunFolder(run_dir, config, seeds={"seed": args.seed}, may_change=MAY_CHANGE) as folder:
        records, held_out = load()
        inputs = _inputs(policy, records, held_out)
        _refuse_changed(folder, inputs)
        stage = folder.stage("train", inputs)
        if stage.done:
            logger.info("%s is complete; nothing to do", run_dir)
        else:
            summary, shown = _train_in(folder, stage, inputs, policy, records, held_out, args, replies)
            summary = {"model": config["model"]} | summary
            write_bytes(run_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
            write_training_page(
                run_dir / "report.html",
                title or run_dir.name,
                summary,
                folder.read_metrics(),
                opening=opening(summary) if opening else (),
                replies=shown,
            )
            outputs = [run_dir / name for name in ("summary.json", "report.html", "model")]
            stage.finish(outputs, info={"depends_on": inputs})
        result: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
        _tell(result, run_dir)
        return result


def _inputs(policy: PolicySettings, records: list[PreferenceRecord], held_out: list[PreferenceRecord]) -> dict[str, str]:
    """What the run depends on beyond its configuration, by the words that a refusal uses for it.

    A reference's tokenizer is there where it is not the policy's.
    """
    from polyref.data.records import record_to_row
    from polyref.data.tokenize import tokenizer_fingerprint
    from polyref.references.score import own_tokenizer
    from polyref.scoring.models import adapter_fingerprint, check_config, load_config, load_tokenizer, weights_fingerprint
    from polyref.stages import content_digest

    check_config(load_config(policy.source), policy.model)
    inputs = {
        "training pairs": content_digest([record_to_row(record) for record in records]),
        "held-out pairs": content_digest([record_to_row(record) for record in held_out]),
        "tokenizer": tokenizer_fingerprint(load_tokenizer(policy.source)),
        "weights of the policy": weights_fingerprint(policy.source),
    }
    for number, member in enumerate(policy.references.members if policy.references else (), 1):
        check_config(load_config(member.source), member.label)
        adapter = adapter_fingerprint(str(member.adapter) if member.adapter else None)
        inputs[f"weights of reference {number}"] = weights_fingerprint(member.source) + adapter
        if (tokenizer := tokenizer_fingerprint(own_tokenizer(member))) != inputs["tokenizer"]:
            inputs[f"tokenizer of reference {number}"] = tokenizer
    return inputs


def _refuse_changed(folder: RunFolder, inputs: dict[str, str]) -> None:
    """A complete run stays what it is."""
    entry = json.loads((folder.path / "manifest.json").read_text())["stages"].get("train", {})
    if entry.get("state") != "done":
        return
    old = entry["info"].get("depends_on", {})
    if changed := [name for name in sorted(old | inputs) if old.get(name) != inputs.get(name)]:
        raise RunFolderError(
            f"is complete, and what it was made from has changed since: {', '.join(changed)}",
            where=str(folder.path),
            fix="name a new run folder",
        )


def _train_in(
    folder: RunFolder,
    stage: Stage,
    inputs: dict[str, str],
    policy: PolicySettings,
    records: list[PreferenceRecord],
    held_out: list[PreferenceRecord],
    args: PreferenceConfig,
    replies: Callable[[PreferenceTrainer], list[SideBySide]] | None,
) -> tuple[dict[str, Any], list[SideBySide]]:
    """Score, evaluate, train from the newest checkpoint, evaluate again, and write the policy."""
    from transformers import PrinterCallback

    from polyref.cli.progress import Meter, TrainingProgress
    from polyref.cli.settings import peft_config
    from polyref.scoring.models import load_causal_lm, load_tokenizer
    from polyref.training.checkpoints import last_checkpoint, save_policy
    from polyref.training.preference_trainer import PreferenceTrainer

    tokenizer, model = load_tokenizer(policy.source), load_causal_lm(policy.source)
    model.train()
    with Meter("tokens") as scoring, Meter("steps") as steps:
        trainer = PreferenceTrainer(
            model,
            policy.references,
            args,
            records,
            held_out or None,
            tokenizer,
            peft_config(policy.lora, model),
            callbacks=[TrainingProgress(steps), _metrics_writer(folder)],
            reference_progress=scoring,
        )
        trainer.remove_callback(PrinterCallback)
        dataset: Any = trainer.eval_dataset
        shared = _shared_prompts(trainer) if held_out else 0
        before = _evaluated(folder, trainer, dataset, "before", inputs) if held_out else None
        checkpoint = last_checkpoint(stage.folder)
        done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        folder.keep_metrics(lambda row: row["step"] <= done and "total_flos" not in row)  # the last line is written anew
        _train_from(trainer, checkpoint)
        after = _evaluated(folder, trainer, dataset, "after", inputs) if held_out else None
        shown = replies(trainer) if replies else []
        save_policy(trainer.model, tokenizer, folder.path / "model", merge_adapter=policy.merge_adapter)
    summary = {
        "references": [reference.label for reference in policy.references.members]
        if policy.references
        else ["the starting policy"],
        "weights": list(policy.references.weights or ()) if policy.references else [1.0],
        "composition": policy.references.composition if policy.references else "geometric",
        "divergence": args.divergence,
        "loss_type": args.loss_type,
        "beta": args.beta,
        "train_pairs": len(trainer.train_dataset),
        "compatibility": list(trainer.reference_scores["train"].compatibility),
        "shared_prompts": shared,
        "before": before,
        "after": after,
    }
    return summary, shown


def _train_from(trainer: PreferenceTrainer, checkpoint: Path | None) -> None:
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


def _shared_prompts(trainer: PreferenceTrainer) -> int:
    """How many held-out prompts are trained on too; more than none is worth a warning."""
    from polyref.data.sources import by_prompt

    train, held_out = (
        by_prompt(pair.record for pair in dataset.pairs).keys()  # type: ignore[union-attr]
        for dataset in (trainer.train_dataset, trainer.eval_dataset)
    )
    if shared := len(train & held_out):
        logger.warning("%d of %d held-out prompts are trained on too: their accuracy flatters", shared, len(held_out))
    return shared


def _evaluated(
    folder: RunFolder, trainer: PreferenceTrainer, dataset: ScoredPairs, when: str, inputs: dict[str, str]
) -> dict[str, Any]:
    """The held-out report, kept as a stage so that a resumed run does not make it twice."""
    from polyref.files import write_bytes
    from polyref.training.evaluate import preference_report

    stage = folder.stage(f"evaluate-{when}", inputs)
    file = stage.folder / "report.json"
    if not stage.done:
        report = preference_report(trainer, dataset, seed=trainer.args.seed)
        for name in ("accuracy", "margin"):  # one prompt gives no interval, and JSON knows no NaN
            report[name] = [value if math.isfinite(value) else None for value in report[name]]
        write_bytes(file, json.dumps(report).encode())
        stage.finish([file])
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def _metrics_writer(folder: RunFolder) -> Any:
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


def _tell(summary: dict[str, Any], run_dir: Path) -> None:
    for when in ("before", "after"):
        if summary[when] is not None:
            mean, low, high = summary[when]["accuracy"]
            interval = "one prompt gives no interval" if low is None else f"95% interval {low:.3f} to {high:.3f}"
            logger.info("held-out preference accuracy %s training: %.3f (%s)", when, mean, interval)
    logger.info("the policy is in %s, the page in %s", run_dir / "model", run_dir / "report.html")
