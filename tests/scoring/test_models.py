"""Fingerprints that follow the weights and nothing else, and loading that never opens a pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from polyref.errors import ModelError
from polyref.scoring.models import (
    ModelSource,
    adapted,
    adapter_fingerprint,
    load_causal_lm,
    load_config,
    load_tokenizer,
    looks_like_path,
    module_fingerprint,
    weights_fingerprint,
)

IDS = torch.tensor([[1, 5, 7, 2]])


def tiny(seed: int = 0, *, bias: bool = False) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, attention_bias=bias, bos_token_id=1, eos_token_id=2, initializer_range=0.5)  # type: ignore[arg-type]
    return AutoModelForCausalLM.from_config(config).eval()


def test_the_same_weights_have_one_fingerprint_wherever_they_lie(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b/c", 0), ("other", 1)):
        tiny(seed).save_pretrained(tmp_path / folder)
    a, moved, other = (weights_fingerprint(ModelSource(str(tmp_path / f))) for f in ("a", "b/c", "other"))
    assert a == moved != other


def test_a_file_that_changed_in_place_changes_the_fingerprint(tmp_path: Path) -> None:
    tiny(0).save_pretrained(tmp_path)
    before = weights_fingerprint(ModelSource(str(tmp_path)))
    tiny(1).save_pretrained(tmp_path)
    assert weights_fingerprint(ModelSource(str(tmp_path))) != before


def test_a_file_of_the_hub_cache_is_known_by_its_name_and_not_read(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"not read")
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    LlamaConfig().save_pretrained(snapshot)
    (snapshot / "model.safetensors").symlink_to(blob)
    first = weights_fingerprint(ModelSource(str(snapshot)))
    blob.write_bytes(b"other bytes, same name")
    assert weights_fingerprint(ModelSource(str(snapshot))) == first


def test_a_model_in_memory_is_known_by_its_weights_and_by_adapters_only_while_they_are_on() -> None:
    plain, lora = module_fingerprint(tiny()), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)
    adapted = get_peft_model(tiny(), lora)
    assert module_fingerprint(adapted) != plain
    with adapted.disable_adapter():
        assert module_fingerprint(adapted) == plain
    assert module_fingerprint(tiny(1)) != plain
    changed = tiny()
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1e-3
    assert module_fingerprint(changed) != plain


def test_a_setting_that_changes_what_is_computed_changes_the_fingerprint(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    source, config = ModelSource(str(tmp_path)), tmp_path / "config.json"
    settings, before = json.loads(config.read_text()), weights_fingerprint(source)
    for change in ({"rms_norm_eps": 1e-2}, {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}):
        config.write_text(json.dumps(settings | change))
        assert weights_fingerprint(source) != before
    config.write_text(json.dumps(settings | {"dtype": "bfloat16", "pad_token_id": 3, "transformers_version": "4.0"}))
    assert weights_fingerprint(source) == before
    model, changed = tiny(), tiny()
    changed.config.rms_norm_eps = 1e-2
    assert module_fingerprint(model) != module_fingerprint(changed)


def test_code_that_is_trusted_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    trusted, plain = (ModelSource(str(tmp_path), trust_remote_code=trust) for trust in (True, False))
    before = weights_fingerprint(trusted), weights_fingerprint(plain)
    (tmp_path / "modeling.py").write_text("SCALE = 2")
    assert weights_fingerprint(trusted) != before[0]
    assert weights_fingerprint(plain) == before[1]


LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "norms": {"modules_to_save": ["input_layernorm", "norm"]},
    "bias": {"bias": "all"},
}


@pytest.mark.parametrize("changes", LORAS.values(), ids=LORAS)
def test_an_adapter_is_attached_and_taken_off_without_a_trace(tmp_path: Path, changes: dict[str, Any]) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, init_lora_weights=False, **changes)
    trained = get_peft_model(tiny(bias=True), lora)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    trained.save_pretrained(str(tmp_path))
    model = tiny(bias=True)
    model.model.embed_tokens.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    names, fingerprint = [name for name, _ in model.named_modules()], module_fingerprint(model)
    with torch.no_grad():
        plain = model(IDS).logits
        with adapted(model, str(tmp_path)) as wrapped:
            torch.testing.assert_close(wrapped(IDS).logits, trained.eval()(IDS).logits)
            assert not torch.allclose(wrapped(IDS).logits, plain)
        assert torch.equal(model(IDS).logits, plain)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [name for name, _ in model.named_modules()] == names and module_fingerprint(model) == fingerprint
    assert adapter_fingerprint(None) == ""
    assert len(adapter_fingerprint(str(tmp_path))) == 64


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "no config.json there"),
        ({"config.json": "{}", "adapter_config.json": "{}"}, "an adapter, not a model; merge it into its base.*adapter:"),
        ({"config.json": "{}", "pytorch_model.bin": "x"}, "its weights are pickled"),
        ({"config.json": '{"model_type": "t5", "is_encoder_decoder": true}'}, "encoder-decoder"),
        ({"config.json": "not json"}, "cannot load the model"),
        ({"config.json": '{"model_type": "nobody-knows"}'}, "cannot load the model"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, files: dict[str, str], said: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=said) as caught:
        load_causal_lm(ModelSource(str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_hub_repository_that_holds_an_adapter_is_refused(
    revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--owner--name", "0" * 40
    snapshot = repository / "snapshots" / commit
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / (revision or "main")).write_text(commit)
    tiny().save_pretrained(snapshot)
    source = ModelSource("owner/name", revision=revision)
    assert module_fingerprint(load_causal_lm(source)) == module_fingerprint(tiny())
    (snapshot / "adapter_config.json").write_text("{}")
    for refused in (load_causal_lm, load_config, load_tokenizer, weights_fingerprint):
        with pytest.raises(ModelError, match="owner/name: this is an adapter, not a model; .* this hub id as `adapter:`"):
            refused(source)


def test_what_can_only_be_a_path_is_told_from_a_hub_id(tmp_path: Path) -> None:
    assert not looks_like_path("owner/name")
    assert not looks_like_path("gpt2")
    assert all(map(looks_like_path, (str(tmp_path), "./model", "~/model", "/no/such", "a/b/c")))
    with pytest.raises(ModelError, match="no such folder"):
        load_causal_lm(ModelSource(str(tmp_path / "absent")))
