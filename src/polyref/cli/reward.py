"""`polyref reward`: preference pairs in, a calibrated reward model and its page out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
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
from polyref.scoring.models import ModelSource
from polyref.training.reward_config import RewardConfig

if TYPE_CHECKING:
    from polyref.rewards.reward_settings import RewardModelSettings
    from polyref.stages import RunFolder, Stage
    from polyref.types import PreferenceRecord

    Loaded = tuple[list[PreferenceRecord], list[PreferenceRecord]]

logger = logging.getLogger(__name__)


@dataclass
class RewardSettings:
    """The model to train.

    Args:
        model: hub id or folder of a language model, which gets a fresh score head, or of a reward model to go on from.
        gguf_file: a GGUF file inside model, dequantised on loading.
        dtype: of the model's weights.
        revision: revision of a hub model.
        trust_remote_code: run code that comes with the model.
        lora: train a low-rank adapter and the score head instead of all weights.
        merge_adapter: write the trained adapter merged into the weights.
    """

    model: str
    gguf_file: str | None = None
    dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    lora: LoraSettings | None = None
    merge_adapter: bool = False

    @property
    def source(self) -> ModelSource:
        """Where its weights come from."""
        return ModelSource(self.model, self.gguf_file, self.dtype, self.revision, self.trust_remote_code)


def add_arguments(parser: ArgumentParser) -> None:
    """The verb's settings: model, data, and every `RewardConfig` option."""
    parser.add_class_arguments(RewardSettings)
    parser.add_class_arguments(DataSettings)
    add_training_arguments(parser, RewardConfig)


def run(settings: Namespace) -> None:
    """Train, evaluate before and after, calibrate, and write model/, metrics.jsonl and report.html into the run folder."""
    refuse_many_processes()
    values = vars(settings)
    run_dir = run_folder_of(values)
    reward = RewardSettings(**pick(values, RewardSettings))
    data = DataSettings(**pick(values, DataSettings))
    args = RewardConfig(**pick(values, RewardConfig) | {"output_dir": stage_folder(run_dir)})
    shown = {k: v for k, v in values.items() if k not in ("config", "output_dir")}
    train_reward(reward, lambda: data.load(args.prompt_format), args, run_dir, shown)


def train_reward(
    reward: RewardSettings, load: Callable[[], Loaded], args: RewardConfig, run_dir: Path, config: dict[str, Any]
) -> dict[str, Any]:
    """One resumable reward training in `run_dir`; returns its summary, which is also in summary.json.

    `load` gives (training, held-out) records; it is called once the folder is ours. `config` is what must not change when the
    run is taken up again.
    """
    from polyref.files import write_bytes
    from polyref.report.reward import write_reward_page
    from polyref.stages import RunFolder
    from polyref.training.inputs import common_inputs

    with RunFolder(run_dir, config, seeds={"seed": args.seed}, may_change=MAY_CHANGE) as folder:
        records, held_out = load()
        inputs = common_inputs(reward.source, "model", records, held_out)
        folder.refuse_changed(inputs, "train")
        stage = folder.stage("train", inputs)
        if stage.done:
            logger.info("%s is complete; nothing to do", run_dir)
        else:
            summary = {"model": reward.model} | _train_in(folder, stage, inputs, reward, records, held_out, args)
            write_bytes(run_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
            write_reward_page(run_dir / "report.html", run_dir.name, summary, folder.read_metrics())
            outputs = [run_dir / name for name in ("summary.json", "report.html", "model")]
            stage.finish(outputs, info={"depends_on": inputs})
        result: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
        tell_accuracy(result)
        if (calibration := result["calibration"]) is not None and calibration["temperature"] is not None:
            logger.info("its rewards are best divided by %.3g before they are read as log-odds", calibration["temperature"])
        logger.info("the reward model is in %s, the page in %s", run_dir / "model", run_dir / "report.html")
        return result


def _train_in(
    folder: RunFolder,
    stage: Stage,
    inputs: dict[str, str],
    reward: RewardSettings,
    records: list[PreferenceRecord],
    held_out: list[PreferenceRecord],
    args: RewardConfig,
) -> dict[str, Any]:
    """Evaluate, train from the newest checkpoint, evaluate again, calibrate, and write the model."""
    from polyref.cli.progress import Meter, TrainingProgress
    from polyref.cli.settings import peft_config
    from polyref.data.auxiliary import auxiliary_pairs
    from polyref.rewards.classifier import fresh_classifier
    from polyref.rewards.reward_settings import write_reward_settings
    from polyref.scoring.models import load_tokenizer
    from polyref.training.checkpoints import save_policy
    from polyref.training.course import metrics_writer, train_and_evaluate
    from polyref.training.evaluate import calibration_report
    from polyref.training.reward_trainer import RewardTrainer

    tokenizer, model = load_tokenizer(reward.source), fresh_classifier(reward.source, seed=args.seed)
    model.train()
    with Meter("steps") as steps:
        trainer = RewardTrainer(
            model,
            args,
            records,
            held_out or None,
            tokenizer,
            peft_config(reward.lora, model),
            callbacks=[TrainingProgress(steps), metrics_writer(folder)],
        )
        course = train_and_evaluate(folder, stage, inputs, trainer, held_out=bool(held_out))
        save_policy(trainer.model, tokenizer, folder.path / "model", merge_adapter=reward.merge_adapter)
    evaluated: Any = trainer.eval_dataset
    calibration = calibration_report(course["after"], evaluated, seed=args.seed) if held_out else None
    write_reward_settings(folder.path / "model", _read_with(reward, args, calibration))
    drawn = auxiliary_pairs(trainer.train_dataset.pairs[0].record)
    return {
        "loss_type": args.loss_type,
        **({"objective": args.objective, "auxiliary_pairs": drawn} if args.objective != "plain" else {}),
        "center_rewards_coefficient": args.center_rewards_coefficient,
        "max_length": args.max_length,
        "train_pairs": len(trainer.train_dataset),
        **course,
        "calibration": calibration,
    }


def _read_with(reward: RewardSettings, args: RewardConfig, calibration: dict[str, Any] | None) -> RewardModelSettings:
    """What the written model is to be read with; an adapter keeps the GGUF file of its base."""
    from polyref.rewards.reward_settings import RewardModelSettings

    adapter = reward.lora is not None and not reward.merge_adapter
    return RewardModelSettings(
        reward.dtype,
        args.max_length,
        args.truncation_mode,
        args.prompt_format,
        calibration["temperature"] if calibration is not None else None,
        reward.gguf_file if adapter else None,
    )
