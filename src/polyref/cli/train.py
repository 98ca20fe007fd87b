"""`polyref train`: preference pairs and references in, an aligned policy and its page out."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from transformers import TrainingArguments

from polyref.cli.settings import DataSettings, LoraSettings
from polyref.errors import ConfigError
from polyref.references.reference_set import ReferenceSet
from polyref.training.config import PreferenceConfig

if TYPE_CHECKING:
    from polyref.report.page import SideBySide
    from polyref.stages import RunFolder, Stage
    from polyref.training.dataset import ScoredPairs
    from polyref.training.preference_trainer import PreferenceTrainer

logger = logging.getLogger(__name__)

DEFAULTS: dict[str, Any] = {"save_steps": 0.25, "save_total_limit": 1, "report_to": "none", "disable_tqdm": True}
"""Where the command line differs from `PreferenceConfig`: checkpoints to resume from, and progress bars of its own."""

MAY_CHANGE = ("logging_steps", "save_steps", "save_total_limit", "report_to", "disable_tqdm", "log_level", "cache_dir")


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


def add_arguments(parser: ArgumentParser) -> None:
    """The verb's settings: policy, data, and every `PreferenceConfig` option."""
    parser.add_class_arguments(PolicySettings)
    parser.add_class_arguments(DataSettings)
    parser.add_class_arguments(PreferenceConfig, skip={"output_dir", "resume_from_checkpoint"})
    parser.add_argument("--output_dir", type=str, required=True, help="The run folder.")
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
    values = vars(settings)
    policy = PolicySettings(**pick(values, PolicySettings))
    data = DataSettings(**pick(values, DataSettings))
    if not values["output_dir"].strip():
        raise ConfigError("output_dir is empty", fix="name the run folder")
    run_dir = Path(values["output_dir"])
    args = PreferenceConfig(**pick(values, PreferenceConfig) | {"output_dir": str(run_dir / "stages" / "train")})
    shown = {k: v for k, v in values.items() if k not in ("config", "output_dir")}
    train(policy, data, args, run_dir, shown)


def train(
    policy: PolicySettings,
    data: DataSettings,
    args: PreferenceConfig,
    run_dir: Path,
    config: dict[str, Any],
    *,
    title: str | None = None,
    opening: Sequence[str] = (),
    replies: Callable[[PreferenceTrainer], list[SideBySide]] | None = None,
) -> dict[str, Any]:
    """One resumable training run in `run_dir`; returns its summary, which is also in summary.json.

    `config` is what must not change when the run is taken up again. `title` and `opening` sentences start the page;
    `replies` makes the replies it shows from the trained policy.
    """
    from polyref.files import write_bytes
    from polyref.report.training import write_training_page
    from polyref.stages import RunFolder

    with RunFolder(run_dir, config, seeds={"seed": args.seed}, may_change=MAY_CHANGE) as folder:
        stage = folder.stage("train")
        if stage.done:
            logger.info("%s is complete; nothing to do", run_dir)
        else:
            summary, shown = _train_in(folder, stage, policy, data, args, replies)
            write_bytes(run_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
            write_training_page(
                run_dir / "report.html", title or run_dir.name, summary, folder.read_metrics(), opening=opening, replies=shown
            )
            stage.finish([run_dir / name for name in ("summary.json", "report.html", "model")])
        result: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
        _tell(result, run_dir)
        return result


def _train_in(
    folder: RunFolder,
    stage: Stage,
    policy: PolicySettings,
    data: DataSettings,
    args: PreferenceConfig,
    replies: Callable[[PreferenceTrainer], list[SideBySide]] | None,
) -> tuple[dict[str, Any], list[SideBySide]]:
    """Score, evaluate, train from the newest checkpoint, evaluate again, and write the policy."""
    from transformers import PrinterCallback

    from polyref.cli.progress import Meter, TrainingProgress
    from polyref.cli.settings import peft_config
    from polyref.scoring.models import ModelSource, load_causal_lm, load_tokenizer
    from polyref.training.checkpoints import last_checkpoint, save_policy
    from polyref.training.preference_trainer import PreferenceTrainer

    records, held_out = data.load(args.prompt_format)
    source = ModelSource(policy.model, policy.gguf_file, policy.dtype, policy.revision, policy.trust_remote_code)
    tokenizer, model = load_tokenizer(source), load_causal_lm(source)
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
        before = _evaluated(folder, trainer, dataset, "before") if held_out else None
        checkpoint = last_checkpoint(stage.folder)
        done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        folder.keep_metrics(lambda row: row["step"] <= done)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        after = _evaluated(folder, trainer, dataset, "after") if held_out else None
        shown = replies(trainer) if replies else []
        save_policy(trainer.model, tokenizer, folder.path / "model", merge_adapter=policy.merge_adapter)
    scores = trainer.reference_scores["train"]
    summary = {
        "model": policy.model,
        "references": [reference.label for reference in policy.references.members]
        if policy.references
        else ["the starting policy"],
        "weights": list(policy.references.weights or ()) if policy.references else [1.0],
        "composition": policy.references.composition if policy.references else "geometric",
        "divergence": args.divergence,
        "loss_type": args.loss_type,
        "beta": args.beta,
        "train_pairs": len(trainer.train_dataset),
        "compatibility": list(scores.compatibility),
        "cache_hit_rate": scores.hit_rate,
        "before": before,
        "after": after,
    }
    return summary, shown


def _evaluated(folder: RunFolder, trainer: PreferenceTrainer, dataset: ScoredPairs, when: str) -> dict[str, Any]:
    """The held-out report, kept as a stage so that a resumed run does not make it twice."""
    from polyref.files import write_bytes
    from polyref.training.evaluate import preference_report

    stage = folder.stage(f"evaluate-{when}")
    file = stage.folder / "report.json"
    if not stage.done:
        report = preference_report(trainer, dataset, seed=trainer.args.seed)
        write_bytes(file, json.dumps(report).encode())
        stage.finish([file])
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def _metrics_writer(folder: RunFolder) -> Any:
    from transformers import TrainerCallback

    class Writer(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            timeless = {k: v for k, v in (logs or {}).items() if not k.endswith(("_runtime", "_per_second"))}
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
            logger.info("held-out preference accuracy %s training: %.3f (95%% interval %.3f to %.3f)", when, mean, low, high)
    logger.info("the policy is in %s, the page in %s", run_dir / "model", run_dir / "report.html")
