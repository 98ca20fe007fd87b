"""Rows that are read on, dropped, picked and joined in any order, against the model reading each from its beginning."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from fakes import byte_tokenizer, tiny_llama
from polyref.samplers.rows import Rows


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def windowed(tokenizer: PreTrainedTokenizerFast) -> Any:
    """A model whose layers see 7 tokens: its rows cannot be changed in place."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=len(tokenizer), sliding_window=7, num_key_value_heads=2, initializer_range=0.2, **sizes)
    torch.manual_seed(0)
    return MistralForCausalLM(config).eval()


def nothing_but(model: Any, texts: list[list[int]]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.stack([model(input_ids=torch.tensor([text])).logits[0, -1] for text in texts])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["full", "windowed"])
def test_any_course_of_rows_ends_where_reading_each_alone_does(
    tokenizer: PreTrainedTokenizerFast, kind: str, seed: int
) -> None:
    model = (tiny_llama(tokenizer, seed=3) if kind == "full" else windowed(tokenizer)).double()
    rng, columns = random.Random(seed), 0
    new = lambda: [[rng.randrange(3, 60) for _ in range(rng.choice((1, 2, 9, 70)))] for _ in range(rng.randint(1, 3))]  # noqa: E731
    with torch.inference_mode():
        texts = new()
        rows, other = Rows.read(model, texts, "model"), Rows.read(model, [[5, 6]], "model")
        for _ in range(90):
            tokens = [rng.randrange(3, 60) for _ in texts]
            rows.step(torch.tensor(tokens))
            texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
            columns = max(columns, rows.mask.shape[1])
            if len(texts) > 1 and rng.random() < 0.2:
                rows, order = rows.drop(sorted(rng.sample(range(len(texts)), rng.randint(1, len(texts) - 1))))
                texts = [texts[i] for i in order]
            if rng.random() < 0.1:
                order = [rng.randrange(len(texts)) for _ in range(rng.randint(1, 6))]
                rows, texts = rows.pick(order), [texts[i] for i in order]
            if len(texts) < 8 and rng.random() < 0.2:
                more = new()
                rows, texts = rows.join(Rows.read(model, more, "model")), [*texts, *more]
            assert rows.mask.sum(1).tolist() == list(map(len, texts))
        rows.step(torch.zeros(len(texts), dtype=torch.long))
        other.step(torch.tensor([7]))
    assert columns > 64, "room was made more than once"
    assert torch.allclose(rows.logits, nothing_but(model, [[*text, 0] for text in texts]), atol=1e-10, rtol=0)
    assert torch.allclose(other.logits, nothing_but(model, [[5, 6, 7]]), atol=1e-10, rtol=0), "nobody wrote into another's room"


def test_rows_that_were_picked_do_not_touch_those_they_came_from(tokenizer: PreTrainedTokenizerFast) -> None:
    model: Any = tiny_llama(tokenizer, seed=3).double()
    with torch.inference_mode():
        rows = Rows.read(model, [[4, 5], [6, 7]], "model")
        picked = rows.pick([0, 1])
        picked.step(torch.tensor([8, 8]))
        rows.step(torch.tensor([9, 9]))
        picked.step(torch.tensor([10, 10]))
    assert torch.allclose(rows.logits, nothing_but(model, [[4, 5, 9], [6, 7, 9]]), atol=1e-12, rtol=0)
    assert torch.allclose(picked.logits, nothing_but(model, [[4, 5, 8, 10], [6, 7, 8, 10]]), atol=1e-12, rtol=0)


def test_rows_leave_in_place_until_many_columns_are_of_no_use(tokenizer: PreTrainedTokenizerFast) -> None:
    model: Any = tiny_llama(tokenizer, seed=3)
    with torch.inference_mode():
        rows = Rows.read(model, [[4] * 10, [5] * 9, [6] * 50], "model")
        kept, order = rows.drop([0])
        assert order == [2, 1] and kept.cache is rows.cache and kept.mask.shape == (2, 50)
        kept, order = kept.drop([0])
        assert order == [1] and kept.cache is not rows.cache and kept.mask.shape == (1, 9)


def test_a_row_that_is_held_lets_go_of_the_room_of_those_it_was_read_with(tokenizer: PreTrainedTokenizerFast) -> None:
    model: Any = tiny_llama(tokenizer, seed=3)
    with torch.inference_mode():
        rows = Rows.read(model, [[4] * 10] * 8, "model")
        rooms = weakref.WeakSet(rows.cache.layers[0]._roomy)
        held = rows.pick([7])
        del rows
        gc.collect()
    assert len(held.mask) == 1 and not rooms
