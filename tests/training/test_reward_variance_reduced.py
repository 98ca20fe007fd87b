"""Two-stage variance reduction: reward training beside an auxiliary preference model, by enumeration of what data could be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, LlamaForSequenceClassification, PreTrainedTokenizerFast

from fakes import auxiliary_columns, counted_calls, pair_rows, saved_llama, tiny_lora
from pair_outcomes import CYCLE, LOSSES, assert_known_variance, expectation, outcomes, pair_losses
from polyref.data.collate import row_length
from polyref.errors import ConfigError, DataError
from polyref.training.dataset import PairCollator
from polyref.training.reward_config import RewardConfig
from polyref.training.reward_trainer import METRICS, RewardTrainer

REDUCED: dict[str, Any] = {"objective": "variance_reduced"}


class World:
    """A folder with a language model, and reward trainers that differ in what a test is about."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.path, self.tokenizer = path, tokenizer
        self.base = saved_llama(path / "base", tokenizer)

    def trainer(self, rows: Any, held_out: Any = None, *, model: Any = None, peft: Any = None, **changes: Any) -> RewardTrainer:
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
        args = RewardConfig(**usual | changes)
        return RewardTrainer(self.base if model is None else model, args, rows, held_out, self.tokenizer, peft)


@pytest.fixture
def world(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> World:
    return World(tmp_path, tiny_tokenizer)


def settings(loss_type: str) -> dict[str, Any]:
    return {"loss_type": loss_type, "label_smoothing": 0.15 if loss_type in ("smoothed", "robust") else 0.0}


def antisymmetric(seed: int, *, spread: float) -> Tensor:
    """An arbitrary g of three completions: near 1/2 where `spread` is small, near 0 and 1 where it is large."""
    logits = spread * torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.sigmoid(logits - logits.T)


# Expectation and variance.


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("spread", [0.5, 20.0])
def test_no_auxiliary_model_biases_the_step_or_its_gradient(world: World, loss_type: str, spread: float) -> None:
    plain_rows, plain_chances = outcomes(CYCLE, 0)
    value, slope = expectation(world.trainer(plain_rows, **settings(loss_type)), plain_chances)
    assert slope.norm() > 1e-2
    for number, control in enumerate((1.0, 0.6, "optimal")):
        rows, chances = outcomes(antisymmetric(number, spread=spread), 2)
        trainer = world.trainer(rows, control_coefficient=control, **REDUCED, **settings(loss_type))
        found, found_slope = expectation(trainer, chances)
        assert found == pytest.approx(value, rel=1e-4)
        assert (found_slope - slope).norm() < 1e-4 * slope.norm()


@pytest.mark.parametrize(
    ("loss_type", "pairs", "control"),
    [("sigmoid", 1, 1.0), ("sigmoid", 4, 1.0), ("sigmoid", 16, 1.0), ("hinge", 1, "optimal"), ("hinge", 4, "optimal")],
)
def test_with_the_true_preference_the_variance_is_the_known_one(world: World, loss_type: str, pairs: int, control: Any) -> None:
    plain = world.trainer(outcomes(CYCLE, 0)[0], **settings(loss_type))
    trainer = world.trainer(outcomes(CYCLE, pairs)[0], control_coefficient=control, **REDUCED, **settings(loss_type))
    assert_known_variance(plain, trainer, pairs, control)


def test_control_0_is_plain_training_and_the_label_as_prediction_leaves_the_auxiliary_term(world: World) -> None:
    rows = pair_rows(8, **auxiliary_columns(3))
    lines = []
    for changes in ({}, REDUCED | {"control_coefficient": 0.0}):
        trainer = world.trainer(rows, center_rewards_coefficient=0.1, max_steps=1, **changes)
        trainer.train()
        lines.append(trainer.state.log_history[0])
    for name in ("loss", "grad_norm", *METRICS):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-5)
    losses, terms = pair_losses(world.trainer([row | {"predicted_probability": 1.0} for row in rows], **REDUCED))
    assert terms is not None
    torch.testing.assert_close(losses.detach().double(), terms.auxiliary)


def test_the_data_pair_as_its_own_auxiliary_pair_is_plain_training_whatever_is_predicted(world: World) -> None:
    rows = pair_rows(4)
    own = [
        row | {"auxiliary_1": [row["chosen"]], "auxiliary_2": [row["rejected"]], "auxiliary_probability": [g]}
        | {"predicted_probability": g}
        for row, g in zip(rows, (0.1, 0.9, 1.0, 0.4), strict=True)
    ]  # fmt: skip
    losses, _ = pair_losses(world.trainer(own, **REDUCED))
    torch.testing.assert_close(losses, pair_losses(world.trainer(rows))[0])


def test_no_gradient_reaches_the_auxiliary_model(world: World) -> None:
    trainer = world.trainer(pair_rows(4, **auxiliary_columns(2)), **REDUCED)
    batch = trainer.data_collator(list(trainer.train_dataset.pairs))
    words = [batch[name].requires_grad_() for name in ("predicted_probability", "auxiliary_probability")]
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    assert all(word.grad is None for word in words)


def test_centring_is_of_the_data_pair_alone(world: World) -> None:
    rows, found = pair_rows(4, **auxiliary_columns(2)), []
    for coefficient in (None, 0.5):
        trainer = world.trainer(rows, center_rewards_coefficient=coefficient, **REDUCED)
        trainer.train()
        found.append(trainer.state.log_history[0])
    plain = world.trainer(pair_rows(4), pair_rows(4))
    centred = world.trainer(pair_rows(4), pair_rows(4), center_rewards_coefficient=0.5)
    penalty = centred.evaluate()["eval_loss"] - plain.evaluate()["eval_loss"]
    assert penalty > 1e-3 and found[1]["loss"] - found[0]["loss"] == pytest.approx(penalty, rel=1e-3)
    assert {name: found[1][name] for name in found[1] if "vr/" in name} == {k: v for k, v in found[0].items() if "vr/" in k}


# The step.


@pytest.mark.parametrize("pairs", [1, 4])
def test_a_step_passes_each_prompt_once(world: World, pairs: int) -> None:
    trainer = world.trainer(pair_rows(8, **auxiliary_columns(pairs)), **REDUCED)
    with counted_calls(LlamaForSequenceClassification) as calls:
        trainer.train()
    assert [rows for rows, _ in calls] == [4, 4]
    lengths = trainer.train_dataset.lengths
    assert max(width for _, width in calls) == max(lengths)
    assert lengths == [row_length(p.tokens.prompt_ids, p.tokens.completions) for p in trainer.train_dataset.pairs]
    assert all(len(p.tokens.completions) == 2 + 2 * pairs for p in trainer.train_dataset.pairs)


def test_rows_of_one_completion_give_the_same_step(world: World) -> None:
    trainer = world.trainer(pair_rows(5, **auxiliary_columns(2)), **REDUCED)
    shared, _ = pair_losses(trainer)
    trainer.plan = replace(trainer.plan, layout="separate", fused=False)
    trainer.data_collator = PairCollator("separate")
    torch.testing.assert_close(pair_losses(trainer)[0], shared, rtol=1e-4, atol=1e-5)


def test_an_encoder_is_trained_one_row_a_completion(world: World) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=len(world.tokenizer), num_labels=1, **sizes))
    trainer = world.trainer(pair_rows(4, **auxiliary_columns(2)), pair_rows(4), model=model, num_train_epochs=4, **REDUCED)
    assert trainer.plan.layout == "separate"
    with counted_calls(BertForSequenceClassification) as calls:
        trainer.train()
    assert {rows for rows, _ in calls} == {4 * 6}


def test_accumulated_batches_are_one_batch(world: World) -> None:
    found = []
    for size, accumulation in ((4, 1), (2, 2)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation} | REDUCED
        trainer = world.trainer(pair_rows(4, **auxiliary_columns(2)), **changes)
        trainer.train()
        found.append(trainer.state.log_history[0])
    for name in ("loss", "grad_norm", "vr/data", "vr/auxiliary", "vr/data_variance", "vr/factor"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-3)


def test_the_log_has_what_a_policys_has(world: World) -> None:
    trainer = world.trainer(pair_rows(8, **auxiliary_columns(4)), logging_steps=2, **REDUCED)
    trainer.train()
    line = trainer.state.log_history[0]
    names = ("data", "correction", "auxiliary")
    shown = {f"vr/{name}{what}" for name in names for what in ("", "_variance")} | {"vr/loss_variance", "vr/factor"}
    assert {name for name in line if "vr/" in name} == shown | {"vr/coefficient"} and set(METRICS) <= line.keys()
    assert line["vr/factor"] == pytest.approx(line["vr/data_variance"] / line["vr/loss_variance"])


def test_evaluation_is_of_the_plain_loss_and_reads_no_auxiliary_column(world: World) -> None:
    rows, columns = pair_rows(6), auxiliary_columns(3)
    expected = world.trainer(rows, rows).evaluate()["eval_loss"]
    reduced = world.trainer(pair_rows(6, **columns), {"bare": rows, "full": pair_rows(6, **columns)}, **REDUCED)
    with counted_calls(LlamaForSequenceClassification) as calls:
        found = reduced.evaluate()
    assert found["eval_bare_loss"] == found["eval_full_loss"] == expected and not [k for k in found if "vr/" in k]
    assert len(set(calls)) == 1


@pytest.mark.parametrize("peft", [None, tiny_lora(lora_dropout=0.1)], ids=["weights", "adapter"])
def test_a_resumed_run_is_the_unbroken_run_to_the_last_bit(world: World, peft: Any) -> None:
    def run(name: str, **how: Any) -> tuple[Any, Tensor]:
        made = world.trainer(
            pair_rows(10, **auxiliary_columns(2)),
            pair_rows(3),
            peft=peft,
            output_dir=str(world.path / name),
            control_coefficient="optimal",
            center_rewards_coefficient=0.1,
            num_train_epochs=2,
            per_device_train_batch_size=2,
            logging_steps=2,
            save_strategy="steps",
            save_steps=3,
            eval_strategy="steps",
            eval_steps=4,
            **REDUCED,
        )
        made.train(**how)
        timeless = ("_runtime", "_per_second")
        lines = [{k: v for k, v in line.items() if not k.endswith(timeless)} for line in made.state.log_history]
        return lines, torch.cat([p.detach().flatten() for p in made.model.parameters()])

    lines, weights = run("unbroken")
    again, resumed = run("resumed", resume_from_checkpoint=str(world.path / "unbroken" / "checkpoint-3"))
    assert torch.equal(weights, resumed) and lines == again


# What is refused.


def test_rows_without_an_auxiliary_model_are_refused_in_one_line(world: World) -> None:
    full = pair_rows(3, **auxiliary_columns(2))
    cases = (
        (pair_rows(3), "row 1, column auxiliary_1: is missing, and objective variance_reduced needs it"),
        ([full[0], pair_rows(1)[0]], "row 2, column auxiliary_1: is missing, and objective variance_reduced needs it"),
        ([full[0], pair_rows(1, **auxiliary_columns(1))[0]], "row 2, column auxiliary_1: holds 1 auxiliary pairs where row 1"),
        ([row | {"margin": 0.5} for row in full], "row 1, column margin: has no counterpart for auxiliary pairs"),
        ([full[0], full[1] | {"predicted_probability": None}], "row 2, column predicted_probability: is missing"),
        ([full[0], full[1] | {"auxiliary_probability": [0.5, 1.5]}], "row 2, column auxiliary_probability: entry 2 is 1.5"),
        ([full[0], full[1] | {"auxiliary_probability": [0.5]}], "row 2, column auxiliary_probability: holds 1 entries"),
        ([full[0] | {"predicted_probability": float("nan")}], "row 1, column predicted_probability: is nan"),
    )
    for rows, words in cases:
        with pytest.raises(DataError, match=words) as error:
            world.trainer(rows, **REDUCED)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "best"}, "unknown objective 'best'; use plain or variance_reduced"),
        ({"objective": "doubly_robust"}, "a reward model has none; train a policy by it, or use variance_reduced"),
        ({"control_coefficient": "estimated"}, "control_coefficient has no effect with objective plain"),
        ({"control_coefficient": 0.5}, "control_coefficient has no effect with objective plain; set objective"),
        (REDUCED | {"control_coefficient": -1.0}, "is -1.0; give a number of at least 0, or optimal, or estimated"),
        (REDUCED | {"control_coefficient": "most"}, "control_coefficient is 'most'; give a number"),
    ],
    ids=str,
)
def test_settings_that_contradict_the_objective_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        RewardConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **changes)
    assert "\n" not in str(error.value)
