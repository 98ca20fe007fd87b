"""Language models small enough to enumerate, as transformers modules with caches, and what their compositions are exactly."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import chisquare
from transformers import PreTrainedTokenizerFast

from fakes import tiny_llama
from polyref.references.compose import arithmetic, geometric
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.samplers.composed_values import Sample
from polyref.samplers.members import Members, load_members

END, ALLOWED = 2, (2, 40, 41)
"""The end token and two bytes: all that an enumerable model ever gives."""


class OnlyAllowed(torch.nn.Module):
    """A model whose other tokens have probability 0, and whose logits are `spread` so that models disagree."""

    def __init__(self, model: Any, allowed: Sequence[int] = ALLOWED, spread: float = 3.0) -> None:
        super().__init__()
        self.model, self.config, self.generation_config = model, model.config, model.generation_config
        self.allowed, self.spread = allowed, spread

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        barred = torch.ones(output.logits.shape[-1], dtype=torch.bool)
        barred[list(self.allowed)] = False
        output.logits = (self.spread * output.logits).masked_fill(barred, -torch.inf)
        return output


def enumerable(tokenizer: PreTrainedTokenizerFast, *seeds: int, **settings: Any) -> Members:
    """A member for each of `seeds`, the same weights for the same seed, then under a system prompt of its own."""
    models: dict[int, OnlyAllowed] = {}
    references = []
    for seed in seeds:
        prompt = f"speak {seed}" if seed in models else None
        model = models.setdefault(seed, OnlyAllowed(tiny_llama(tokenizer, seed=seed).double()))
        references.append(Reference(model, tokenizer=tokenizer, system_prompt=prompt))
    return load_members(ReferenceSet(tuple(references), **settings))


def support(length: int) -> list[tuple[int, ...]]:
    """Every completion of at most `length` tokens: those that end, then those that are cut."""
    bodies = [body for size in range(length) for body in itertools.product(ALLOWED[1:], repeat=size)]
    return [(*body, END) for body in bodies] + list(itertools.product(ALLOWED[1:], repeat=length))


@torch.no_grad()
def token_logps(members: Members, prompt: Any, tokens: Sequence[int]) -> torch.Tensor:
    """log pi_i(. | x, prefix) (T, V, K) along a completion, each member reading it alone and without a cache."""
    laws = []
    for member in members.members:
        assert member is not None
        ids = member.encoder.encode_prompt(prompt, member.system_prompt)
        laws.append(member.model(input_ids=torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1].log_softmax(-1))
    return torch.stack(laws, -1)


def exact_logps(members: Members, prompt: Any, length: int) -> torch.Tensor:
    """log pi_i(y | x) (Y, K) over `support`."""
    return torch.stack([token_logps(members, prompt, y)[torch.arange(len(y)), list(y)].sum(0) for y in support(length)])


def exact_laws(members: Members, prompt: Any, length: int, weights: Sequence[float] = ()) -> dict[str, np.ndarray]:
    """F_a as "mass" (), and over `support` G_a, M_a and the law "tokens" of composing and renormalising each token."""
    a = torch.tensor(list(weights) or list(members.weights), dtype=torch.float64)
    logps = exact_logps(members, prompt, length)
    product = geometric(logps, a).exp().numpy()
    by_token = []
    for y in support(length):
        law = geometric(token_logps(members, prompt, y), a).log_softmax(-1)
        by_token.append(float(law[torch.arange(len(y)), list(y)].sum().exp()))
    laws = {"geometric": product / product.sum(), "arithmetic": arithmetic(logps, a).exp().numpy()}
    return laws | {"mass": product.sum(), "tokens": np.array(by_token)}


def p_value(samples: Sequence[Sample], law: np.ndarray, length: int) -> float:
    """Of the chi-square of the samples' counts against `law` over `support`; the rarest are one cell."""
    counts = Counter(sample.token_ids for sample in samples)
    assert counts.keys() <= set(support(length)) and all(sample.log_weight == 0 for sample in samples)
    observed, expected = np.array([counts[tokens] for tokens in support(length)]), len(samples) * law
    rising = np.argsort(expected)
    small = rising[: int((np.cumsum(expected[rising]) < 5).sum()) + 1]
    large = np.setdiff1d(rising, small)
    return float(chisquare(*(np.append(values[large], values[small].sum()) for values in (observed, expected))).pvalue)
