"""Small stand-ins for tokenizers, models and preference data, built in memory without a download."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertForMaskedLM,
    DebertaV2ForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS, TURN = "<pad>", "<bos>", "<eos>", "<|turn|>"

CHATML = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def byte_tokenizer(
    merges: Sequence[tuple[str, str]] = (), *, bos: bool = True, eos: bool = True, chat_template: str | None = CHATML
) -> PreTrainedTokenizerFast:
    """One token a byte, and one for each of `merges`, which may join any two neighbours, across words too.

    Four special tokens come first: <pad> 0, <bos> 1, <eos> 2, <|turn|> 3; raw text begins with <bos> if there is one.
    """
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    specials = [AddedToken(text, special=True, normalized=False) for text in (PAD, BOS, EOS, TURN)]
    vocabulary = {text: index for index, text in enumerate([*map(str, specials), *tokens])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
        )
    return _wrap(backend, bos=bos, eos=eos, chat_template=chat_template)


def word_tokenizer(words: Sequence[str], *, chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token a word or a run of punctuation, space in front included; other text is <unk>. No BOS."""
    vocabulary = {text: index for index, text in enumerate(dict.fromkeys([PAD, BOS, EOS, TURN, "<unk>", *words]))}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (PAD, BOS, EOS, TURN)])
    return _wrap(backend, bos=False, eos=True, chat_template=chat_template)


def _wrap(backend: Tokenizer, *, bos: bool, eos: bool, chat_template: str | None) -> PreTrainedTokenizerFast:
    names = {"pad_token": PAD} | ({"bos_token": BOS} if bos else {}) | ({"eos_token": EOS} if eos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_llama(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random two-layer Llama of 16 hidden units for `tokenizer`, its weights far enough from zero that attention matters."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    usual = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "initializer_range": 0.2, "num_key_value_heads": 2}
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**sizes | special | usual | changes)).eval()


def saved_llama(folder: Path, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, **changes: Any) -> Path:
    """`tiny_llama` and its tokenizer as save_pretrained writes them."""
    tiny_llama(tokenizer, seed=seed, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


ENCODERS: tuple[type[PreTrainedModel], ...] = (BertForMaskedLM, DebertaV2ForMaskedLM)
"""Encoders that are saved without the pooler that their classifiers have."""


def saved_encoder(folder: Path, tokenizer: PreTrainedTokenizerFast, kind: type[PreTrainedModel]) -> Path:
    """A tiny encoder of one of `ENCODERS` and its tokenizer as save_pretrained writes them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config: Any = kind.config_class
    kind(config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def saved_gguf(file: Path, tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM) -> Path:
    """`model` and a `tokenizer` that has merges as llama.cpp keeps them: one file, its weights in float32."""
    import gguf

    config, vocabulary = model.config, tokenizer.get_vocab()
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbours, transformers the two halves of a head
            heads = tensor.view(config.num_attention_heads, 2, -1, tensor.shape[1])
            tensor = heads.transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    return file


def tiny_lora(**changes: Any) -> LoraConfig:
    """A LoRA of rank 2 on the attention and MLP of `tiny_llama`."""
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes)


def saved_lora(folder: Path, tokenizer: PreTrainedTokenizerFast, *, seed: int, base_seed: int = 0) -> Path:
    """A LoRA for `tiny_llama(seed=base_seed)` that changes its output, as save_pretrained writes it."""
    model = get_peft_model(tiny_llama(tokenizer, seed=base_seed), tiny_lora())
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def pair_rows(count: int, **columns: Any) -> list[dict[str, Any]]:
    """Rows of different lengths; `columns` are added to each, called with the row's number where they are functions."""
    rows = [
        {"prompt": f"question {i}{' please' * (i % 3)}:", "chosen": f" yes {i * i}", "rejected": " no" + " never" * (i % 4)}
        for i in range(count)
    ]
    return [row | {k: v(i) if callable(v) else v for k, v in columns.items()} for i, row in enumerate(rows)]


def auxiliary_columns(pairs: int) -> dict[str, Any]:
    """Columns for `pair_rows`: what an auxiliary model says of each row, and `pairs` auxiliary pairs of different lengths."""
    numbers = range(pairs)
    return {
        "predicted_probability": lambda i: (i * 0.37 + 0.2) % 1,
        "auxiliary_1": lambda i: [f" maybe {i + m}" for m in numbers],
        "auxiliary_2": lambda i: [" no" * (m + 1) + f" {i}" for m in numbers],
        "auxiliary_probability": lambda i: [((i + 3 * m) * 0.23 + 0.1) % 1 for m in numbers],
    }


@contextmanager
def counted_calls(model_class: type = LlamaForCausalLM) -> Iterator[list[tuple[int, ...]]]:
    """Collects the shape of `input_ids` of every call of a model of this class."""
    calls: list[tuple[int, ...]] = []
    original = model_class.forward  # type: ignore[attr-defined]

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(tuple(kwargs["input_ids"].shape))
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_class, "forward", forward)
        yield calls


def same(first: Any, second: Any) -> bool:
    """Equal to the last bit, tensors inside included."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)
