"""A model, adapter or reference set that cannot be used ends in one line that names it, before anything is written."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save, save_file

from cli_world import World, assert_refused, table
from fakes import byte_tokenizer, saved_llama

SHORT, SMALL = {"max_position_embeddings": 8}, {"vocab_size": 60}
T5 = transformers.T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8).to_json_string().encode()
ALIEN = save({"a": torch.zeros(1)}, metadata={"format": "pt"})
LLAVA = transformers.LlavaConfig().to_json_string().encode()

FOLDERS: dict[str, tuple[Any, ...]] = {
    "nothing but a pickle": (
        {"model.safetensors": None, "pytorch_model.bin": pickle.dumps({})},
        "its weights are pickled",
        "save",
    ),
    "no weights": ({"model.safetensors": None}, "safetensors", "; "),
    "another model's weights": ({"model.safetensors": ALIEN}, "of its weights are not there, such as ", "the whole model"),
    "torn weights": ({"model.safetensors": b"torn"}, "cannot load the model", "check the folder"),
    "no config.json": ({"config.json": None}, "no config.json there", "save_pretrained"),
    "a torn config.json": ({"config.json": b"{"}, "cannot load the", "check the folder"),
    "a model of an unknown kind": ({"config.json": b'{"model_type": "cat"}'}, "cannot load the", "check the folder"),
    "no tokenizer": ({"tokenizer.json": None, "tokenizer_config.json": None}, "cannot load the tokenizer", "check the folder"),
    "a torn tokenizer": ({"tokenizer.json": b"{"}, "cannot load the tokenizer", "check the folder"),
    "an encoder-decoder model": ({"config.json": T5}, "encoder-decoder models are not supported", "decoder-only"),
    "a vision model": ({"config.json": LLAVA}, "vision-language models are not supported", "text-only"),
}


@table(FOLDERS)
@pytest.mark.parametrize("role", ["policy", "reference"])
def test_a_bad_model_folder(given: dict[str, bytes | None], says: list[str], role: str, world: World) -> None:
    folder = world.path / "copy"
    shutil.copytree(world.model, folder)
    for name, content in given.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
    words = world.train(model=folder) if role == "policy" else world.under({}, {"model": folder})
    assert_refused(world, words, ["copy: ", *says])


def test_names_of_models_that_are_not_there(world: World) -> None:
    for words in (world.train(model=world.path / "absent"), world.under({"model": world.path / "absent"})):
        assert_refused(world, words, ["absent: no such folder", "give a hub id or a folder"])
    assert_refused(
        world, world.train(model="nobody/nothing"), ["nobody/nothing: cannot load the", "check the name and the network"]
    )
    assert_refused(world, world.train(model=""), ["the name of a model is empty", "hub id"])
    assert_refused(world, world.train(gguf_file="q8.gguf"), ["tiny: no file q8.gguf there", "name a GGUF file"])
    assert_refused(world, world.under({"gguf_file": "q8.gguf"}), ["tiny: no file q8.gguf there", "name a GGUF file"])
    assert_refused(world, world.under({"tokenizer": str(world.path)}), ["work: no config.json there", "save_pretrained"])


def test_a_gguf_file_that_is_none(world: World) -> None:
    shutil.copytree(world.model, world.path / "copy")
    world.file("copy/q8.gguf", "torn")
    assert_refused(
        world, world.train(model=world.path / "copy", gguf_file="q8.gguf"), ["copy: cannot load the", "check the folder"]
    )


LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 1}
VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 1, "token_dim": 16, "num_transformer_submodules": 1, "num_layers": 2}
ADAPTERS: dict[str, tuple[Any, ...]] = {
    "nothing": ({}, "no adapter_config.json there", "saved PEFT adapter"),
    "nothing but a pickle": (
        {"adapter_config.json": LORA, "adapter_model.bin": 0},
        "its weights are pickled",
        "save_pretrained",
    ),
    "no weights": ({"adapter_config.json": LORA}, "no safetensors weights there", "save"),
    "a torn adapter_config.json": (
        {"adapter_config.json": "{", "adapter_model.safetensors": 0},
        "cannot load the adapter",
        "check",
    ),
    "another model's layers": (
        {"adapter_config.json": LORA | {"target_modules": ["no_such"]}, "adapter_model.safetensors": 0},
        "cannot load the adapter",
        "no_such",
        "check the folder",
    ),
    "another model's weights": (
        {"adapter_config.json": LORA, "adapter_model.safetensors": 0},
        "its weights are not those of an adapter of this model",
        "trained on this model",
    ),
    "virtual tokens": (
        {"adapter_config.json": {"peft_type": "PROMPT_TUNING"} | VIRTUAL, "adapter_model.safetensors": 0},
        "prompt-learning adapters are not supported",
        "LoRA",
    ),
}


@table(ADAPTERS)
def test_a_bad_adapter(given: dict[str, Any], says: list[str], world: World) -> None:
    folder = world.path / "adapter"
    folder.mkdir()
    for name, content in given.items():
        if name.endswith(".json"):
            world.file(f"adapter/{name}", content if isinstance(content, str) else json.dumps(content))
        elif name.endswith(".bin"):
            world.file(f"adapter/{name}", pickle.dumps({}))
        else:
            save_file({"prompt_embeddings": torch.zeros(1, 16)}, folder / name)
    assert_refused(world, world.under({"adapter": folder}), [f"{folder}: ", *says])


def test_an_adapter_that_is_not_there(world: World) -> None:
    assert_refused(world, world.under({"adapter": world.path / "absent"}), ["absent: no adapter_config.json there", "PEFT"])


def model(world: World, name: str, **config: Any) -> Path:
    return saved_llama(world.path / name, byte_tokenizer(), **config)


def test_models_that_the_data_does_not_fit(world: World) -> None:
    small, short = model(world, "small", **SMALL), model(world, "short", **SHORT)
    vocabulary = ["pairs.jsonl, row 1: token id ", "outside the vocabulary (60) of "]
    assert_refused(world, world.under({"model": small}), [*vocabulary, "reference small", "tokenizer"])
    assert_refused(
        world, world.train(model=small, references={"members": [{"model": str(world.model)}]}), [*vocabulary, "policy"]
    )
    context = ["pairs.jsonl, row 1: ", "tokens do not fit the context of 8 of ", "lower max_length"]
    assert_refused(world, world.under({"model": short}), [*context, "reference short"])
    assert_refused(world, world.train(model=short, references={"members": [{"model": str(world.model)}]}), [*context, "policy"])


def test_templates_that_the_data_does_not_fit(world: World) -> None:
    plain = saved_llama(world.path / "plain", byte_tokenizer(chat_template=None))
    torn = saved_llama(world.path / "torn", byte_tokenizer(chat_template="{% for %}"))
    deaf = saved_llama(world.path / "deaf", byte_tokenizer(chat_template="{{ messages[-1]['content'] }}"))
    assert_refused(world, world.train(model=plain, prompt_format="chat"), ["there is no chat template", "plain text"])
    assert_refused(
        world, world.train(model=torn, prompt_format="chat"), ["row 1: the chat template refuses the messages", "another"]
    )
    assert_refused(world, world.under({"model": plain}) + ["--prompt_format", "chat"], ["plain: there is no chat template"])
    deafened = world.under({"model": deaf, "system_prompt": "Be brief."}) + ["--prompt_format", "chat"]
    assert_refused(world, deafened, ["the chat template leaves the system prompt out", "none"])


def test_a_system_prompt_for_data_that_has_one(world: World) -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]
    replies = {key: [{"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    world.pairs({"prompt": turns} | replies)
    says = ["pairs.jsonl, row 1: a system prompt is set, but the record has a system message", "drop the system message"]
    assert_refused(world, world.under({"system_prompt": "Be brief."}), says)


TWO = [{}, {"system_prompt": "Be brief."}]
SETS: dict[str, tuple[Any, ...]] = {
    "weights negative": ((TWO, {"weights": [1.5, -0.5]}), "[1.5, -0.5] is not on the simplex", "sum to 1"),
    "weights of sum 0.9": ((TWO, {"weights": [0.5, 0.4]}), "[0.5, 0.4] is not on the simplex", "sum to 1"),
    "weights too many": ((TWO, {"weights": [0.5, 0.25, 0.25]}), "3 weights for 2 references", "one weight a reference"),
    "weights NaN": ((TWO, {"weights": [float("nan"), 0.5]}), "references.weights: expected float, got NaN", "--help"),
    "no weights": ((TWO, {"weights": []}), "no reference weights", "at least one"),
    "weights as text": ((TWO, {"weights": ["half", 0.5]}), "references.weights: expected float, got half", "--help"),
    "a composition": ((TWO, {"composition": "harmonic"}), "references.composition: expected one of ", "got harmonic", "--help"),
    "no members": (([], {}), "a reference set has no member", "at least one"),
    "a reference without a name": (([{"model": ""}], {}), "a reference has an empty model name", "give a hub id"),
    "a reference's dtype": (([{"dtype": "int7"}], {}), "unknown dtype 'int7' of a reference", "float32"),
    "a reference's setting": (([{"sytem_prompt": "x"}], {}), "sytem_prompt", "--references.members.help"),
}


@table(SETS)
def test_a_bad_reference_set(given: tuple[list[Any], dict[str, Any]], says: list[str], world: World) -> None:
    assert_refused(world, world.under(*given[0], **given[1]), says)


def test_references_that_are_no_mapping(world: World) -> None:
    assert_refused(world, world.score(references="tiny"), ["references", "--help"])
    assert_refused(world, world.score(references=None), ["references", "--help"])


def test_a_composition_that_forward_kl_does_not_have(world: World) -> None:
    one = {"members": [{"model": str(world.model)}]}
    says = ["forward KL to every reference composes them arithmetically", "composition='arithmetic'"]
    assert_refused(world, world.train(references=one, divergence="forward"), says)
    assert_refused(world, world.train(divergence="forward"), says)
