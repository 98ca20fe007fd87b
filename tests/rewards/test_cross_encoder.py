"""The pairwise cross-encoder: antisymmetric whatever its weights, learns what no reward can say, and is reloaded exactly."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from transformers import BertConfig, BertModel, PreTrainedModel

from fakes import ENCODERS, byte_tokenizer, saved_encoder, saved_llama, tiny_llama
from polyref.errors import ConfigError, DataError, InputError, ModelError, TrainingDivergedError
from polyref.rewards.classifier import fresh_classifier
from polyref.rewards.cross_encoder import (
    CrossEncoder,
    fresh_cross_encoder,
    load_cross_encoder,
    save_cross_encoder,
    train_cross_encoder,
)
from polyref.rewards.cross_fit import cross_fit
from polyref.scoring.models import ModelSource
from polyref.types import PreferenceRecord

PROMPTS = ["one question", "another, longer question", "a", "b", "why?"]
FIRST = ["yes", "a long answer, then", "", "same", "<eos>"]
SECOND = ["no", "short", "something", "same", "because <pad>"]
CYCLE = [("rock", "scissors"), ("scissors", "paper"), ("paper", "rock")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("base"), byte_tokenizer())


def encoder_on(base: Path, seed: int = 0, **changes) -> CrossEncoder:
    return fresh_cross_encoder(ModelSource(str(base)), seed=seed, device="cpu", **changes)


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS")


def saved_bert(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(bos=False)
    tokenizer.cls_token, tokenizer.sep_token = "<bos>", "<eos>"
    config = BertConfig(
        vocab_size=260, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, initializer_range=0.3
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["decoder", "encoder", "adapter"])
def test_antisymmetric_by_construction_whatever_the_weights(base, tmp_path, kind):
    source = saved_bert(tmp_path) if kind == "encoder" else base
    for seed in range(3):
        g = encoder_on(source, seed, peft_config=lora() if kind == "adapter" else None)
        found = g(PROMPTS, FIRST, SECOND)
        assert found.dtype == torch.float64 and found.shape == (5,) and not found.requires_grad
        assert torch.equal(g(PROMPTS, SECOND, FIRST), 1 - found)
        some_swapped = g(PROMPTS, [FIRST[0], *SECOND[1:]], [SECOND[0], *FIRST[1:]])
        assert torch.equal(some_swapped, torch.cat([found[:1], 1 - found[1:]]))
        assert found[3] == 0.5 and (found[[0, 1, 2, 4]] - 0.5).abs().min() > 1e-6
    assert g([], [], []).shape == (0,)


@pytest.mark.parametrize("padding_is_separator", [False, True])
def test_batches_change_nothing_but_rounding(base, padding_is_separator):
    whole = encoder_on(base)
    if padding_is_separator:
        whole.model.config.pad_token_id = 2
    alone = CrossEncoder(whole.model, whole.tokenizer, batch_size=1)
    torch.testing.assert_close(alone(PROMPTS, FIRST, SECOND), whole(PROMPTS, FIRST, SECOND), rtol=0, atol=1e-6)
    order = [4, 2, 0, 1, 3]
    shuffled = whole(*([texts[i] for i in order] for texts in (PROMPTS, FIRST, SECOND)))
    torch.testing.assert_close(shuffled, whole(PROMPTS, FIRST, SECOND)[order], rtol=0, atol=1e-6)


def test_probabilities_are_those_of_the_formula(base):
    encoder = encoder_on(base)
    (pair,) = encoder.encode(PROMPTS[:1], FIRST[:1], SECOND[:1])
    with torch.no_grad():
        logits = [encoder.model(input_ids=torch.tensor([pair.sequence(2, swapped=s)])).logits.item() for s in (False, True)]
    found = encoder(PROMPTS[:1], FIRST[:1], SECOND[:1]).item()
    assert found == pytest.approx(1 / (1 + math.exp(logits[1] - logits[0])), abs=1e-6)


def test_it_learns_a_cycle_that_no_reward_explains(base):
    records = [PreferenceRecord("game", *pair) for pair in CYCLE]
    encoder = encoder_on(base)
    losses = train_cross_encoder(encoder, records * 8, seed=0, epochs=20, learning_rate=3e-3, batch_size=12)
    assert len(losses) == 40 and losses[-1] < 0.1 < losses[0]
    assert (encoder(*zip(*(("game", *pair) for pair in CYCLE), strict=True)) > 0.9).all()


def test_soft_labels_are_learnt_as_what_they_are(base):
    records = [PreferenceRecord("q", "left", "right", chosen_probability=0.7), PreferenceRecord("r", "up", "down", 0.2)]
    encoder = encoder_on(base)
    train_cross_encoder(encoder, records * 4, seed=0, epochs=60, learning_rate=3e-3, batch_size=8, warmup=0.0)
    found = encoder(["q", "r"], ["left", "up"], ["right", "down"])
    torch.testing.assert_close(found, torch.tensor([0.7, 0.2], dtype=torch.float64), rtol=0, atol=0.02)


def test_the_gradient_of_a_label_and_of_its_mirror_image_are_one(base):
    records = [PreferenceRecord(p, a, b, 0.8) for p, a, b in zip(PROMPTS[:2], FIRST[:2], SECOND[:2], strict=True)]
    mirrored = [replace(r, chosen=r.rejected, rejected=r.chosen, chosen_probability=0.2) for r in records]
    weights = []
    for side in (records, mirrored):
        encoder = encoder_on(base)
        train_cross_encoder(encoder, side, seed=0, learning_rate=1e-3)
        weights.append(torch.nn.utils.parameters_to_vector(encoder.model.parameters()))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)


def test_training_repeats_bit_for_bit_and_reports_its_steps(base):
    records = [PreferenceRecord(f"prompt {i}", "y" * (i + 1), "n" * (i % 3)) for i in range(10)]
    weights, steps = [], []
    for _ in range(2):
        encoder = encoder_on(base, peft_config=lora())
        train_cross_encoder(
            encoder, records, seed=1, epochs=2, batch_size=4, learning_rate=1e-3, on_step=lambda *step: steps.append(step)
        )
        weights.append(torch.nn.utils.parameters_to_vector(p for p in encoder.model.parameters() if p.requires_grad))
    assert torch.equal(*weights)
    assert [step[:2] for step in steps] == [(i + 1, 6) for i in range(6)] * 2 and steps[:6] == steps[6:]


@pytest.mark.parametrize("with_adapter", [False, True])
def test_saved_and_reloaded_it_is_the_same(base, tmp_path, with_adapter):
    encoder = encoder_on(base, seed=5, peft_config=lora() if with_adapter else None, max_length=100)
    records = [PreferenceRecord("game", *pair) for pair in CYCLE]
    train_cross_encoder(encoder, records, seed=0, epochs=3, learning_rate=1e-2)
    folder = tmp_path / "mine"
    save_cross_encoder(encoder, folder)
    found = load_cross_encoder(folder, device="cpu")
    assert torch.equal(found(PROMPTS, FIRST, SECOND), encoder(PROMPTS, FIRST, SECOND))
    assert (found.max_length, found.name) == (100, "mine")
    assert not any(parameter.requires_grad for parameter in found.model.parameters())
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))
    (weights,) = folder.glob("*.safetensors")
    with safe_open(weights, "pt") as tensors:
        assert any("score" in name for name in tensors.keys())
        assert any("embed" in name for name in tensors.keys()) != with_adapter
    save_cross_encoder(encoder, folder)  # over what is there
    with pytest.raises(ModelError, match="no parameter is trainable"):
        train_cross_encoder(found, records, seed=0)


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_adapter_brings_the_pooler_that_its_encoder_lacks(tmp_path: Path, kind: type[PreTrainedModel]) -> None:
    tokenizer = byte_tokenizer(bos=False)
    encoder = encoder_on(saved_encoder(tmp_path / "base", tokenizer, kind), seed=5, peft_config=lora())
    train_cross_encoder(encoder, [PreferenceRecord("game", *pair) for pair in CYCLE], seed=0, epochs=2, learning_rate=1e-2)
    save_cross_encoder(encoder, tmp_path / "mine")
    found = load_cross_encoder(tmp_path / "mine", device="cpu")
    assert torch.equal(found(PROMPTS, FIRST, SECOND), encoder(PROMPTS, FIRST, SECOND))


def test_folders_that_are_no_cross_encoder_are_refused(base, tmp_path):
    with pytest.raises(ModelError, match=r"no cross_encoder.json that can be read there; give a folder"):
        load_cross_encoder(base)
    save_cross_encoder(encoder_on(base), tmp_path / "torn")
    (tmp_path / "torn" / "cross_encoder.json").write_text('{"format": 1')
    with pytest.raises(ModelError, match="no cross_encoder.json that can be read"):
        load_cross_encoder(tmp_path / "torn")


def test_an_adapter_on_a_model_from_memory_is_not_saved(base, tmp_path):
    encoder = encoder_on(base, peft_config=lora())
    encoder.model.peft_config["default"].base_model_name_or_path = ""
    with pytest.raises(ModelError, match="base of this adapter was made in memory"):
        save_cross_encoder(encoder, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_models_without_one_logit_are_refused(base):
    model = fresh_classifier(ModelSource(str(base)), seed=0)
    model.config.num_labels = 3
    with pytest.raises(ModelError, match="its head has 3 logits, and one is needed"):
        CrossEncoder(model, byte_tokenizer())
    with pytest.raises(ModelError, match="neither a separator nor"):
        CrossEncoder(fresh_classifier(ModelSource(str(base)), seed=0), byte_tokenizer(eos=False))
    with pytest.raises(ConfigError, match="would leave the score head out"):
        encoder_on(base, peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))


def test_long_pairs_are_cut_to_what_the_model_reads(base, caplog):
    encoder = encoder_on(base)
    assert encoder.max_length == tiny_llama(byte_tokenizer()).config.max_position_embeddings == 256
    with caplog.at_level("INFO"):
        found = encoder(["p" * 400, "q"], ["a" * 400, "a"], ["b" * 400, "b"])
    assert found.isfinite().all() and "1 of 2 pairs were cut to 256 tokens" in caplog.text
    with pytest.raises(ConfigError, match="max_length is 257.*the model reads 256 tokens"):
        encoder_on(base, max_length=257)


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"learning_rate": math.nan}, {"warmup": 1.5}]
)
def test_settings_that_cannot_be_meant_are_refused(base, wrong):
    with pytest.raises(ConfigError, match="train_cross_encoder"):
        train_cross_encoder(encoder_on(base), [PreferenceRecord("p", "a", "b")], seed=0, **wrong)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        encoder_on(base, batch_size=0)
    with pytest.raises(DataError, match="no pairs"):
        train_cross_encoder(encoder_on(base), [], seed=0)
    with pytest.raises(InputError, match="1 completions for 2 prompts"):
        encoder_on(base)(["p", "q"], ["a"], ["b", "c"])


def test_a_network_that_gives_no_number_is_refused(base):
    encoder = encoder_on(base)
    torch.nn.init.constant_(encoder.model.score.weight, math.nan)
    with pytest.raises(ModelError, match="row 1"):
        encoder(["p"], ["a"], ["b"])
    with pytest.raises(TrainingDivergedError, match="the loss of step 1 is nan"):
        train_cross_encoder(encoder, [PreferenceRecord("p", "a", "b")], seed=0)


def test_cross_fitted_it_generalises_to_prompts_it_never_saw(base, tmp_path):
    records = [PreferenceRecord(f"{i}", "+" * (1 + i % 3), "-" * (1 + i % 2)) for i in range(12)]
    fitted = itertools.count()

    def fit(training, fold):
        next(fitted)
        encoder = encoder_on(base)
        train_cross_encoder(encoder, training, seed=0, epochs=6, learning_rate=3e-3, batch_size=4)
        return encoder

    found = cross_fit(records, fit, folds=2, seed=0, folder=tmp_path, settings={"epochs": 6})
    assert (found.probability > 0.8).all() and next(fitted) == 2
