"""Composing tokens: nothing at one token, an independent check of one number, and an optimum that nothing beats."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from polyref.theory.experiments import composition
from polyref.theory.results import ExperimentResult, to_dict
from polyref.theory.toy_language import random_toy_language


@pytest.fixture(scope="module")
def result() -> ExperimentResult:
    return composition.EXPERIMENT(20, seed=1)


def test_the_finding(result: ExperimentResult) -> None:
    assert result.agreement == "agrees"
    for row in result.table.rows:
        for cell in row[2:]:
            assert (cell.value == cell.high == 0) if row[1] == 1 else cell.low > 0  # type: ignore[union-attr]
    assert len(result.table.rows) == len(composition.LENGTHS) * len(composition.SPREADS)


def test_one_seed_gives_one_result(result: ExperimentResult) -> None:
    assert to_dict(composition.EXPERIMENT(20, seed=1)) == to_dict(result) != to_dict(composition.EXPERIMENT(20, seed=2))


def test_total_variation_by_walking_every_completion() -> None:
    """Products of renormalised token averages against normalised products of whole completions, in plain numpy."""
    measured = composition._at(torch.Generator().manual_seed(5), 3, 3, 1.5)["geometric"]
    toy = random_toy_language(torch.Generator().manual_seed(5), contexts=3, references=3, vocabulary=3, length=3, spread=1.5)
    logits = toy.logits.numpy()
    for context in range(3):
        by_token, whole = [], []
        for completion in (c for n in (1, 2, 3) for c in itertools.product(range(3), repeat=n)):
            if 0 in completion[:-1] or (completion[-1] != 0 and len(completion) < 3):
                continue
            state, averaged, members = 0, 1.0, np.ones(3)
            for token in completion:
                rows = np.exp(logits[context, state])
                rows = rows / rows.sum(0)
                product = rows.prod(1) ** (1 / 3)
                averaged *= product[token] / product.sum()
                members = members * rows[token]
                state = 1 + state * 2 + token - 1
            by_token.append(averaged)
            whole.append(members.prod() ** (1 / 3))
        expected = np.abs(np.array(by_token) - np.array(whole) / np.sum(whole)).sum() / 2
        assert float(measured[context]) == pytest.approx(expected, abs=1e-12)
