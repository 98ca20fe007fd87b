"""A reward model gives what its own forward pass gives, however its rows are batched; what is no reward model is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForSequenceClassification,
    Gemma3TextConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fakes import byte_tokenizer, counted_calls, saved_llama
from polyref.data.collate import collate
from polyref.errors import ConfigError, DataError, InputError, ModelError
from polyref.rewards.cached import cached
from polyref.rewards.classifier import fresh_classifier
from polyref.rewards.reward_model import RewardModel
from polyref.scoring.models import ModelSource
from polyref.scoring.score_head import completion_rewards, last_tokens, probe_rewards

PROMPTS = ["a question:", "another one?", "a question:", "short", "a question:", "a question:", "a question:"]
COMPLETIONS = [" yes", " no, never", " perhaps", " a much longer answer", " yes and no", "", " no"]
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 1}
SMALL |= {"max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": 0}


def llama(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **changes: Any) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), **SMALL | changes)
    return LlamaForSequenceClassification(config).eval()


def others(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    size, gpt2 = len(tokenizer), {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
    torch.manual_seed(0)
    windowed = {"num_key_value_heads": 2, "sliding_window": 8, "vocab_size": size}
    gemma = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
    return {
        "gpt2": GPT2ForSequenceClassification(GPT2Config(vocab_size=size, num_labels=1, initializer_range=0.3, **gpt2)),
        "mistral": MistralForSequenceClassification(MistralConfig(**SMALL | windowed)),
        "gemma": Gemma3ForSequenceClassification(Gemma3TextConfig(**SMALL | windowed | gemma)),
        "bert": BertForSequenceClassification(BertConfig(vocab_size=size, **SMALL)),
        "roberta": RobertaForSequenceClassification(RobertaConfig(vocab_size=size, **SMALL)),
    }


def one_by_one(model: Any, tokenizer: PreTrainedTokenizerFast, prompts: Any, completions: Any) -> torch.Tensor:
    """The model's own logits for each text alone, in its own forward pass."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = tokenizer(f"{prompt}{completion}")["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            found.append(model.eval()(input_ids=torch.tensor([text])).logits[0, 0])
    return torch.stack(found).double()


def test_rewards_are_the_models_own_in_any_batch(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = llama(tiny_tokenizer)
    expected = one_by_one(model, tiny_tokenizer, PROMPTS, COMPLETIONS)
    assert expected.std() > 0.1
    for batch_size in (1, 2, 8):
        reward = RewardModel(model, tiny_tokenizer, batch_size=batch_size, device="cpu")
        found = reward(PROMPTS, COMPLETIONS)
        assert found.dtype == torch.float64 and not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(reward(PROMPTS[::-1], COMPLETIONS[::-1]), expected.flip(0), rtol=1e-5, atol=1e-5)
    assert reward([], []).shape == (0,)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("kind", "layout"),
    [("gpt2", "shared"), ("mistral", "shared"), ("gemma", "shared"), ("bert", "separate"), ("roberta", "separate")],
)
def test_every_architecture_gives_its_own_numbers(kind: str, layout: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = others(tiny_tokenizer)[kind]
    reward = RewardModel(model, tiny_tokenizer, batch_size=4, device="cpu")
    assert reward.plan.layout == layout
    torch.testing.assert_close(
        reward(PROMPTS, COMPLETIONS), one_by_one(model, tiny_tokenizer, PROMPTS, COMPLETIONS), rtol=1e-4, atol=1e-5
    )
    assert reward.features(PROMPTS, COMPLETIONS).shape == (len(PROMPTS), 16)


def test_a_tokenizer_that_pads_with_its_end_is_read_before_it_as_the_model_does() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = llama(tokenizer, pad_token_id=tokenizer.eos_token_id)
    reward = RewardModel(model, tokenizer, device="cpu")
    torch.testing.assert_close(
        reward(PROMPTS, COMPLETIONS), one_by_one(model, tokenizer, PROMPTS, COMPLETIONS), rtol=1e-5, atol=1e-5
    )


def test_the_place_of_a_reward_is_the_last_token_that_is_no_padding() -> None:
    items = [([5, 6], [[7, 0], [0, 0, 0]]), ([5], [[0, 9], [8]])]
    assert last_tokens(collate(items), 0).tolist() == [[2, 1], [2, 3]]
    assert last_tokens(collate(items, layout="separate"), 0).tolist() == [[2], [1], [2], [1]]


def test_a_prompt_is_passed_once_for_its_completions(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    reward = RewardModel(llama(tiny_tokenizer), tiny_tokenizer, device="cpu")
    with counted_calls(LlamaForSequenceClassification) as calls:
        reward(["a question:"] * 4, [" yes", " no", " perhaps", " never"])
    assert [rows for rows, _ in calls] == [1]


def test_features_are_what_the_head_reads(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = llama(tiny_tokenizer)
    reward = RewardModel(model, tiny_tokenizer, device="cpu")
    features = reward.features(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(features @ model.score.weight[0].double(), reward(PROMPTS, COMPLETIONS), rtol=1e-5, atol=1e-5)


def test_shared_and_separate_rows_have_equal_gradients(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, items = llama(tiny_tokenizer), [([5, 6, 7], [[8, 9], [10, 11, 12]]), ([5, 9], [[8], [12, 4]])]
    plan, found = probe_rewards(model), []
    for layout in ("shared", "separate"):
        model.zero_grad()
        chosen = type(plan)(layout=layout, mask=plan.mask, window=plan.window)
        rewards = completion_rewards(model, collate(items, layout=layout), chosen).view(-1, 2)
        (rewards[:, 0] - rewards[:, 1]).sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_half_precision_agrees_with_itself(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = llama(tiny_tokenizer).to(torch.bfloat16)
    reward = RewardModel(model, tiny_tokenizer, device="cpu")
    assert reward.plan.layout == "shared"
    torch.testing.assert_close(
        reward(PROMPTS, COMPLETIONS), one_by_one(model, tiny_tokenizer, PROMPTS, COMPLETIONS), rtol=0.1, atol=0.1
    )


def test_messages_go_through_the_template_and_texts_are_cut_as_asked(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = llama(tiny_tokenizer)
    reward = RewardModel(model, tiny_tokenizer, device="cpu")
    prompt, answer = ({"role": "user", "content": "hi"},), ({"role": "assistant", "content": "yes"},)
    text = tiny_tokenizer.apply_chat_template([*prompt, *answer], tokenize=False).rstrip("\n")
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = model(input_ids=torch.tensor([ids])).logits[0].detach().double()
    torch.testing.assert_close(reward([prompt], [answer]), expected, rtol=1e-5, atol=1e-5)
    cut = RewardModel(model, tiny_tokenizer, max_length=6, device="cpu")
    expected = model(input_ids=torch.tensor([[1, *tiny_tokenizer("ab: a", add_special_tokens=False)["input_ids"]]])).logits
    torch.testing.assert_close(cut(["ab:"], [" abcd"]), expected[0].detach().double(), rtol=1e-5, atol=1e-5)


# Saved and loaded


def test_a_saved_reward_model_loads_to_the_last_bit(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = llama(tiny_tokenizer)
    for part in (model, tiny_tokenizer):
        part.save_pretrained(tmp_path / "whole")
    loaded = RewardModel.load(tmp_path / "whole", device="cpu")
    assert loaded.name == "whole"
    first = RewardModel(model, tiny_tokenizer, device="cpu")
    assert torch.equal(loaded(PROMPTS, COMPLETIONS), first(PROMPTS, COMPLETIONS))
    assert loaded.fingerprint == first.fingerprint
    assert RewardModel(llama(tiny_tokenizer, 1), tiny_tokenizer, device="cpu").fingerprint != first.fingerprint
    assert RewardModel(model, tiny_tokenizer, max_length=64, device="cpu").fingerprint != first.fingerprint


def test_another_padding_token_is_another_reward_model(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    found = []
    for padding in (tiny_tokenizer.eos_token_id, tiny_tokenizer.pad_token_id):
        model = llama(tiny_tokenizer)
        model.config.pad_token_id = padding
        reward = RewardModel(model, tiny_tokenizer, device="cpu")
        assert torch.equal(cached(reward, tmp_path)(PROMPTS, COMPLETIONS), reward(PROMPTS, COMPLETIONS))
        found.append(reward)
    assert found[0].fingerprint != found[1].fingerprint
    assert not torch.equal(*(reward(PROMPTS, COMPLETIONS) for reward in found))


def saved_adapter(folder: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> tuple[Path, Any]:
    """An adapter with a head on a causal language model, both far from their start, and the model it was saved from."""
    base = saved_llama(folder / "base", tokenizer)
    settings = {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["q_proj"], "modules_to_save": ["score"]} | changes
    model = get_peft_model(fresh_classifier(ModelSource(str(base)), seed=3), LoraConfig(**settings))
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "adapter")
    return folder / "adapter", model.eval()


def test_an_adapter_comes_back_with_its_head(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    adapter, model = saved_adapter(tmp_path, tiny_tokenizer)
    expected = RewardModel(model, tiny_tokenizer, device="cpu")(PROMPTS, COMPLETIONS)
    assert torch.equal(RewardModel.load(adapter, device="cpu")(PROMPTS, COMPLETIONS), expected)
    (tmp_path / "base").rename(tmp_path / "moved")
    moved = RewardModel.load(tmp_path / "moved", adapter=adapter, device="cpu")
    assert torch.equal(moved(PROMPTS, COMPLETIONS), expected)
    with pytest.raises(ModelError, match="base"):
        RewardModel.load(adapter, device="cpu")


# Refused


def one_line(error: pytest.ExceptionInfo[Exception]) -> bool:
    return "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("language model", "LlamaForCausalLM, which has no score head"),
        ("three", "3 logits"),
        ("headless", "would be random"),
        ("pickle", "pickled"),
        ("absent", "no such folder"),
    ],
)
def test_what_is_no_reward_model_is_refused_in_one_line(
    kind: str, says: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = tmp_path / kind
    if kind == "language model":
        saved_llama(folder, tiny_tokenizer)
    elif kind == "three":
        llama(tiny_tokenizer, num_labels=3).save_pretrained(folder)
    elif kind == "headless":
        saved_llama(folder, tiny_tokenizer)
        config = json.loads((folder / "config.json").read_text())
        config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "r"}, "label2id": {"r": 0}}
        (folder / "config.json").write_text(json.dumps(config))
    elif kind == "pickle":
        llama(tiny_tokenizer).save_pretrained(folder)
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=says) as error:
        RewardModel.load(folder, device="cpu")
    assert one_line(error)


def test_a_model_in_memory_without_a_head_of_one_number_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError, match="no score head of one number") as error:
        RewardModel(llama(tiny_tokenizer, num_labels=2), tiny_tokenizer, device="cpu")
    assert one_line(error)
    endless = byte_tokenizer(eos=False)
    endless.pad_token = None
    with pytest.raises(ModelError, match="padding token"):
        RewardModel(llama(endless, pad_token_id=None), endless, device="cpu")


def test_rows_that_cannot_be_scored_are_named(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = llama(tiny_tokenizer)
    reward = RewardModel(model, tiny_tokenizer, name="judge", device="cpu")
    with pytest.raises(InputError, match="2 completions for 1 prompts"):
        reward(["a"], ["b", "c"])
    with pytest.raises(InputError, match="judge, row 2: .* context of 128"):
        reward(["a", "b" * 200], ["b", "c"])
    with pytest.raises(DataError, match="row 1: no token of the completion is left"):
        RewardModel(model, tiny_tokenizer, max_length=4, device="cpu")(["a long prompt"], ["b"])
    with pytest.raises(ConfigError, match="max_length"):
        RewardModel(model, tiny_tokenizer, max_length=1, device="cpu")
    for size in (0, -1):
        with pytest.raises(ConfigError, match=f"batch_size is {size}"):
            RewardModel(model, tiny_tokenizer, batch_size=size, device="cpu")
    torch.nn.init.constant_(model.score.weight, torch.nan)
    with pytest.raises(ModelError, match="not finite|gave nan"):
        RewardModel(model, tiny_tokenizer, device="cpu")(["a"], ["b"])


def test_a_public_reward_model_keeps_its_own_class(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """What transformers itself loads and runs, and what we load and run, agree."""
    for part in (llama(tiny_tokenizer, tie_word_embeddings=True), tiny_tokenizer):
        part.save_pretrained(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    found = RewardModel.load(tmp_path, device="cpu")(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(found, one_by_one(theirs, tiny_tokenizer, PROMPTS, COMPLETIONS), rtol=1e-5, atol=1e-5)
