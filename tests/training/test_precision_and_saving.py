"""Mixed precision starts where the reference is; what would break while saving is mended or refused before training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from fakes import byte_tokenizer, pair_rows, saved_llama, tiny_llama, tiny_lora
from polyref import PreferenceConfig, PreferenceTrainer, Reference
from polyref.errors import ConfigError
from polyref.training.checkpoints import check_mergeable

TOKENIZER = byte_tokenizer()


def config(folder: Path, **changes: Any) -> PreferenceConfig:
    settings = {"output_dir": str(folder / "run"), "cache_dir": str(folder / "cache"), "max_steps": 2, "logging_steps": 1}
    return PreferenceConfig(**settings | {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True} | changes)


def test_under_bf16_the_first_loss_is_that_of_equal_policy_and_reference(tmp_path: Path) -> None:
    trainer = PreferenceTrainer(
        tiny_llama(TOKENIZER), None, config(tmp_path, bf16=True), pair_rows(8), processing_class=TOKENIZER
    )
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(0.6931, abs=2e-3)
    assert abs(first["rewards/chosen"]) < 0.02


def test_scores_made_under_autocast_are_not_taken_for_others(tmp_path: Path) -> None:
    anchors = []
    for bf16 in (True, False):
        model = tiny_llama(TOKENIZER)
        trainer = PreferenceTrainer(model, None, config(tmp_path, bf16=bf16), pair_rows(8), processing_class=TOKENIZER)
        anchors.append(torch.tensor([pair.anchor for pair in trainer.train_dataset.pairs]))
    assert not torch.equal(*anchors)
    torch.testing.assert_close(*anchors, rtol=0.05, atol=0.5)


def test_a_reference_that_names_the_policy_in_another_dtype_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved_llama(tmp_path / "policy", TOKENIZER, initializer_range=0.5)
    reference = Reference(str(folder), dtype="bfloat16")
    trainer = PreferenceTrainer(str(folder), reference, config(tmp_path), pair_rows(8))
    with caplog.at_level(logging.WARNING, logger="polyref"):
        trainer.train()
    assert "names the policy's own model" in caplog.text


def test_neftune_and_dropout_do_not_set_off_the_start_guard(tmp_path: Path) -> None:
    model = tiny_llama(TOKENIZER, attention_dropout=0.3)
    args = config(tmp_path, disable_dropout=False, neftune_noise_alpha=5.0)
    PreferenceTrainer(model, None, args, pair_rows(8), processing_class=TOKENIZER).train()


def test_a_generation_config_that_cannot_be_saved_is_mended(tmp_path: Path) -> None:
    model = tiny_llama(TOKENIZER)
    model.generation_config.temperature = 0.7
    trainer = PreferenceTrainer(model, None, config(tmp_path), pair_rows(8), processing_class=TOKENIZER)
    trainer.save_model(str(tmp_path / "saved"))
    assert model.generation_config.do_sample is True


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_merging_an_adapter_on_tied_embeddings_is_refused() -> None:
    tied = get_peft_model(tiny_llama(TOKENIZER, tie_word_embeddings=True), tiny_lora(target_modules=["lm_head", "q_proj"]))
    with pytest.raises(ConfigError, match="tied input and output embeddings"):
        check_mergeable(tied)
    check_mergeable(get_peft_model(tiny_llama(TOKENIZER, tie_word_embeddings=True), tiny_lora(target_modules=["q_proj"])))
    check_mergeable(get_peft_model(tiny_llama(TOKENIZER), tiny_lora(target_modules=["lm_head"])))


def test_rows_can_be_evaluated_and_predicted_as_they_are(tmp_path: Path) -> None:
    trainer = PreferenceTrainer(tiny_llama(TOKENIZER), None, config(tmp_path), pair_rows(8), processing_class=TOKENIZER)
    assert trainer.evaluate(pair_rows(4))["eval_rewards/accuracies"] == 0.5
    assert trainer.predict(pair_rows(4)).predictions.shape == (4,)


@pytest.mark.parametrize(
    "changes",
    [{"label_smoothing_factor": 0.1}, {"train_sampling_strategy": "sequential"}, {"torch_compile": True}],
)
def test_a_setting_without_effect_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="has no effect here"):
        config(tmp_path, **changes)
