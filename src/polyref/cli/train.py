"""`polyref train`: preference pairs and references in, an aligned policy and its page out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from polyref.cli.settings import DataSettings, LoraSettings
from polyref.cli.training_run import (
    MAY_CHANGE,
    add_training_arguments,
    pick,
    refuse_many_processes,
    run_folder_of,
    stage_folder,
    tell_accuracy,
)
from polyref.references.reference_set import ReferenceSet
from polyref.scoring.models import ModelSource
from polyref.training.config import PreferenceConfig

if TYPE_CHECKING:
    from polyref.report.page import SideBySide
    from polyref.stages import RunFolder, Stage
    from polyref.training.preference_trainer import PreferenceTrainer
    from polyref.types import PreferenceRecord

    Loaded = tuple[list[PreferenceRecord], list[PreferenceRecord]]

logger = logging.getLogger(__name__)


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
        sampling_policy: what completions were drawn from, for objective doubly_robust.
    """

    model: str
    gguf_file: str | None = None
    dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    lora: LoraSettings | None = None
    merge_adapter: bool = False
    references: ReferenceSet | None = None
    sampling_policy: ReferenceSet | None = None

    @property
    def source(self) -> ModelSource:
        """Where its weights come from."""
        return ModelSource(self.model, self.gguf_file, self.dtype, self.revision, self.trust_remote_code)


def add_arguments(parser: ArgumentParser) -> None:
    """The verb's settings: policy, data, and every `PreferenceConfig` option."""
    parser.add_class_arguments(PolicySettings)
    parser.add_class_arguments(DataSettings)
    add_training_arguments(parser, PreferenceConfig)


def run(settings: Namespace) -> None:
    """Train, evaluate before and after, and write model/, metrics.jsonl and report.html into the run folder."""
    refuse_many_processes()
    values = vars(settings)
    run_dir = run_folder_of(values)
    policy = PolicySettings(**pick(values, PolicySettings))
    data = DataSettings(**pick(values, DataSettings))
    args = PreferenceConfig(**pick(values, PreferenceConfig) | {"output_dir": stage_folder(run_dir)})
    shown = {k: v for k, v in values.items() if k not in ("config", "output_dir")}
    train(policy, lambda: data.load(args.prompt_format), args, run_dir, shown)


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
        folder.refuse_changed(inputs, "train")
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
    from polyref.training.inputs import common_inputs, reference_inputs

    inputs = common_inputs(policy.source, "policy", records, held_out)
    for what, models in (("reference", policy.references), ("sampling policy", policy.sampling_policy)):
        inputs |= reference_inputs(models, what, inputs["tokenizer"])
    return inputs


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
    from polyref.cli.progress import Meter, TrainingProgress
    from polyref.cli.settings import peft_config
    from polyref.data.auxiliary import auxiliary_pairs
    from polyref.scoring.models import load_causal_lm, load_tokenizer
    from polyref.training.checkpoints import save_policy
    from polyref.training.course import metrics_writer, train_and_evaluate
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
            callbacks=[TrainingProgress(steps), metrics_writer(folder)],
            reference_progress=scoring,
            sampling_policy=policy.sampling_policy,
        )
        course = train_and_evaluate(folder, stage, inputs, trainer, held_out=bool(held_out))
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
    }
    if args.objective != "plain":
        summary |= {"objective": args.objective, "auxiliary_pairs": auxiliary_pairs(trainer.train_dataset.pairs[0].record)}
    return summary | course, shown


def _tell(summary: dict[str, Any], run_dir: Path) -> None:
    tell_accuracy(summary)
    logger.info("the policy is in %s, the page in %s", run_dir / "model", run_dir / "report.html")
