"""Shared-prompt scoring against one-by-one scoring through the model's own logits, on every architecture promised."""

from __future__ import annotations

import copy
import logging
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
)

from polyref.data.collate import collate
from polyref.scoring import logprobs
from polyref.scoring.logprobs import ScoringPlan, completion_logps, probe

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 11
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-sliding": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma2": Gemma2Config(**SIZES, sliding_window=WINDOW),
    "gemma3": Gemma3TextConfig(
        **SIZES, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


def make(name: str, attention: str = "eager") -> Any:
    """A random model whose attention matters: weights far from zero."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention).eval()


def draw_items(completions: int, seed: int = 0) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts and completions of mixed lengths, some rows longer than the sliding window."""
    rng = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(n)]

    return [(ids(p), [ids(rng.randint(1, 14)) for _ in range(completions)]) for p in (1, 7, 30, 3, 18)]


def one_by_one(model: Any, items: list[tuple[list[int], list[list[int]]]]) -> torch.Tensor:
    """(B, C) by the plainest route: full logits of each sequence alone."""
    rows = []
    for prompt, completions in items:
        for completion in completions:
            logits = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
            steps = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
            rows.append(torch.stack([logits[t, token] for t, token in zip(steps, completion, strict=True)]).sum())
    return torch.stack(rows).view(len(items), -1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("completions", [2, 4])
def test_shared_prompt_scores_equal_one_by_one_scores(name: str, attention: str, completions: int) -> None:
    if name == "gemma2" and attention == "sdpa":
        attention = "eager"
    model, items = make(name, attention), draw_items(completions)
    plan = probe(model)
    assert plan.layout == "shared" and plan.fused
    expected = one_by_one(model, items)
    with torch.no_grad():
        scored = completion_logps(model, collate(items), plan)
    torch.testing.assert_close(scored.total.double(), expected, rtol=1e-4, atol=1e-4)
    assert scored.tokens.tolist() == [[len(c) for c in cs] for _, cs in items]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_order_padding_and_layout_change_nothing(name: str) -> None:
    model, items = make(name), draw_items(2)
    plan = probe(model)
    padded = collate(items[::-1], multiple=64)
    other_ids = replace(padded, input_ids=torch.where(padded.segment_ids < 0, 5, padded.input_ids))
    assert not torch.equal(other_ids.input_ids, padded.input_ids)
    with torch.no_grad():
        straight = completion_logps(model, collate(items), plan).total
        reversed_rows = completion_logps(model, padded, plan).total.flip(0)
        assert torch.equal(completion_logps(model, other_ids, plan).total.flip(0), reversed_rows)
        swapped = completion_logps(model, collate([(p, cs[::-1]) for p, cs in items]), plan).total.flip(1)
        alone = torch.cat([completion_logps(model, collate([item]), plan).total for item in items])
        separate = ScoringPlan(layout="separate", transform=plan.transform)
        rows = completion_logps(model, collate(items, layout="separate"), separate).total.view(-1, 2)
    for other in (reversed_rows, swapped, alone, rows):
        torch.testing.assert_close(other, straight, rtol=1e-4, atol=1e-4)


def test_gradients_equal_those_of_one_by_one_scoring() -> None:
    model, items = make("llama"), draw_items(2)
    weights = torch.randn(len(items), 2, generator=torch.Generator().manual_seed(1))
    (one_by_one(model, items) * weights).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (completion_logps(model, collate(items), probe(model)).total * weights).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=2e-3, atol=2e-4)


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    model, items = make("qwen2"), draw_items(2)
    plan = probe(model)
    other = [items[0], *draw_items(2, seed=9)[1:]]
    with torch.no_grad():
        first = completion_logps(model, collate(items), plan).total[0]
        again = completion_logps(model, collate(other), plan).total[0]
    torch.testing.assert_close(first, again, rtol=1e-5, atol=1e-5)


def test_a_model_without_attention_masks_falls_back_to_one_row_a_completion(caplog: pytest.LogCaptureFixture) -> None:
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, initializer_range=0.4)
    model, items = AutoModelForCausalLM.from_config(config).eval(), draw_items(2)
    with caplog.at_level(logging.WARNING, logger="polyref"):
        plan = probe(model)
    assert plan.layout == "separate"
    assert "one row a completion" in caplog.text
    with torch.no_grad():
        scored = completion_logps(model, collate(items, layout="separate"), plan).total.view(-1, 2)
        torch.testing.assert_close(scored.double(), one_by_one(model, items), rtol=1e-4, atol=1e-4)


def test_the_probe_refuses_a_mask_that_is_silently_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boolean masks under eager attention are added as 0 and 1: every plan that shares a prompt must then be turned down."""

    def boolean(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return allowed[:, None]

    monkeypatch.setattr("polyref.scoring.masks.additive", boolean)
    assert probe(make("llama", "eager")).layout == "separate"


def test_a_full_mask_on_a_sliding_window_model_is_refused() -> None:
    model = make("mistral")
    assert probe(model).mask == "sliding"
    assert probe(make("gemma3")).mask == "by_layer_type"
    rows = logprobs._probe_items(model.config, None)
    assert max(len(prompt) for prompt, _ in rows) > WINDOW


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_in_half_precision_the_right_mask_is_kept_and_a_full_one_refused(name: str, attention: str) -> None:
    """Attention that matters little changes a token by less than the worst rounding error, all tokens by more than usual."""
    for seed in range(4):
        torch.manual_seed(seed)
        config = copy.deepcopy(CONFIGS[name])
        config.initializer_range = 0.2
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().to(torch.bfloat16)
        assert probe(model).mask == ("sliding" if name == "mistral" else "by_layer_type")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logprobs, "_candidates", lambda config: [ScoringPlan(), ScoringPlan(layout="separate")])
            assert probe(model).layout == "separate"


def test_under_autocast_rounding_is_that_of_its_dtype() -> None:
    """Weights stay in float32 there, but products are rounded: to the resolution of float32 hardly a plan agrees."""
    sizes = SIZES | {"num_hidden_layers": 2, "num_key_value_heads": 4, "intermediate_size": 64, "initializer_range": 0.2}
    for seed in range(4):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert probe(model) == ScoringPlan(), seed


@pytest.mark.parametrize("name", ["sliding_window", "window_size", "attention_chunk_size", "local_attention", "index_topk"])
def test_the_probe_is_longer_than_what_attention_reaches(name: str) -> None:
    config = LlamaConfig(**SIZES)
    setattr(config, name, 40)
    config.max_window_layers = 90
    assert max(len(prompt) for prompt, _ in logprobs._probe_items(config, 100)) == 48
    assert max(len(prompt) for prompt, _ in logprobs._probe_items(config, 30)) == 16


def test_a_model_that_keeps_a_window_to_itself_is_found_out() -> None:
    """GPT-Neo counts its window along the row, whatever mask it is given, and calls it by another name."""
    local = {"attention_types": [[["global", "local"], 1]], "window_size": 40}
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.4}
    config = GPTNeoConfig(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **sizes, **local)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    items, plan = [(prompt * 2, completions) for prompt, completions in draw_items(2)], probe(model)
    assert plan.layout == "separate"
    with torch.no_grad():
        scored = completion_logps(model, collate(items, layout=plan.layout), plan).total.view(-1, 2)
        torch.testing.assert_close(scored.double(), one_by_one(model, items), rtol=1e-4, atol=1e-4)
        wrong = completion_logps(model, collate(items), replace(plan, layout="shared")).total
    assert (wrong - scored).abs().max() > 0.01


def test_logits_are_never_held_for_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a budget of 3 positions, no tensor with a vocabulary axis has more than 3 rows, forward or backward."""
    monkeypatch.setattr("polyref.scoring.head.LOGIT_BUDGET", 3 * VOCABULARY)
    model, items = make("llama"), draw_items(2)
    plan = probe(model)
    batch = collate(items)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor) and t.dim() >= 2 and t.shape[-1] == VOCABULARY:
                    largest = max(largest, t.numel() // VOCABULARY)
            return out

    with Watch():
        completion_logps(model, batch, plan).total.sum().backward()
    rows, hidden = batch.input_ids.shape[0], SIZES["hidden_size"]
    assert len(batch.target_ids) > 3
    assert largest <= max(
        3, rows, hidden
    )  # one last position a row passes the model's own head; W itself is hidden x vocabulary


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, items = make("llama"), draw_items(2)
    plan, batch = probe(model), collate(items)
    completion_logps(model, batch, plan).total.sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    completion_logps(model, batch, plan).total.sum().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-4)
