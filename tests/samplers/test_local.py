"""The local engine against enumeration, one-by-one scoring, and other batches."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from fakes import byte_tokenizer, tiny_llama
from polyref.errors import ConfigError, DataError, ModelError
from polyref.samplers.engine import Completion, SamplingParameters
from polyref.samplers.local import LocalEngine
from polyref.samplers.rows import Rows
from polyref.samplers.tokens import INVERSE, RACE, Coupling

ALLOWED = (2, 40, 41)
"""The end token and two bytes: all that the enumerable model ever gives."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Any:
    return tiny_llama(tokenizer, seed=3).double()


class OnlyAllowed(torch.nn.Module):
    """A model whose other tokens have probability 0."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.generation_config = model, model.config, model.generation_config

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        barred = torch.ones(output.logits.shape[-1], dtype=torch.bool)
        barred[list(ALLOWED)] = False
        output.logits = output.logits.masked_fill(barred, -torch.inf)
        return output


def plain_logp(model: Any, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0].double().log_softmax(-1)
    return float(logits[len(prompt) - 1 : -1].gather(-1, torch.tensor(tokens)[:, None]).sum())


def splitmix64(x: int) -> int:
    """The published generator's output for the state x mod 2^64, in Python's own integers."""
    x %= 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def drawn_tokens(drawn: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in row] for row in drawn]


@pytest.mark.parametrize(("temperature", "coupling"), [(1.0, INVERSE), (0.6, INVERSE), (1.0, RACE), (0.6, RACE)])
def test_completions_follow_the_enumerated_law(
    tokenizer: PreTrainedTokenizerFast, model: Any, temperature: float, coupling: Coupling
) -> None:
    enumerable, n = OnlyAllowed(model), 4000
    engine = LocalEngine(enumerable, tokenizer, batch_size=500, coupling=coupling)
    (drawn,) = engine(["ab"], n, SamplingParameters(3, temperature=temperature), seed=1)
    prompt = engine.prompt_ids("ab")
    ended = [(*body, 2) for length in range(3) for body in itertools.product(ALLOWED[1:], repeat=length)]
    support = [*ended, *itertools.product(ALLOWED[1:], repeat=3)]

    def law(tokens: tuple[int, ...]) -> float:
        total = 0.0
        for i in range(len(tokens)):
            with torch.no_grad():
                logits = enumerable(input_ids=torch.tensor([[*prompt, *tokens[:i]]])).logits[0, -1]
            total += float((logits / temperature).log_softmax(-1)[tokens[i]])
        return total

    exact = {tokens: law(tokens) for tokens in support}
    counts = Counter(completion.token_ids for completion in drawn)
    assert counts.keys() <= exact.keys()
    expected = n * np.exp([exact[tokens] for tokens in support])
    observed = np.array([counts[tokens] for tokens in support])
    assert chisquare(observed, expected).pvalue > 0.001
    skewed = Coupling(coupling.stream, lambda law, *rest: coupling.choose((1.5 * law).log_softmax(-1), *rest))
    (wrong,) = LocalEngine(enumerable, tokenizer, batch_size=500, coupling=skewed)(
        ["ab"], n, SamplingParameters(3, temperature=temperature), seed=1
    )
    counts = Counter(completion.token_ids for completion in wrong)
    observed = np.array([counts[tokens] for tokens in support])
    assert chisquare(observed, expected).pvalue < 1e-9, "the test can tell a wrong sampler"
    for completion in drawn[:20]:
        assert completion.drawn_logp == pytest.approx(exact[completion.token_ids], abs=1e-9)
        assert completion.logp == pytest.approx(plain_logp(enumerable, prompt, completion.token_ids), abs=1e-9)
        assert completion.ended == (completion.token_ids[-1] == 2)


@pytest.mark.parametrize("coupling", [INVERSE, RACE])
def test_neither_batch_nor_order_nor_company_changes_a_completion(
    tokenizer: PreTrainedTokenizerFast, model: Any, coupling: Coupling
) -> None:
    prompts = ["a", "what is this", "a", "b" * 30, "cd"]
    parameters = SamplingParameters(8, temperature=0.9, top_p=0.95)

    def draw(some: list[str], n: int, size: int = 32, seed: int = 5) -> list[list[tuple[int, ...]]]:
        return drawn_tokens(LocalEngine(model, tokenizer, batch_size=size, coupling=coupling)(some, n, parameters, seed=seed))

    drawn = draw(prompts, 4, 7)
    for size in (1, 3, 64):
        assert draw(prompts, 4, size) == drawn
    turned = draw(prompts[::-1], 4)[::-1]
    assert turned[1] == drawn[1] and turned[3:] == drawn[3:]
    assert draw(["cd"], 2) == [drawn[4][:2]], "more draws begin with the fewer"
    assert drawn[0] != drawn[2], "equal prompts have draws of their own"
    assert draw(prompts, 4, seed=6) != drawn


def test_a_sequence_is_what_its_seed_has_always_meant(tokenizer: PreTrainedTokenizerFast, model: Any) -> None:
    place, draw = 1, 2
    ids = LocalEngine(model, tokenizer).prompt_ids("ab")
    parts = (np.array([9, place]), np.array(ids), np.int64(draw))
    key = xxhash.xxh3_128_intdigest(b"".join(part.astype(np.int64).tobytes() for part in parts))
    uniforms = np.random.Generator(np.random.Philox(key=key)).random(6)

    def inverse(law: np.ndarray, step: int) -> int:
        return int((law.cumsum() <= uniforms[step]).sum())

    def race(law: np.ndarray, step: int) -> int:
        bits = [splitmix64((key ^ key >> 64) + (step * len(law) + token) * 0x9E3779B97F4A7C15) for token in range(len(law))]
        arrivals = -np.log((np.array([x >> 12 for x in bits]) + 0.5) / 2**52)
        return int((arrivals / law).argmin())

    for options, choose in (({}, race), ({"coupling": RACE}, race), ({"coupling": INVERSE}, inverse)):
        drawn = LocalEngine(model, tokenizer, **options)(["ab", "c", "ab"], 3, SamplingParameters(6), seed=9)[2][draw]
        prompt = list(ids)
        for step, token in enumerate(drawn.token_ids):
            with torch.no_grad():
                law = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1).numpy()
            assert choose(law, step) == token
            prompt.append(token)


def test_top_p_keeps_the_likeliest_mass(tokenizer: PreTrainedTokenizerFast, model: Any) -> None:
    engine = LocalEngine(model, tokenizer, batch_size=200)
    (drawn,) = engine(["ab"], 200, SamplingParameters(1, top_p=0.3), seed=0)
    prompt = engine.prompt_ids("ab")
    with torch.no_grad():
        law = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1).sort(descending=True)
    kept = int((law.values.cumsum(0) < 0.3).sum()) + 1
    assert {completion.token_ids[0] for completion in drawn} == set(law.indices[:kept].tolist())
    mass = float(law.values[:kept].sum())
    assert all(c.drawn_logp == pytest.approx(c.logp - np.log(mass), abs=1e-9) for c in drawn)


def test_a_completion_is_told_apart_from_its_end(tokenizer: PreTrainedTokenizerFast, model: Any) -> None:
    drawn = LocalEngine(OnlyAllowed(model), tokenizer)(
        [({"role": "user", "content": "hi"},)], 30, SamplingParameters(2), seed=0
    )
    seen = {completion.ended for completion in drawn[0]}
    assert seen == {True, False}
    for completion in drawn[0]:
        body = completion.token_ids[:-1] if completion.ended else completion.token_ids
        assert completion.text == tokenizer.decode(list(body)) and (2 in completion.token_ids) == completion.ended


def test_the_model_is_left_as_it_was(tokenizer: PreTrainedTokenizerFast, model: Any) -> None:
    model.train()
    try:
        LocalEngine(model, tokenizer)(["a"], 1, SamplingParameters(2), seed=0)
        assert model.training
    finally:
        model.eval()


def test_progress_counts_completions_and_tokens_a_second(tokenizer: PreTrainedTokenizerFast, model: Any) -> None:
    told: list[tuple[int, int, float]] = []
    engine = LocalEngine(OnlyAllowed(model), tokenizer, batch_size=4, progress=lambda *at: told.append(at))
    engine(["a", "b"], 3, SamplingParameters(2), seed=0)
    done = [at[0] for at in told]
    assert done == sorted(set(done)) and told[-1][:2] == (6, 6) and all(total == 6 and rate > 0 for _, total, rate in told)


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_a_batch_stays_full_and_a_prompt_is_read_once(tokenizer: PreTrainedTokenizerFast, model: Any, size: int) -> None:
    shapes: list[tuple[int, int]] = []
    mixed = OnlyAllowed(model)
    mixed.register_forward_pre_hook(lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True)
    prompts = ["a", "bb" * 20, "c" * 5, "dd"]
    drawn = LocalEngine(mixed, tokenizer, batch_size=size)(prompts, 6, SamplingParameters(12), seed=0)
    reads = [shape for shape in shapes if shape[1] > 1]
    assert sum(rows for rows, _ in reads) == len(prompts)
    steps = [rows for rows, columns in shapes if columns == 1]
    assert sum(steps) == sum(len(completion.token_ids) - 1 for row in drawn for completion in row), "no row is dead"
    assert max(steps) <= size and len(set(drawn_tokens(drawn)[0])) > 1


def test_rows_forget_the_columns_that_none_of_them_needs(tokenizer: PreTrainedTokenizerFast, model: Any) -> None:
    rows = Rows.read(model, [[1] * 30, [1, 5], [1, 5, 6]], "model")
    short = rows.pick([1, 2, 2])
    assert short.mask.shape == (3, 3) and short.cache.get_seq_length() == 3 and rows.cache.get_seq_length() == 30
    joined = short.join(Rows.read(model, [[1] * 9], "model"))
    assert joined.mask.sum(1).tolist() == [2, 3, 3, 9]
    joined.step(torch.tensor([7, 7, 8, 8]))
    alone = [Rows.read(model, [ids], "model").logits for ids in ([1, 5, 7], [1, 5, 6, 7], [1, 5, 6, 8], [1] * 9 + [8])]
    assert torch.allclose(joined.logits, torch.cat(alone), atol=1e-12, rtol=0)


def test_a_sliding_window_sees_the_same_in_any_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=len(tokenizer), sliding_window=5, num_key_value_heads=2, initializer_range=0.2, **sizes)
    torch.manual_seed(0)
    model: Any = MistralForCausalLM(config).double().eval()
    prompts, parameters = ["a", "b" * 9, "cd", "e" * 4], SamplingParameters(10)
    drawn = LocalEngine(model, tokenizer, batch_size=3)(prompts, 3, parameters, seed=0)
    for size in (1, 16):
        assert drawn_tokens(LocalEngine(model, tokenizer, batch_size=size)(prompts, 3, parameters, seed=0)) == drawn_tokens(
            drawn
        )
    prompt, completion = LocalEngine(model, tokenizer).prompt_ids("e" * 4), drawn[3][0]
    assert completion.logp == pytest.approx(plain_logp(model, prompt, completion.token_ids), abs=1e-9)


def test_state_that_cannot_be_joined_is_drawn_batch_by_batch(tokenizer: PreTrainedTokenizerFast, model: Any) -> None:
    prompts, parameters = ["a", "b" * 9, "cd"], SamplingParameters(6)
    expected = LocalEngine(model, tokenizer)(prompts, 3, parameters, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rows, "joinable", False)
        for size in (1, 4, 16):
            engine = LocalEngine(model, tokenizer, batch_size=size)
            assert drawn_tokens(engine(prompts, 3, parameters, seed=0)) == drawn_tokens(expected)


def test_finished_prompts_are_kept_when_the_rest_fails(tokenizer: PreTrainedTokenizerFast, model: Any) -> None:
    prompts, kept, calls = ["a", "b", "c" * 8], dict[int, list[Completion]](), [0]

    def interrupt(*_: Any) -> None:
        calls[0] += 1
        if calls[0] > 8:
            raise KeyboardInterrupt

    whole = LocalEngine(model, tokenizer, batch_size=2)(prompts, 2, SamplingParameters(4), seed=0)
    handle = model.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            LocalEngine(model, tokenizer, batch_size=2, finished=kept.__setitem__)(prompts, 2, SamplingParameters(4), seed=0)
    finally:
        handle.remove()
    assert 0 < len(kept) < 3 and all(whole[i] == completions for i, completions in kept.items())


def test_rounding_changes_hardly_a_token_of_a_race(tokenizer: PreTrainedTokenizerFast) -> None:
    """Log-probabilities of 5000 tokens that move by 1e-3: one uniform number meets a moved boundary far more often."""
    generator, streams = torch.Generator().manual_seed(0), 1000
    law = torch.randn(5000, generator=generator, dtype=torch.float64).log_softmax(-1)
    moved = (law + 1e-3 * torch.randn(5000, generator=generator, dtype=torch.float64)).log_softmax(-1)
    changed = {}
    for name, coupling in {"inverse": INVERSE, "race": RACE}.items():
        chosen = [
            coupling.choose(
                x.expand(streams, -1), [coupling.stream(key << 64 | key, 1) for key in range(streams)], [0] * streams
            )
            for x in (law, moved)
        ]
        changed[name] = int((chosen[0] != chosen[1]).sum())
    assert changed["race"] <= 3 and changed["inverse"] > 10


@pytest.mark.slow
def test_rounding_in_float32_changes_hardly_a_sequence_of_a_real_model() -> None:
    folder = os.environ.get("POLYREF_TEST_MODEL")
    if folder is None:
        pytest.skip("POLYREF_TEST_MODEL names no folder of a real model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [({"role": "user", "content": f"Name {i + 2} animals {'that live near water ' * (i % 3)}."},) for i in range(10)]
    one, many = (
        drawn_tokens(LocalEngine(model, tokenizer, batch_size=size)(prompts, 4, SamplingParameters(24), seed=0))
        for size in (1, 16)
    )
    same = [a == b for row, other in zip(one, many, strict=True) for a, b in zip(row, other, strict=True)]
    assert sum(same) >= 0.99 * len(same)


def test_what_cannot_be_drawn_is_refused_in_one_line(tokenizer: PreTrainedTokenizerFast, model: Any) -> None:
    engine = LocalEngine(model, tokenizer)
    with pytest.raises(DataError, match="prompt 2.*context of 256"):
        engine(["a", "b" * 250], 1, SamplingParameters(20), seed=0)
    for wrong in ({"max_new_tokens": 0}, {"max_new_tokens": 1, "temperature": 0.0}, {"max_new_tokens": 1, "top_p": 0.0}):
        with pytest.raises(ConfigError):
            SamplingParameters(**wrong)
    with pytest.raises(ConfigError, match="n is 0"):
        engine(["a"], 0, SamplingParameters(1), seed=0)
    with pytest.raises(ConfigError, match="batch_size"):
        LocalEngine(model, tokenizer, batch_size=0)
    with pytest.raises(DataError, match="no token"):
        LocalEngine(model, byte_tokenizer(bos=False))([""], 1, SamplingParameters(1), seed=0)
    for number in (math.nan, math.inf, -math.inf):  # an infinite one is what an overflow in float16 leaves
        broken = tiny_llama(tokenizer)

        def fill(_: Any, __: Any, output: Any, number: float = number) -> None:
            output.logits.fill_(number)

        broken.register_forward_hook(fill)
        with pytest.raises(ModelError, match="not numbers"):
            LocalEngine(broken, tokenizer)(["a"], 1, SamplingParameters(1), seed=0)
    endless = tiny_llama(byte_tokenizer(eos=False))
    endless.generation_config.eos_token_id = None
    with pytest.raises(ModelError, match="ends a completion"):
        LocalEngine(endless, byte_tokenizer(eos=False))
