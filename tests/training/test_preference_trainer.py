"""The trainer on models of a few thousand weights: what it optimises, what it logs, and that a resumed run is the same run."""

from __future__ import annotations

import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlavaConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    TrainerCallback,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from fakes import counted_calls, pair_rows, same, saved_llama, saved_lora, tiny_llama, tiny_lora
from polyref import PreferenceConfig, PreferenceTrainer, Reference, ReferenceSet
from polyref.data.records import parse_record
from polyref.errors import ConfigError, DataError, InputError, ModelError, ReferenceSetError, TrainingDivergedError
from polyref.training import preference_trainer
from polyref.training.checkpoints import save_policy
from polyref.training.evaluate import preference_report

METRICS = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
}


class World:
    """A folder, a tokenizer, and trainers that differ in what a test is about."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.path, self.tokenizer = path, tokenizer

    def config(self, **changes: Any) -> PreferenceConfig:
        usual = {
            "output_dir": str(self.path / "run"),
            "cache_dir": str(self.path / "cache"),
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
        return PreferenceConfig(**usual | changes)

    def trainer(
        self,
        rows: Any = 8,
        held_out: Any = None,
        references: Any = None,
        *,
        model: Any = None,
        peft: Any = None,
        **changes: Any,
    ) -> PreferenceTrainer:
        """`rows` and `held_out`: rows, or how many of `pair_rows`."""
        rows, held_out = (pair_rows(each) if isinstance(each, int) else each for each in (rows, held_out))
        callbacks = changes.pop("callbacks", None)
        model = model if model is not None else self.model()
        torch.manual_seed(0)
        return PreferenceTrainer(
            model, references, self.config(**changes), rows, held_out, self.tokenizer, peft, callbacks=callbacks
        )

    def model(self, seed: int = 0, **changes: Any) -> Any:
        return tiny_llama(self.tokenizer, seed=seed, **changes)


@pytest.fixture
def world(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> World:
    return World(tmp_path, tiny_tokenizer)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def log_of(trainer: PreferenceTrainer, *, key: str | None = None) -> list[Any]:
    """The log without what a clock wrote; with `key`, its values."""
    lines = [
        {k: v for k, v in line.items() if not k.endswith(("_runtime", "_per_second"))} for line in trainer.state.log_history
    ]
    return lines if key is None else [line[key] for line in lines if key in line]


def policy_logps(trainer: PreferenceTrainer, dataset: Any) -> np.ndarray:
    """(N, 2) through the model's own logits, a sequence at a time."""
    rows = []
    for pair in dataset.pairs:
        for ids in pair.tokens.completions:
            with torch.no_grad():
                whole = torch.tensor([[*pair.tokens.prompt_ids, *ids]])
                logps = trainer.model.eval()(input_ids=whole).logits[0].double().log_softmax(-1)
            start = len(pair.tokens.prompt_ids) - 1
            rows.append(sum(float(logps[start + t, token]) for t, token in enumerate(ids)))
    return np.array(rows).reshape(-1, 2)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def one_line(error: pytest.ExceptionInfo[Exception]) -> bool:
    return "\n" not in str(error.value) and len(str(error.value)) < 600


# What is optimised


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("loss", "ours"),
    [
        ({"loss_type": "sigmoid"}, {}),
        ({"loss_type": "hinge"}, {}),
        ({"loss_type": "ipo"}, {"length_normalise": True}),
        ({"loss_type": "robust", "label_smoothing": 0.1}, {}),
    ],
    ids=lambda value: "-".join(map(str, value.values())),
)
def test_one_reference_is_ordinary_dpo(world: World, loss: dict[str, Any], ours: dict[str, Any]) -> None:
    """Losses, metrics and weights of TRL's DPOTrainer on the same model and pairs, for the first steps."""
    pytest.importorskip("trl", reason="trl is not installed")
    from trl import DPOConfig, DPOTrainer

    rows, steps = pair_rows(4), {"num_train_epochs": 4, "weight_decay": 0.0, "beta": 0.3, "max_length": None}
    mine = world.trainer(rows, **loss, **ours, **steps)
    mine.train()
    settings = {k: v for k, v in mine.args.to_dict().items() if k in ("learning_rate", "lr_scheduler_type", "use_cpu")}
    config = DPOConfig(
        output_dir=str(world.path / "trl"),
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        **settings | steps | loss,
    )
    theirs = DPOTrainer(
        world.model(), world.model(), config, train_dataset=Dataset.from_list(rows), processing_class=world.tokenizer
    )
    theirs.train()
    rewards = [] if ours else ["rewards/margins"]  # TRL reports those of sums where its loss takes means
    for key in ("loss", "grad_norm", "logps/chosen", *rewards):
        expected = [line[key] for line in theirs.state.log_history if key in line]
        assert len(expected) == 4
        np.testing.assert_allclose(log_of(mine, key=key), expected, rtol=2e-3, atol=2e-5)
    for name, parameter in theirs.model.named_parameters():
        torch.testing.assert_close(weights(mine.model)[name], parameter.detach(), rtol=1e-3, atol=2e-4)


def test_equal_references_are_one_and_their_order_changes_nothing(world: World) -> None:
    one, other = Reference(world.model(1)), Reference(world.model(2))

    def anchors(*members: Reference, **changes: Any) -> np.ndarray:
        return np.array(
            [pair.anchor for pair in world.trainer(4, references=ReferenceSet(members, **changes)).train_dataset.pairs]
        )

    for composition in ("geometric", "arithmetic"):
        np.testing.assert_allclose(anchors(one, one, one, composition=composition), anchors(one), rtol=1e-6)
        straight = anchors(one, other, weights=(0.3, 0.7), composition=composition)
        np.testing.assert_allclose(straight, anchors(other, one, weights=(0.7, 0.3), composition=composition), rtol=1e-6)
        assert not np.allclose(straight, anchors(one))


def test_more_references_add_no_model_call_to_a_step(world: World) -> None:
    made = []
    for k in (1, 4):
        references = ReferenceSet(tuple(Reference(world.model(), system_prompt=f"be {i}") for i in range(k)))
        trainer = world.trainer(8, references=references)
        with counted_calls() as calls:
            trainer.train()
        made.append(calls)
    assert made[0] == made[1] and len(made[0]) == 2, "one call a step: both completions of a prompt in one row"


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "smoothed", "robust"])
@pytest.mark.parametrize(
    ("composition", "divergence"), [("geometric", "reverse"), ("arithmetic", "forward"), ("arithmetic", "reverse")]
)
def test_every_objective_lowers_its_loss(world: World, loss_type: str, composition: Any, divergence: str) -> None:
    references = ReferenceSet((Reference(world.model()), Reference(world.model(1))), (0.8, 0.2), composition)
    smoothing = 0.1 if loss_type in ("smoothed", "robust") else 0.0
    settings = {"loss_type": loss_type, "divergence": divergence, "label_smoothing": smoothing}
    trainer = world.trainer(8, 8, references, num_train_epochs=4, **settings)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_a_completion_without_support_is_told_by_row_and_reference(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = preference_trainer.score_references

    def vetoing(*args: Any, **kwargs: Any) -> Any:
        scores = scored(*args, **kwargs)
        scores.rejected[5, 1] = -math.inf
        return scores

    monkeypatch.setattr(preference_trainer, "score_references", vetoing)
    members = ReferenceSet((Reference(world.model()), Reference(world.model(1), name="strict")))
    with pytest.raises(ReferenceSetError, match="^memory, row 6: has probability 0 under reference strict, whose weight"):
        world.trainer(references=members)


def test_forward_kl_of_a_geometric_anchor_is_refused_before_anything_is_loaded(world: World) -> None:
    with counted_calls() as calls, pytest.raises(ConfigError, match="no geometric anchor") as error:
        world.trainer(model="no/such-model", references=Reference("another/one"), divergence="forward")
    assert one_line(error) and not calls


def test_soft_labels_and_margins_enter_the_loss(world: World) -> None:
    """At the first step the policy is its reference, h = 0, and the loss is known by hand."""
    labels, margins = [0.5, 0.9, 1.0, 0.25], [0.0, 0.5, -1.0, 2.0]
    rows = pair_rows(4, chosen_probability=labels.__getitem__, margin=margins.__getitem__)
    trainer = world.trainer(rows)
    trainer.train()
    expected = [p * softplus(m) + (1 - p) * softplus(-m) for p, m in zip(labels, margins, strict=True)]
    assert log_of(trainer, key="loss") == [pytest.approx(sum(expected) / 4, rel=1e-4)]
    assert log_of(trainer, key="rewards/margins") == [pytest.approx(0.0, abs=1e-4)], "rewards are reported without the margin"


def test_a_completion_that_was_cut_is_scored_without_an_end_by_policy_and_reference(world: World) -> None:
    rows = pair_rows(4, chosen_ended=lambda i: i % 2 > 0, rejected_ended=lambda i: i < 2)
    trainer = world.trainer(rows)
    data, end = trainer.train_dataset, world.tokenizer.eos_token_id
    for pair, row in zip(data.pairs, rows, strict=True):
        assert [ids[-1] == end for ids in pair.tokens.completions] == [row["chosen_ended"], row["rejected_ended"]]
    scored = policy_logps(trainer, data)
    assert np.array([pair.anchor for pair in data.pairs]) == pytest.approx(scored, rel=1e-4)
    assert trainer.evaluate(data)["eval_logps/rejected"] == pytest.approx(scored[:, 1].mean(), rel=1e-4)


def test_dr_dpo_takes_the_whole_batch_at_once(world: World) -> None:
    margins = [0.0, 0.5, -1.0, 2.0]
    trainer = world.trainer(pair_rows(4, margin=margins.__getitem__), dr_beta=1.5)
    trainer.train()
    expected = -1.5 * math.log(sum(math.exp(-softplus(m) / 1.5) for m in margins) / 4)
    assert log_of(trainer, key="loss") == [pytest.approx(expected, rel=1e-4)]
    with pytest.raises(ConfigError, match="whole effective batch"):
        world.config(dr_beta=1.5, gradient_accumulation_steps=2)


def test_a_column_of_weights_chooses_references_prompt_by_prompt(world: World) -> None:
    references = ReferenceSet((Reference(world.model(1)), Reference(world.model(2))))
    column = [[1.0, 0.0], [0.0, 1.0], [0.25, 0.75]]
    trainer = world.trainer(pair_rows(3, reference_weights=column.__getitem__), references=references)
    chosen, rejected = trainer.reference_scores["train"].chosen, trainer.reference_scores["train"].rejected
    for i, pair in enumerate(trainer.train_dataset.pairs):
        assert pair.anchor == pytest.approx((chosen[i] @ column[i], rejected[i] @ column[i]))
    with pytest.raises(DataError, match="row 1, column reference_weights") as error:
        world.trainer(pair_rows(2, reference_weights=[0.5, 0.25, 0.25]), references=references)
    assert one_line(error)


def test_accumulated_batches_are_one_batch(world: World) -> None:
    for peft in (None, tiny_lora()):
        found = []
        for size, accumulation in ((4, 1), (2, 2), (1, 4)):
            trainer = world.trainer(
                4,
                peft=peft,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                optim="sgd",
                learning_rate=0.1,
                max_grad_norm=0.0,
            )
            trainer.train()
            assert trainer.state.global_step == 1
            found.append((log_of(trainer, key="loss")[0], log_of(trainer, key="rewards/chosen")[0], weights(trainer.model)))
        for loss, reward, parameters in found[1:]:
            assert (loss, reward) == pytest.approx(found[0][:2], rel=1e-5, abs=1e-5)
            for name, parameter in parameters.items():
                torch.testing.assert_close(parameter, found[0][2][name], rtol=1e-4, atol=1e-6)


def test_activation_checkpointing_changes_no_weight(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = 0
    original = LlamaMLP.forward

    def counted(self: Any, x: torch.Tensor) -> Any:
        nonlocal passes
        passes += 1
        return original(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    for peft in (None, tiny_lora()):
        runs = []
        for settings in ({}, *({"activation_checkpointing_kwargs": {"use_reentrant": value}} for value in (False, True))):
            trainer = world.trainer(8, peft=peft, activation_checkpointing=bool(settings), **settings)
            passes = 0
            trainer.train()
            runs.append((passes, weights(trainer.model)))
        for made, parameters in runs[1:]:
            assert made > runs[0][0], "activations were made again"
            for name, parameter in runs[0][1].items():
                torch.testing.assert_close(parameters[name], parameter, rtol=1e-5, atol=1e-6)


# The reference when none is given, and adapters


def test_without_references_the_start_is_the_reference(world: World) -> None:
    for peft in (None, tiny_lora()):
        trainer = world.trainer(4, 4, peft=peft, num_train_epochs=3)
        start = trainer.evaluate()
        assert start["eval_loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert start["eval_rewards/chosen"] == pytest.approx(0.0, abs=1e-4)
        trainer.train()
        assert trainer.evaluate()["eval_rewards/margins"] > 0


def test_under_peft_the_reference_is_the_base_with_adapters_off(world: World) -> None:
    plain, adapted = world.trainer(4), world.trainer(4, peft=tiny_lora(), cache_dir=str(world.path / "other cache"))
    np.testing.assert_array_equal(plain.reference_scores["train"].chosen, adapted.reference_scores["train"].chosen)
    base = {name: p for name, p in weights(adapted.model).items() if "lora_" not in name}
    adapted.train()
    assert all(torch.equal(p, base[name]) for name, p in weights(adapted.model).items() if name in base)
    shared = world.trainer(4, peft=tiny_lora(r=3))
    assert shared.reference_scores["train"].hit_rate == 1.0, "adapters that are off do not enter the cache's address"


def test_rows_that_come_after_training_are_not_scored_by_what_was_trained(world: World) -> None:
    """The starting policy is gone then, unless it is what adapters leave when they are off."""
    rows, policy = pair_rows(5, chosen=" later"), world.model()
    for references, model in ((None, world.model()), (Reference(policy), policy)):
        trainer = world.trainer(4, references=references, model=model)
        assert trainer.evaluate(rows)["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-4)
        trainer.train()
        for judged in (trainer.evaluate, trainer.predict):
            with pytest.raises(ConfigError, match="as it was before training, which is gone; give them as") as error:
                judged(rows)
            assert one_line(error)
    first, adapted = world.trainer(4, rows, peft=tiny_lora()), world.trainer(4, peft=tiny_lora())
    for trainer in (first, adapted):
        trainer.train()
    assert adapted.evaluate(rows)["eval_rewards/margins"] == pytest.approx(first.evaluate()["eval_rewards/margins"])
    assert first.evaluate()["eval_rewards/margins"] != 0.0
    other = world.trainer(4, references=Reference(world.model(1)))
    other.train()
    assert other.evaluate(rows)["eval_loss"] > 0


def test_a_policy_that_goes_on_from_an_adapter_has_that_adapter_as_reference(world: World) -> None:
    from peft import PeftModel

    base = saved_llama(world.path / "base", world.tokenizer)
    adapter = saved_lora(world.path / "sft", world.tokenizer, seed=1)

    def policy() -> Any:
        return PeftModel.from_pretrained(world.model(), adapter, is_trainable=True)

    trainer = world.trainer(4, 4, Reference(base, adapter=adapter), model=policy(), num_train_epochs=3)
    np.testing.assert_allclose(trainer.predict(trainer.eval_dataset).predictions, np.zeros(4), atol=1e-4)
    trainer.train()
    assert trainer.evaluate()["eval_rewards/margins"] > 0
    with pytest.raises(ModelError, match="starts from a trained adapter") as error:
        world.trainer(4, model=policy()).train()
    assert one_line(error)
    frozen = PeftModel.from_pretrained(world.model(), adapter)
    with pytest.raises(ModelError, match="is_trainable=True"):
        world.trainer(4, model=frozen)
    with pytest.raises(ConfigError, match="PEFT model already"):
        world.trainer(4, model=policy(), peft=tiny_lora())


def test_saved_reloaded_and_merged_policies_give_equal_logits(world: World) -> None:
    from peft import AutoPeftModelForCausalLM

    base = saved_llama(world.path / "base", world.tokenizer)
    ids = torch.tensor([[1, 20, 30, 40]])
    trainer = world.trainer(4, model=str(base))
    trainer.train()
    expected = trainer.model.eval()(ids).logits
    save_policy(trainer.model, world.tokenizer, world.path / "whole")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(world.path / "whole")(ids).logits, expected)

    trainer = world.trainer(4, model=str(base), peft=tiny_lora(), learning_rate=0.05)
    trainer.train()
    expected = trainer.model.eval()(ids).logits
    assert not torch.allclose(expected, world.model()(ids).logits, atol=1e-3)
    save_policy(trainer.model, world.tokenizer, world.path / "adapter")
    assert not (world.path / "adapter" / "model.safetensors").exists()
    torch.testing.assert_close(AutoPeftModelForCausalLM.from_pretrained(world.path / "adapter").eval()(ids).logits, expected)
    save_policy(trainer.model, world.tokenizer, world.path / "merged", merge_adapter=True)
    merged = AutoModelForCausalLM.from_pretrained(world.path / "merged")
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert not [name for name in merged.state_dict() if "lora" in name]
    again = PreferenceTrainer(str(world.path / "merged"), None, world.config(), pair_rows(4))
    assert len(again.train_dataset) == 4, "the tokenizer was saved with it"


# What is measured


def test_predict_returns_the_implied_reward_differences(world: World) -> None:
    references = ReferenceSet((Reference(world.model(1)), Reference(world.model(2))))
    trainer = world.trainer(8, 5, references, beta=0.3, per_device_eval_batch_size=2)
    trainer.train()
    data: Any = trainer.eval_dataset
    ratios = policy_logps(trainer, data) - np.array([pair.anchor for pair in data.pairs])
    h = 0.3 * (ratios[:, 0] - ratios[:, 1])
    found = trainer.predict(data)
    np.testing.assert_allclose(found.predictions, h, rtol=1e-3, atol=1e-4)
    metrics = trainer.evaluate()
    assert {f"eval_{name}" for name in METRICS} | {"eval_loss"} <= metrics.keys()
    assert metrics["eval_rewards/margins"] == pytest.approx(h.mean(), rel=1e-3)
    assert metrics["eval_rewards/accuracies"] == pytest.approx((h > 0).mean())
    assert metrics["eval_rewards/chosen"] == pytest.approx(0.3 * ratios[:, 0].mean(), rel=1e-3)
    assert metrics["eval_rewards/rejected"] == pytest.approx(0.3 * ratios[:, 1].mean(), rel=1e-3)
    assert metrics["eval_logps/chosen"] == pytest.approx(policy_logps(trainer, data)[:, 0].mean(), rel=1e-4)
    assert metrics["eval_loss"] == pytest.approx(np.log1p(np.exp(-h)).mean(), rel=1e-3)
    report = preference_report(trainer, data)
    assert (report["pairs"], report["prompts"]) == (5, 5)
    assert report["accuracy"][0] == pytest.approx((h > 0).mean()) and report["h"] == found.predictions.tolist()
    low, high = report["margin"][1:]
    assert low <= h.mean() <= high


def test_forward_rewards_are_those_of_the_forward_difference(world: World) -> None:
    references = ReferenceSet((Reference(world.model()), Reference(world.model(), system_prompt="x")), composition="arithmetic")
    trainer = world.trainer(4, 4, references, divergence="forward", beta=0.3, learning_rate=3e-4)
    trainer.train()
    data: Any = trainer.eval_dataset
    ratio = np.exp(np.array([pair.anchor for pair in data.pairs]) - policy_logps(trainer, data))
    expected = 0.3 * (ratio[:, 1] - ratio[:, 0])
    np.testing.assert_allclose(trainer.predict(data).predictions, expected, rtol=1e-2, atol=1e-3)
    metrics = trainer.evaluate()
    difference = metrics["eval_rewards/chosen"] - metrics["eval_rewards/rejected"]
    assert metrics["eval_rewards/margins"] == pytest.approx(difference, rel=1e-4, abs=1e-6)


def test_training_metrics_are_means_over_the_pairs_since_the_last_line(world: World) -> None:
    each, all_at_once = world.trainer(10, logging_steps=1), world.trainer(10, logging_steps=3)
    each.train()
    all_at_once.train()
    assert {name for line in each.state.log_history[:-1] for name in line} >= METRICS | {"loss", "grad_norm", "learning_rate"}
    sizes = [4, 4, 2]
    for name in METRICS:
        mean = np.average(log_of(each, key=name), weights=sizes)
        assert log_of(all_at_once, key=name) == [pytest.approx(mean, rel=1e-5, abs=1e-6)]
    assert log_of(all_at_once, key="train_loss")[0] == pytest.approx(np.mean(log_of(each, key="loss")), rel=1e-5)


def test_evaluation_during_training_can_choose_the_best_checkpoint(world: World) -> None:
    trainer = world.trainer(
        8,
        4,
        num_train_epochs=3,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/margins",
        greater_is_better=False,
    )
    trainer.train()
    margins = log_of(trainer, key="eval_rewards/margins")
    assert len(margins) == 3 and trainer.state.best_metric == min(margins)
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(min(margins), rel=1e-5)


def test_an_evaluation_drops_no_row(world: World) -> None:
    trainer = world.trainer(5, 5, dataloader_drop_last=True, per_device_eval_batch_size=3)
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (5,)  # type: ignore[arg-type]
    assert len(trainer.get_eval_dataloader()) == 2 and len(trainer.get_train_dataloader()) == 1


def test_several_evaluation_sets_keep_their_names(world: World) -> None:
    held_out = {"near": pair_rows(4), "far": DatasetDict(train=Dataset.from_list(pair_rows(3)))}
    trainer = world.trainer(4, held_out, eval_strategy="epoch")
    trainer.train()
    assert log_of(trainer, key="eval_near_rewards/accuracies") and log_of(trainer, key="eval_far_rewards/margins")
    assert set(trainer.reference_scores) == {"train", "near", "far"}


# Guards


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite_stops_with_step_and_rows_saved(world: World, accumulation: int) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                nn.init.constant_(kwargs["model"].lm_head.weight, math.nan)

    trainer = world.trainer(8, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation, callbacks=[Poison()])
    with pytest.raises(TrainingDivergedError, match="not finite at step 1") as error:
        trainer.train()
    assert one_line(error)
    kept = json.loads((world.path / "run" / "nonfinite_batch.json").read_text())
    assert kept["step"] == 1 and len(kept["rows"]) == 2
    assert all(row["source"] == "memory" and 1 <= row["row"] <= 8 for row in kept["rows"])
    assert trainer.state.global_step == 1


def test_an_evaluation_that_is_not_finite_names_rows_of_the_set_it_was_on(world: World) -> None:
    trainer = world.trainer(4, {"near": pair_rows(4), "far": pair_rows(6)}, per_device_eval_batch_size=8)
    nn.init.constant_(trainer.model.lm_head.weight, math.nan)
    with pytest.raises(TrainingDivergedError):
        trainer.evaluate()
    assert len(json.loads((world.path / "run" / "nonfinite_batch.json").read_text())["rows"]) == 4
    with pytest.raises(TrainingDivergedError):
        trainer.predict(trainer.eval_dataset["far"])  # type: ignore[index]
    assert len(json.loads((world.path / "run" / "nonfinite_batch.json").read_text())["rows"]) == 6


def test_dropout_is_off_so_training_starts_at_its_reference(world: World) -> None:
    noisy = {"attention_dropout": 0.5}
    for peft in (None, tiny_lora(lora_dropout=0.5)):
        first_losses = []
        for settings in ({}, {"disable_dropout": False}):
            trainer = world.trainer(4, model=world.model(**noisy), peft=peft, **settings)
            trainer.train()
            first_losses.append(trainer.state.log_history[0]["loss"])
        assert first_losses[0] == pytest.approx(math.log(2), abs=1e-4)
        assert abs(first_losses[1] - math.log(2)) > 1e-3


def test_dropout_that_is_no_module_is_off_too(world: World) -> None:
    config = OPTConfig(
        vocab_size=len(world.tokenizer),
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        max_position_embeddings=128,
        init_std=0.2,
        dropout=0.5,
        attention_dropout=0.5,
        layerdrop=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    trainer = world.trainer(4, model=OPTForCausalLM(config))
    trainer.train()
    assert log_of(trainer, key="loss")[0] == pytest.approx(math.log(2), abs=1e-3)


def test_the_guard_is_for_the_first_step_of_an_unbroken_run(world: World) -> None:
    """A reference that is given may differ; a policy that was trained and goes on does differ."""
    world.trainer(4, references=Reference(world.model(1))).train()
    trainer = world.trainer(8, save_strategy="steps", save_steps=1)
    trainer.train()
    world.trainer(8, output_dir=str(world.path / "resumed")).train(
        resume_from_checkpoint=str(world.path / "run" / "checkpoint-1")
    )


def test_falling_chosen_log_probs_are_explained(world: World, caplog: pytest.LogCaptureFixture) -> None:
    class Sink(TrainerCallback):
        """Moves the mass of every completion elsewhere, as runaway training does."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                kwargs["model"].lm_head.weight[200:210] *= 1.5

    rows = pair_rows(8, rejected=" no" * 20)
    with caplog.at_level(logging.WARNING, logger="polyref"):
        trainer = world.trainer(rows, num_train_epochs=4, learning_rate=1e-6, callbacks=[Sink()])
        trainer.train()
    said = [record.message for record in caplog.records if "lost probability" in record.message]
    assert len(said) == 1 and "Raise beta, lower learning_rate" in said[0]
    assert log_of(trainer, key="logps/chosen")[-1] < log_of(trainer, key="logps/chosen")[0]


REFUSED_SOURCES = {
    "streams rows": lambda: Dataset.from_list(pair_rows(4)).to_iterable_dataset(),
    "there are no rows": list,
    "no such file": lambda: "absent.jsonl",
    "row 2, column chosen": lambda: [pair_rows(1)[0], pair_rows(1)[0] | {"chosen": 3}],
}


@pytest.mark.parametrize("words", REFUSED_SOURCES)
def test_data_that_cannot_be_used_is_refused_in_one_line(world: World, words: str) -> None:
    with pytest.raises(DataError, match=words) as error:
        world.trainer(REFUSED_SOURCES[words]())
    assert one_line(error)


def test_records_rows_files_and_data_sets_are_the_same_data(world: World) -> None:
    rows = pair_rows(3)
    (world.path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows).save_to_disk(str(world.path / "saved"))
    records = [parse_record(row, source="memory", row_number=i) for i, row in enumerate(rows, 1)]
    first = world.trainer(records)
    forms = [rows, tuple(records), Dataset.from_list(rows), DatasetDict(train=Dataset.from_list(rows)), iter(rows)]
    for source in [*forms, str(world.path / "pairs.jsonl"), world.path / "saved", first.train_dataset]:
        trainer = world.trainer(source)
        assert [p.tokens for p in trainer.train_dataset.pairs] == [p.tokens for p in first.train_dataset.pairs]


def test_evaluation_without_data_is_refused(world: World) -> None:
    with pytest.raises(ConfigError, match="nothing to evaluate on; give an eval_dataset"):
        world.trainer(4, eval_strategy="steps")


def test_a_set_cut_to_nothing_is_refused(world: World) -> None:
    with pytest.raises(DataError, match="within 5 tokens; raise max_length") as error:
        world.trainer(4, max_length=5)
    assert one_line(error)


def test_models_that_are_no_text_decoders_are_refused_in_one_line(world: World) -> None:
    T5Config(vocab_size=20, d_model=8, num_layers=1, num_heads=1).save_pretrained(world.path / "t5")
    LlavaConfig().save_pretrained(world.path / "llava")
    for name, words in (("t5", "encoder-decoder"), ("llava", "vision"), ("absent", "no such folder")):
        with pytest.raises(ModelError, match=words) as error:
            world.trainer(model=str(world.path / name))
        assert one_line(error)
    with pytest.raises(ModelError, match="pass processing_class"):
        PreferenceTrainer(world.model(), None, world.config(), pair_rows(2))


def test_prompt_learning_adapters_are_refused(world: World) -> None:
    from peft import PromptTuningConfig

    with pytest.raises(InputError, match="prompt-learning"):
        world.trainer(4, peft=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_a_failed_start_leaves_no_run_behind(world: World) -> None:
    with pytest.raises(DataError):
        world.trainer("absent.jsonl")
    assert not list(world.path.rglob("*.json*"))


# Resuming


@pytest.mark.parametrize("kind", ["weights", "adapter"])
def test_a_resumed_run_is_the_unbroken_run_to_the_last_bit(world: World, kind: str) -> None:
    """Weights, optimiser, and every logged number but the clock's; from the middle of an epoch and of a log line's window."""
    peft, accumulation = (None, 1) if kind == "weights" else (tiny_lora(lora_dropout=0.1), 2)
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 3,
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
    }

    def trainer(name: str) -> PreferenceTrainer:
        return world.trainer(10, 3, peft=peft, output_dir=str(world.path / name), **settings)

    unbroken = trainer("unbroken")
    unbroken.train()
    steps = unbroken.state.global_step
    assert steps == (15 if accumulation == 1 else 9)
    for step in (3, 6):
        resumed = trainer(f"from-{step}")
        resumed.train(resume_from_checkpoint=str(world.path / "unbroken" / f"checkpoint-{step}"))
        assert resumed.state.global_step == steps
        assert same(dict(resumed.model.state_dict()), dict(unbroken.model.state_dict()))
        assert same(resumed.optimizer.state_dict(), unbroken.optimizer.state_dict())
        assert resumed.lr_scheduler.state_dict() == unbroken.lr_scheduler.state_dict()
        assert log_of(resumed) == log_of(unbroken)


def test_a_run_repeats_to_the_last_bit_and_its_seed_matters(world: World) -> None:
    def run(**changes: Any) -> PreferenceTrainer:
        trainer = world.trainer(10, per_device_train_batch_size=2, **changes)
        trainer.train()
        return trainer

    first, again = run(), run()
    assert same(weights(first.model), weights(again.model)) and log_of(first) == log_of(again)
    zero, other = run(data_seed=0), run(data_seed=1)
    assert log_of(zero, key="loss") != log_of(other, key="loss")
    assert run(seed=7)._get_train_sampler().seed == 7 and zero._get_train_sampler().seed == 0


def test_a_schedule_given_after_the_trainer_was_made_is_kept(world: World) -> None:
    trainer = world.trainer(4)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    trainer.lr_scheduler = given = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 0.5)
    trainer.train()
    assert trainer.lr_scheduler is given


def test_warnings_of_this_library_are_none(world: World) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        world.trainer(4).train()
    assert not [w for w in caught if "polyref" in str(w.filename)]


def test_what_the_cache_spared_is_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="polyref"):
        world.trainer(4, references=Reference(saved_llama(world.path / "reference", world.tokenizer, seed=1)))
        world.trainer(4, references=Reference(str(world.path / "reference")), beta=0.5)
    told = [line for line in caplog.messages if "in the cache" in line]
    assert told == [
        "train set: 8 log-probabilities under the references made now, 0 found in the cache",
        "train set: 0 log-probabilities under the references made now, 8 found in the cache",
    ]
