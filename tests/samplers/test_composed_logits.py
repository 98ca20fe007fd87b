"""Token-level composition in generate: the law it has, and the weights that make it another."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import PreTrainedTokenizerFast

from enumerable_lm import ALLOWED, END, exact_laws, support
from fakes import tiny_llama
from polyref.errors import ConfigError
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.samplers.composed_logits import TokenComposition
from polyref.samplers.members import Members, load_members

WEIGHTS, PROMPT, LENGTH, ROWS = (0.5, 0.3, 0.2), "ab", 3, 1500


@pytest.fixture(scope="module")
def members(tiny_tokenizer: PreTrainedTokenizerFast) -> Members:
    """Llamas that `generate` knows, their head such that only ALLOWED have mass to speak of."""
    models = {seed: restricted(tiny_llama(tiny_tokenizer, seed=seed).double()) for seed in (1, 2)}
    prompts = ((1, None), (2, None), (1, "speak"))
    references = (Reference(models[seed], tokenizer=tiny_tokenizer, system_prompt=prompt) for seed, prompt in prompts)
    return load_members(ReferenceSet(tuple(references), WEIGHTS))


def restricted(model: Any) -> Any:
    def bar(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        barred = torch.ones(logits.shape[-1], dtype=torch.bool)
        barred[list(ALLOWED)] = False
        return (3 * logits).masked_fill(barred, -torch.inf)

    model.lm_head.register_forward_hook(bar)
    return model


def test_it_draws_another_law_and_its_weights_are_the_difference(members):
    laws = exact_laws(members, PROMPT, LENGTH)
    own = members.members[0]
    assert own is not None
    prompt = torch.tensor([own.encoder.encode_prompt(PROMPT)])
    composition = TokenComposition(members, [PROMPT], LENGTH)
    torch.manual_seed(0)
    rows = own.model.generate(
        prompt.expand(ROWS, -1),
        attention_mask=torch.ones_like(prompt).expand(ROWS, -1),
        max_new_tokens=LENGTH,
        do_sample=True,
        top_k=0,
        logits_processor=[composition],
    )
    drawn = [tuple(row[: row.index(END) + 1] if END in row else row) for row in rows[:, prompt.shape[1] :].tolist()]
    counts = Counter(drawn)
    observed = np.array([counts[tokens] for tokens in support(LENGTH)])
    assert chisquare(observed, ROWS * laws["tokens"]).pvalue > 0.001
    assert chisquare(observed, ROWS * laws["geometric"]).pvalue < 1e-6
    increments = laws["mass"] * laws["geometric"] / laws["tokens"]
    index = {tokens: place for place, tokens in enumerate(support(LENGTH))}
    for tokens, log_mass in zip(drawn, composition.log_mass.tolist(), strict=True):
        assert math.exp(log_mass) == pytest.approx(increments[index[tokens]])


def test_members_read_without_dropout_and_are_left_as_they_were(tiny_tokenizer):
    models = [tiny_llama(tiny_tokenizer, seed=seed, attention_dropout=0.5).double() for seed in (1, 2)]
    two = load_members(ReferenceSet(tuple(Reference(model, tokenizer=tiny_tokenizer) for model in models)))
    ids, scores = torch.tensor([[1, 40, 41]]), torch.randn(1, 260, dtype=torch.float64)
    expected = TokenComposition(two, [PROMPT], LENGTH)(ids, scores)
    models[1].train()
    with torch.no_grad():
        assert not torch.equal(models[1](ids).logits, models[1](ids).logits), "there is dropout to switch off"
    assert torch.equal(TokenComposition(two, [PROMPT], LENGTH)(ids, scores), expected) and models[1].training
    models[0].train()
    with pytest.raises(ConfigError, match="TokenComposition: the model that generates is in training mode"):
        TokenComposition(two, [PROMPT], LENGTH)(ids, scores)


def test_one_member_is_left_as_it_is(members):
    scores = torch.randn(2, 260)
    alone = TokenComposition(replace(members, weights=(1.0, 0.0, 0.0)), [PROMPT], LENGTH)
    assert alone(torch.tensor([[1], [1]]), scores) is scores


def test_what_does_not_fit_is_refused_in_one_line(members):
    with pytest.raises(ConfigError, match="TokenComposition: members have different tokenizers"):
        TokenComposition(replace(members, one_tokenizer=False), [PROMPT], LENGTH)
    with pytest.raises(ConfigError, match="3 rows for 2 prompts"), torch.no_grad():
        TokenComposition(members, [PROMPT, "a"], LENGTH)(torch.ones(3, 1, dtype=torch.long), torch.randn(3, 260))
