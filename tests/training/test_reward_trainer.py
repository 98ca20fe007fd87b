"""The reward trainer on tiny models: its loss by hand, its head saved whole, a resumed run the same run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from fakes import ENCODERS, counted_calls, pair_rows, same, saved_encoder, saved_llama, tiny_lora
from polyref.errors import ConfigError, DataError, InputError, ModelError, TrainingDivergedError
from polyref.rewards.classifier import fresh_classifier
from polyref.rewards.reward_model import RewardModel
from polyref.scoring.models import ModelSource
from polyref.training.checkpoints import save_policy
from polyref.training.evaluate import preference_report
from polyref.training.reward_config import RewardConfig
from polyref.training.reward_trainer import METRICS, RewardTrainer


class World:
    """A folder with a language model, and trainers that differ in what a test is about."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.path, self.tokenizer = path, tokenizer
        self.base = saved_llama(path / "base", tokenizer)

    def config(self, **changes: Any) -> RewardConfig:
        usual = {
            "output_dir": str(self.path / "run"),
            "per_device_train_batch_size": 4,
            "num_train_epochs": 1,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return RewardConfig(**usual | changes)

    def trainer(
        self, rows: Any = 8, held_out: Any = None, *, model: Any = None, peft: Any = None, **changes: Any
    ) -> RewardTrainer:
        """`rows` and `held_out`: rows, or how many of `pair_rows`."""
        rows, held_out = (pair_rows(each) if isinstance(each, int) else each for each in (rows, held_out))
        callbacks = changes.pop("callbacks", None)
        model = self.base if model is None else model
        return RewardTrainer(model, self.config(**changes), rows, held_out, self.tokenizer, peft, callbacks=callbacks)

    def rewards(self, trainer: RewardTrainer, rows: list[dict[str, Any]]) -> np.ndarray:
        """(N, 2), each text alone through the model's own forward pass."""
        found = []
        for row in rows:
            for name in ("chosen", "rejected"):
                end = [self.tokenizer.eos_token_id] if row.get(f"{name}_ended", True) else []
                ids = [*self.tokenizer(row["prompt"] + row[name])["input_ids"], *end]
                with torch.no_grad():
                    found.append(float(trainer.model.eval()(input_ids=torch.tensor([ids])).logits))
        return np.array(found).reshape(-1, 2)


@pytest.fixture
def world(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> World:
    return World(tmp_path, tiny_tokenizer)


def log_of(trainer: RewardTrainer, *, key: str | None = None) -> list[Any]:
    """The log without what a clock wrote; with `key`, its values."""
    lines = [
        {k: v for k, v in line.items() if not k.endswith(("_runtime", "_per_second"))} for line in trainer.state.log_history
    ]
    return lines if key is None else [line[key] for line in lines if key in line]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def one_line(error: pytest.ExceptionInfo[Exception]) -> bool:
    return "\n" not in str(error.value) and len(str(error.value)) < 600


# What is optimised


@pytest.mark.parametrize("centring", [None, 0.5])
def test_the_loss_is_the_one_that_is_documented(world: World, centring: float | None) -> None:
    labels, margins = [0.5, 0.9, 1.0, 0.25], [0.0, 0.5, -1.0, 2.0]
    rows = pair_rows(4, chosen_probability=labels.__getitem__, margin=margins.__getitem__)
    trainer = world.trainer(rows, 4, center_rewards_coefficient=centring)
    rewards = world.rewards(trainer, rows)
    h = rewards[:, 0] - rewards[:, 1]
    losses = [p * softplus(m - d) + (1 - p) * softplus(d - m) for p, m, d in zip(labels, margins, h, strict=True)]
    expected = np.mean(losses) + (centring or 0.0) * np.mean(rewards.sum(1) ** 2)
    trainer.train()
    (line,) = (line for line in log_of(trainer) if "loss" in line)
    assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert line["rewards/margins"] == pytest.approx(h.mean(), rel=1e-4), "rewards are reported without the margin"
    assert line["rewards/chosen"] == pytest.approx(rewards[:, 0].mean(), rel=1e-4, abs=1e-6)
    assert set(METRICS) <= line.keys()


def test_a_completion_that_was_cut_is_read_without_an_end(world: World) -> None:
    rows = pair_rows(4, chosen_ended=lambda i: i % 2 > 0, rejected_ended=lambda i: i < 1)
    trainer = world.trainer(rows, rows)
    predicted = trainer.predict(trainer.eval_dataset).predictions
    assert predicted == pytest.approx(np.diff(world.rewards(trainer, rows)[:, ::-1], axis=1)[:, 0], rel=1e-4, abs=1e-6)
    whole = world.trainer(4, 4)
    assert np.abs(predicted - whole.predict(whole.eval_dataset).predictions).min() > 1e-5, "an end changes a reward"


@pytest.mark.parametrize(
    "loss", [{"loss_type": "sigmoid"}, {"loss_type": "hinge"}, {"loss_type": "ipo"}, *(
        {"loss_type": name, "label_smoothing": 0.1} for name in ("smoothed", "robust", "sigmoid")
    )], ids=str
)  # fmt: skip
def test_every_loss_learns_the_preference(world: World, loss: dict[str, Any]) -> None:
    trainer = world.trainer(16, 4, num_train_epochs=5, learning_rate=1e-2, **loss)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] and after["eval_rewards/accuracies"] == 1.0


def test_centring_centres(world: World) -> None:
    found = []
    for coefficient in (None, 1.0):
        trainer = world.trainer(8, 8, num_train_epochs=10, learning_rate=1e-2, center_rewards_coefficient=coefficient)
        trainer.train()
        metrics = trainer.evaluate()
        found.append(abs(metrics["eval_rewards/chosen"] + metrics["eval_rewards/rejected"]))
    assert found[1] < 0.2 * found[0]


def test_a_prompt_is_passed_once_for_both_completions(world: World) -> None:
    trainer = world.trainer(8)
    with counted_calls(LlamaForSequenceClassification) as calls:
        trainer.train()
    assert [rows for rows, _ in calls] == [4, 4]


def test_an_encoder_is_trained_one_row_a_completion(world: World) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=len(world.tokenizer), num_labels=1, **sizes))
    trainer = world.trainer(8, 4, model=model, num_train_epochs=4, learning_rate=1e-2)
    assert trainer.plan.layout == "separate"
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_accumulated_batches_are_one_batch(world: World) -> None:
    found = []
    for size, accumulation in ((4, 1), (2, 2)):
        trainer = world.trainer(4, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, optim="sgd")
        trainer.train()
        found.append((log_of(trainer, key="loss")[0], trainer.model.score.weight.detach().clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_dropout_is_off_unless_asked_for(world: World) -> None:
    noisy = saved_llama(world.path / "noisy", world.tokenizer, attention_dropout=0.5)
    losses = []
    for settings in ({}, {"disable_dropout": False}):
        trainer = world.trainer(4, 4, model=noisy, **settings)
        expected = trainer.evaluate()["eval_loss"]
        trainer.train()
        losses.append(abs(log_of(trainer, key="loss")[0] - expected))
    assert losses[0] < 1e-5 < 1e-3 < losses[1]


def test_auxiliary_columns_are_left_alone(world: World) -> None:
    auxiliary = {"predicted_probability": 0.5, "auxiliary_1": " a", "auxiliary_2": " b", "auxiliary_probability": 0.5}
    trainer = world.trainer(pair_rows(4, **auxiliary))
    assert [pair.tokens for pair in trainer.train_dataset.pairs] == [p.tokens for p in world.trainer(4).train_dataset.pairs]
    trainer.train()


# What is measured and saved


def test_predictions_are_reward_differences_and_agree_with_the_saved_model(world: World) -> None:
    rows = pair_rows(5)
    for kind, peft in (("whole", None), ("adapter", tiny_lora())):
        trainer = world.trainer(8, rows, peft=peft, num_train_epochs=2, learning_rate=1e-2)
        trainer.train()
        h = trainer.predict(trainer.eval_dataset).predictions
        rewards = world.rewards(trainer, rows)
        np.testing.assert_allclose(h, rewards[:, 0] - rewards[:, 1], rtol=1e-4, atol=1e-5)
        report = preference_report(trainer, trainer.eval_dataset)
        assert report["accuracy"][0] == pytest.approx((h > 0).mean()) and report["pairs"] == 5
        before = trainer.model.eval()
        save_policy(trainer.model, world.tokenizer, world.path / kind)
        loaded = RewardModel.load(world.path / kind, device="cpu")
        in_memory = RewardModel(before, world.tokenizer, device="cpu")
        prompts, chosen = [row["prompt"] for row in rows], [row["chosen"] for row in rows]
        assert torch.equal(loaded(prompts, chosen), in_memory(prompts, chosen))
        np.testing.assert_allclose(loaded(prompts, chosen), rewards[:, 0], rtol=1e-4, atol=1e-5)


def test_an_adapter_keeps_its_head_whatever_the_settings_forgot(world: World) -> None:
    settings = tiny_lora()
    assert settings.task_type == "CAUSAL_LM" and not settings.modules_to_save
    trainer = world.trainer(4, peft=settings)
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("score.modules_to_save" in name for name in trainable)
    assert settings.task_type == "CAUSAL_LM" and not settings.modules_to_save, "the settings are the caller's"
    with pytest.raises(ConfigError, match="PEFT model already"):
        world.trainer(4, model=trainer.model, peft=tiny_lora())


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("layers", ["all-linear", ["query", "query_proj"]])
def test_an_adapter_brings_the_pooler_that_its_encoder_lacks(world: World, kind: type[PreTrainedModel], layers: Any) -> None:
    base = saved_encoder(world.path / "encoder", world.tokenizer, kind)
    trainer = world.trainer(8, model=base, peft=tiny_lora(target_modules=layers), seed=7, learning_rate=1e-2)
    trainer.train()
    save_policy(trainer.model, world.tokenizer, world.path / "adapter")
    rows = pair_rows(3)
    texts = [row["prompt"] for row in rows], [row["chosen"] for row in rows]
    loaded = RewardModel.load(world.path / "adapter", device="cpu")
    assert torch.equal(loaded(*texts), RewardModel(trainer.model, world.tokenizer, device="cpu")(*texts))


def test_a_merged_adapter_has_its_head(world: World) -> None:
    trainer = world.trainer(8, peft=tiny_lora(), num_train_epochs=2, learning_rate=1e-2)
    trainer.train()
    rows = pair_rows(3)
    expected = world.rewards(trainer, rows)
    save_policy(trainer.model, world.tokenizer, world.path / "merged", merge_adapter=True)
    loaded = RewardModel.load(world.path / "merged", device="cpu")
    found = loaded([row["prompt"] for row in rows], [row["chosen"] for row in rows])
    np.testing.assert_allclose(found, expected[:, 0], rtol=1e-4, atol=1e-5)


def test_a_reward_model_goes_on_from_its_head_and_a_fresh_head_is_the_seeds(world: World) -> None:
    first, again, other = (world.trainer(4, seed=seed).model.score.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    trainer = world.trainer(4)
    save_policy(trainer.model, world.tokenizer, world.path / "first")
    assert torch.equal(world.trainer(4, model=str(world.path / "first"), seed=1).model.score.weight, trainer.model.score.weight)


# Refused


def test_what_cannot_be_trained_is_refused_in_one_line(world: World) -> None:
    nameless = fresh_classifier(ModelSource(str(world.base)), seed=0)
    nameless.config._name_or_path = ""
    refused: list[tuple[type[InputError], str, Any]] = [
        (ConfigError, "center_rewards_coefficient is -1", lambda: world.config(center_rewards_coefficient=-1.0)),
        (ConfigError, "unknown loss_type", lambda: world.config(loss_type="nothing")),
        (ConfigError, "max_length", lambda: world.config(max_length=1)),
        (ConfigError, "learning_rate is nan", lambda: world.config(learning_rate=math.nan)),
        (ConfigError, "label_smoothing has no effect|does not use label_smoothing", lambda: world.config(
            loss_type="hinge", label_smoothing=0.1)),
        (ConfigError, "torch_compile has no effect", lambda: world.config(torch_compile=True)),
        (ConfigError, "nothing to evaluate on", lambda: world.trainer(4, eval_strategy="steps")),
        (DataError, "within 5 tokens; raise max_length", lambda: world.trainer(4, max_length=5)),
        (DataError, "row 2, column chosen", lambda: world.trainer([pair_rows(1)[0], pair_rows(1)[0] | {"chosen": 3}])),
        (ModelError, "no such folder", lambda: world.trainer(4, model=str(world.path / "absent"))),
        (ModelError, "pass processing_class", lambda: RewardTrainer(nameless, world.config())),
    ]  # fmt: skip
    for kind, words, make in refused:
        with pytest.raises(kind, match=words) as error:
            make()
        assert one_line(error), words


def test_a_loss_that_is_not_finite_stops_with_its_rows_saved(world: World) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nn.init.constant_(kwargs["model"].score.weight, math.nan)

    trainer = world.trainer(8, per_device_train_batch_size=2, callbacks=[Poison()])
    with pytest.raises(TrainingDivergedError, match="not finite at step 1"):
        trainer.train()
    kept = json.loads((world.path / "run" / "nonfinite_batch.json").read_text())
    assert kept["step"] == 1 and len(kept["rows"]) == 2


# Resuming


@pytest.mark.parametrize("kind", ["weights", "adapter"])
def test_a_resumed_run_is_the_unbroken_run_to_the_last_bit(world: World, kind: str) -> None:
    settings = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "lr_scheduler_type": "cosine",
        "center_rewards_coefficient": 0.1,
    }

    def trainer(name: str) -> RewardTrainer:
        peft = tiny_lora(lora_dropout=0.1) if kind == "adapter" else None
        return world.trainer(10, 3, peft=peft, output_dir=str(world.path / name), **settings)

    unbroken = trainer("unbroken")
    unbroken.train()
    assert unbroken.state.global_step == 10
    for step in (3, 6):
        resumed = trainer(f"from-{step}")
        resumed.train(resume_from_checkpoint=str(world.path / "unbroken" / f"checkpoint-{step}"))
        assert same(dict(resumed.model.state_dict()), dict(unbroken.model.state_dict()))
        assert same(resumed.optimizer.state_dict(), unbroken.optimizer.state_dict())
        assert log_of(resumed) == log_of(unbroken)
