"""`polyref fit`: weighted samples in, a policy of maximum likelihood and its page out."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from polyref.cli.fit_settings import FitSettings, SamplesSettings
from polyref.cli.training_run import (
    MAY_CHANGE,
    add_training_arguments,
    pick,
    refuse_many_processes,
    run_folder_of,
    stage_folder,
)
from polyref.training.likelihood_config import LikelihoodConfig

if TYPE_CHECKING:
    from polyref.data.samples import SampleRecord
    from polyref.stages import RunFolder, Stage

logger = logging.getLogger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """The verb's settings: policy, samples, and every `LikelihoodConfig` option."""
    parser.add_class_arguments(FitSettings)
    parser.add_class_arguments(SamplesSettings)
    add_training_arguments(parser, LikelihoodConfig)


def run(settings: Namespace) -> None:
    """Train, evaluate before and after, and write model/, metrics.jsonl and report.html into the run folder."""
    refuse_many_processes()
    values = vars(settings)
    run_dir = run_folder_of(values)
    policy, data = FitSettings(**pick(values, FitSettings)), SamplesSettings(**pick(values, SamplesSettings))
    args = LikelihoodConfig(**pick(values, LikelihoodConfig) | {"output_dir": stage_folder(run_dir)})
    fit(policy, data, args, run_dir, {k: v for k, v in values.items() if k not in ("config", "output_dir")})


def fit(
    policy: FitSettings, data: SamplesSettings, args: LikelihoodConfig, run_dir: Path, config: dict[str, Any]
) -> dict[str, Any]:
    """One resumable training in `run_dir`; returns its summary, which is also in summary.json.

    `config` is what must not change when the run is taken up again.
    """
    from polyref.files import write_bytes
    from polyref.report.likelihood import write_likelihood_page
    from polyref.stages import RunFolder

    with RunFolder(run_dir, config, seeds={"seed": args.seed}, may_change=MAY_CHANGE) as folder:
        samples, held_out = data.load(args.prompt_format)
        inputs = _inputs(policy, samples, held_out)
        folder.refuse_changed(inputs, "train")
        stage = folder.stage("train", inputs)
        if stage.done:
            logger.info("%s is complete; nothing to do", run_dir)
        else:
            summary = {"model": policy.model} | _train_in(folder, stage, inputs, policy, samples, held_out, args)
            write_bytes(run_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
            write_likelihood_page(run_dir / "report.html", run_dir.name, summary, folder.read_metrics())
            outputs = [run_dir / name for name in ("summary.json", "report.html", "model")]
            stage.finish(outputs, info={"depends_on": inputs})
        result: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
        _tell(result, run_dir)
        return result


def _inputs(policy: FitSettings, samples: list[SampleRecord], held_out: list[SampleRecord]) -> dict[str, str]:
    """What the run depends on beyond its configuration, by the words that a refusal uses for it."""
    from polyref.data.samples import sample_row
    from polyref.stages import content_digest
    from polyref.training.inputs import model_inputs

    return {
        "training samples": content_digest([sample_row(sample) for sample in samples]),
        "held-out samples": content_digest([sample_row(sample) for sample in held_out]),
        **model_inputs(policy.source, "policy"),
    }


def _train_in(
    folder: RunFolder,
    stage: Stage,
    inputs: dict[str, str],
    policy: FitSettings,
    samples: list[SampleRecord],
    held_out: list[SampleRecord],
    args: LikelihoodConfig,
) -> dict[str, Any]:
    """Evaluate, train from the newest checkpoint, evaluate again, and write the policy."""
    from polyref.cli.progress import Meter, TrainingProgress
    from polyref.cli.settings import peft_config
    from polyref.scoring.models import load_causal_lm, load_tokenizer
    from polyref.training.checkpoints import save_policy
    from polyref.training.course import kept_report, metrics_writer, train_and_evaluate
    from polyref.training.likelihood_evaluate import effective_samples, likelihood_change, likelihood_report
    from polyref.training.likelihood_trainer import LikelihoodTrainer

    tokenizer, model = load_tokenizer(policy.source), load_causal_lm(policy.source)
    model.train()
    with Meter("steps") as steps:
        trainer = LikelihoodTrainer(
            model,
            args,
            samples,
            held_out or None,
            tokenizer,
            peft_config(policy.lora, model),
            callbacks=[TrainingProgress(steps), metrics_writer(folder)],
        )
        dataset: Any = trainer.eval_dataset

        def report() -> dict[str, Any]:
            return likelihood_report(trainer, dataset, seed=args.seed)

        before = kept_report(folder, "before", inputs, report) if held_out else None
        train_and_evaluate(folder, stage, inputs, trainer, held_out=False)
        after = kept_report(folder, "after", inputs, report) if held_out else None
        save_policy(trainer.model, tokenizer, folder.path / "model", merge_adapter=policy.merge_adapter)
    prompts = trainer.train_dataset.prompts
    return {
        "train_prompts": len(prompts),
        "train_samples": sum(len(each.records) for each in prompts),
        "effective": effective_samples(prompts),
        "cut_samples": sum(sum(each.cuts) for each in prompts),
        "length_normalise": args.length_normalise,
        "max_length": args.max_length,
        "shared_prompts": _shared(samples, held_out),
        "before": before,
        "after": after,
        "change": likelihood_change(before, after, seed=args.seed) if before and after else None,
    }


def _shared(samples: list[SampleRecord], held_out: list[SampleRecord]) -> int:
    """How many held-out prompts are trained on too; more than none is worth a warning."""
    from polyref.data.sources import prompt_key

    train, other = ({prompt_key(sample.prompt) for sample in some} for some in (samples, held_out))
    if shared := len(train & other):
        logger.warning("%d of %d held-out prompts are trained on too: their likelihood flatters", shared, len(other))
    return shared


def _tell(summary: dict[str, Any], run_dir: Path) -> None:
    for when in ("before", "after"):
        if summary[when] is not None:
            mean, low, high = summary[when]["nll"]
            interval = "one prompt gives no interval" if low is None else f"95% interval {low:.2f} to {high:.2f}"
            logger.info("held-out negative log-likelihood %s training: %.2f nats (%s)", when, mean, interval)
    logger.info("the policy is in %s, the page in %s", run_dir / "model", run_dir / "report.html")
