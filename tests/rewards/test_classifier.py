"""Classifiers of one logit: reloaded exactly, drawn from a seed, and refused in one line when they are something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaForSequenceClassification

from fakes import byte_tokenizer, saved_gguf, saved_llama, saved_lora, tiny_llama
from polyref.errors import ModelError
from polyref.rewards.classifier import fresh_classifier, is_adapter, load_adapted_classifier, load_classifier
from polyref.scoring.models import ModelSource

IDS = torch.arange(4, 30)[None]


def saved_classifier(folder: Path, tokenizer, **changes) -> Path:
    torch.manual_seed(1)
    config = tiny_llama(tokenizer, **{"num_labels": 1} | changes).config
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapted(base: Path, task: str = "SEQ_CLS", **changes):
    """A trained-looking LoRA with a head of its own on the language model in `base`."""
    model = get_peft_model(
        fresh_classifier(ModelSource(str(base)), seed=0),
        LoraConfig(**{"r": 2, "target_modules": "all-linear", "task_type": task} | changes),
    )
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or "score" in name):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_a_trained_classifier_is_loaded_bit_by_bit(tmp_path, tiny_tokenizer):
    folder = saved_classifier(tmp_path, tiny_tokenizer)
    found, expected = load_classifier(ModelSource(str(folder))), load_file(folder / "model.safetensors")
    assert not found.training
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())


def test_a_fresh_head_is_drawn_from_the_seed_alone(tmp_path, tiny_tokenizer):
    source = ModelSource(str(saved_llama(tmp_path, tiny_tokenizer)))
    state = torch.random.get_rng_state()
    heads = [fresh_classifier(source, seed=seed).score.weight for seed in (1, 1, 2)]
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    base = tiny_llama(tiny_tokenizer)
    assert torch.equal(fresh_classifier(source, seed=1).model.embed_tokens.weight, base.model.embed_tokens.weight)


def test_an_encoder_without_a_pooler_gets_one(tmp_path, tiny_tokenizer):
    config = BertConfig(vocab_size=260, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    assert fresh_classifier(ModelSource(str(tmp_path)), seed=0)(input_ids=IDS).logits.shape == (1, 1)


@pytest.mark.parametrize("modules_to_save", [None, ["embed_tokens"]])
def test_an_adapter_and_its_head_are_loaded_exactly(tmp_path, tiny_tokenizer, modules_to_save):
    base = saved_llama(tmp_path / "base", tiny_tokenizer)
    model = adapted(base, modules_to_save=modules_to_save)
    model.save_pretrained(tmp_path / "adapter")
    found = load_adapted_classifier(str(tmp_path / "adapter"))
    assert is_adapter(tmp_path / "adapter") and not is_adapter(base)
    with torch.no_grad():
        assert torch.equal(found(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_other_models_are_refused_in_one_line(tmp_path, tiny_tokenizer):
    saved_llama(tmp_path / "decoder", tiny_tokenizer)
    saved_classifier(tmp_path / "two", tiny_tokenizer, num_labels=2)
    saved_classifier(tmp_path / "headless", tiny_tokenizer)
    weights = load_file(tmp_path / "headless" / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "headless" / "model.safetensors", {"format": "pt"})
    words = {
        "decoder": "is LlamaForCausalLM, which has no score head; give a sequence-classification model",
        "two": "its head has 2 logits, and one is needed",
        "headless": "1 of its weights are not there, such as score.weight",
        "nowhere/at/all": "no such folder",
    }
    for folder, what in words.items():
        with pytest.raises(ModelError, match=what) as refused:
            load_classifier(ModelSource(str(tmp_path / folder)))
        assert "\n" not in str(refused.value)
    with pytest.raises(ModelError, match="GGUF"):
        (tmp_path / "decoder" / "x.gguf").touch()
        load_classifier(ModelSource(str(tmp_path / "decoder"), gguf_file="x.gguf"))


def test_a_base_that_lacks_more_than_its_head_is_refused(tmp_path, tiny_tokenizer):
    saved_llama(tmp_path, tiny_tokenizer)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="1 of its weights are not there, such as model.norm.weight"):
        fresh_classifier(ModelSource(str(tmp_path)), seed=0)


def test_adapters_without_a_head_or_a_base_are_refused(tmp_path, tiny_tokenizer):
    base = saved_llama(tmp_path / "base", tiny_tokenizer)
    saved_lora(tmp_path / "policy", tiny_tokenizer, seed=0)
    adapted(base).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="this adapter brings no score head"):
        load_adapted_classifier(str(tmp_path / "policy"))
    with pytest.raises(ModelError, match="no adapter_config.json there"):
        load_adapted_classifier(str(base))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ModelError, match="gone: no such folder"):
        load_adapted_classifier(str(tmp_path / "adapter"))


def test_an_adapter_without_the_pooler_that_its_base_lacks_is_refused(tmp_path):
    config = BertConfig(vocab_size=260, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    adapted(tmp_path / "base", target_modules=["query"]).save_pretrained(tmp_path / "adapter")
    words = "2 weights are neither in it nor in its base, such as bert.pooler.dense.bias, and would be random; train it again"
    with pytest.raises(ModelError, match=words) as refused:
        load_adapted_classifier(str(tmp_path / "adapter"))
    assert "\n" not in str(refused.value)


def test_a_gguf_file_gives_its_base_and_the_head_that_the_seed_draws(tmp_path):
    tokenizer = byte_tokenizer([("e", "s")])
    base = tiny_llama(tokenizer)
    file = saved_gguf(tmp_path / "tiny.gguf", tokenizer, base)
    first, again, other = (fresh_classifier(ModelSource(str(tmp_path), file.name), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.score.weight, again.score.weight) and not torch.equal(first.score.weight, other.score.weight)
    for name, weight in base.model.state_dict().items():
        torch.testing.assert_close(first.model.state_dict()[name], weight)
    first.save_pretrained(tmp_path / "whole")
    whole = load_classifier(ModelSource(str(tmp_path / "whole")))
    assert all(torch.equal(weight, whole.state_dict()[name]) for name, weight in first.state_dict().items())
