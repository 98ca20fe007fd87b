"""`polyref quickstart`: the main job, small, on real human preferences, ending in a page."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from polyref.cli.settings import LoraSettings
from polyref.cli.train import PolicySettings, train
from polyref.cli.training_run import DEFAULTS, refuse_many_processes
from polyref.data.sources import by_prompt
from polyref.errors import DataError
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.report.page import SideBySide
from polyref.training.config import PreferenceConfig
from polyref.types import PreferenceRecord

if TYPE_CHECKING:
    from polyref.training.preference_trainer import PreferenceTrainer

logger = logging.getLogger(__name__)

DATA = "pandalm-human"
SYSTEM_PROMPTS = {
    "the expert": "You are a careful expert. Follow the instruction exactly, and answer it correctly and completely.",
    "the plain speaker": "You answer in plain words, politely, and as briefly as the question allows.",
}
TRAIN_PAIRS, HELD_OUT_PAIRS, MAX_LENGTH = 48, 32, 192
FULL_HELD_OUT, FULL_MAX_LENGTH = 0.25, 512
REPLY_PROMPTS, REPLY_TOKENS = 3, 40
LORA_LAYERS = 8


@dataclass
class QuickstartSettings:
    """What the quickstart can be asked for.

    Args:
        output_dir: the run folder; the same command in the same place goes on where it was interrupted.
        model: hub id or folder of another policy; SmolLM2-135M-Instruct by default.
        full: use all packaged pairs instead of a demonstration's worth; takes hours on a laptop's processor.
        seed: of the split and the training.
    """

    output_dir: str = "runs/quickstart"
    model: str | None = None
    full: bool = False
    seed: int = 0


def add_arguments(parser: ArgumentParser) -> None:
    """The verb's settings."""
    parser.add_class_arguments(QuickstartSettings)


def run(settings: Namespace) -> None:
    """Choose pairs, then train, evaluate and report as `polyref train` does."""
    from polyref.scoring.demo_model import HUB_ID, demonstration_model
    from polyref.scoring.models import ModelSource, load_config

    refuse_many_processes()
    run_dir, full, seed = Path(settings.output_dir), settings.full, settings.seed
    model = settings.model or demonstration_model()
    max_length = FULL_MAX_LENGTH if full else MAX_LENGTH
    members = tuple(Reference(model, system_prompt=prompt, name=name) for name, prompt in SYSTEM_PROMPTS.items())
    layers = load_config(ModelSource(model)).get_text_config().num_hidden_layers
    lora = LoraSettings(last_layers=min(LORA_LAYERS, layers))
    policy = PolicySettings(model, lora=lora, references=ReferenceSet(members))
    args = PreferenceConfig(
        output_dir=str(run_dir / "stages" / "train"),
        max_length=max_length,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        num_train_epochs=1 if full else 3,
        learning_rate=2e-4,
        lr_scheduler_type="linear",
        logging_steps=3,
        seed=seed,
        **DEFAULTS,
    )
    name = settings.model or HUB_ID  # wherever its weights come from this time
    config = {"model": name, "full": full, "seed": seed, "references": SYSTEM_PROMPTS, "max_length": max_length}

    def load() -> tuple[list[PreferenceRecord], list[PreferenceRecord]]:
        return _choose_pairs(model, max_length, full, seed)

    train(policy, load, args, run_dir, config, title="polyref quickstart", opening=partial(_opening, full), replies=_replies)


def _choose_pairs(model: str, max_length: int, full: bool, seed: int) -> tuple[list[PreferenceRecord], list[PreferenceRecord]]:
    """The packaged pairs that fit, split by prompt."""
    from polyref.data.sources import load_packaged, split_by_prompt
    from polyref.data.tokenize import tokenize_records
    from polyref.scoring.models import ModelSource, load_tokenizer

    records = load_packaged(DATA, prompt_format="chat")
    if not full:
        tokens = tokenize_records(records, load_tokenizer(ModelSource(model)))
        lengths = [len(pair.prompt_ids) + max(map(len, pair.completions)) for pair in tokens.pairs]
        records = [record for record, length in zip(tokens.records, lengths, strict=True) if length <= max_length]
    train_records, held_out = split_by_prompt(records, held_out=FULL_HELD_OUT, seed=seed)
    if not full:
        train_records, held_out = _spread(train_records)[:TRAIN_PAIRS], _spread(held_out)[:HELD_OUT_PAIRS]
    if not train_records or not held_out:
        raise DataError(f"no packaged pair fits {max_length} tokens under this model's tokenizer", fix="use another model")
    return train_records, held_out


def _spread(records: Sequence[PreferenceRecord]) -> list[PreferenceRecord]:
    """The first pair of every prompt, then the second of every prompt, and so on: a few pairs then cover many prompts."""
    turns = zip_longest(*by_prompt(records).values())
    return [record for turn in turns for record in turn if record is not None]


def _opening(full: bool, summary: dict[str, Any]) -> list[str]:
    size = f"This run used {summary['train_pairs']} training and {summary['after']['pairs']} held-out pairs"
    return [
        "Three people compared replies to everyday instructions; their votes are the preferences (PandaLM's human test set).",
        "The references are one small model under two system prompts. polyref composed them exactly, whole replies at a time, "
        "into the one anchor the policy is kept close to.",
        f"{size}." if full else f"{size}: it demonstrates, and proves nothing.",
    ]


def _replies(trainer: PreferenceTrainer) -> list[SideBySide]:
    """Greedy replies to a few held-out prompts, before and after training."""
    dataset: Any = trainer.eval_dataset
    groups = by_prompt(pair.record for pair in dataset.pairs).values()
    prompts: list[Any] = [group[0].prompt for group in groups][:REPLY_PROMPTS]
    logger.info("sampling replies to %d held-out prompts", len(prompts))
    model: Any = trainer.model
    shown = []
    for prompt in prompts:
        with model.disable_adapter():
            before = _reply(trainer, prompt)
        replies = (("before training", before), ("after training", _reply(trainer, prompt)))
        shown.append(SideBySide(prompt[-1]["content"], replies))
    return shown


def _reply(trainer: PreferenceTrainer, prompt: Any) -> str:
    import torch

    tokenizer: Any = trainer.processing_class
    inputs = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = inputs.to(trainer.args.device)
    model: Any = trainer.model
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=REPLY_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
