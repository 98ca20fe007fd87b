"""The learnt g of benchmarks/robust_study.py: a reward of token counts, cheap enough to fit for every fold and seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from robust_gold import plain
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from polyref.data.sources import split_by_prompt
from polyref.types import PreferenceRecord, Text

RIDGES = (3.0, 10.0, 30.0, 100.0, 300.0)


class TokenCountReward:
    """r(x, y) = w . log(1 + counts of the tokens of y, and its length), w by ridge logistic regression of the labels.

    The ridge is the one of RIDGES that predicts a held-out fifth of the pairs best; it makes r a calibrated difference in nats.
    """

    name = "token counts"

    def __init__(self, tokenizer: Any, records: Sequence[PreferenceRecord], seed: int) -> None:
        self.tokenizer = tokenizer
        fit, aside = split_by_prompt(records, held_out=0.2, seed=seed)
        own, other = self._differences(fit), self._differences(aside)
        losses = [np.logaddexp(0, -other @ _weights(own, ridge)).mean() for ridge in RIDGES]
        self.weights = _weights(self._differences(records), RIDGES[int(np.argmin(losses))])

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        return torch.from_numpy(self._features(completions) @ self.weights)

    def _differences(self, records: Sequence[PreferenceRecord]) -> np.ndarray:
        return self._features([r.chosen for r in records]) - self._features([r.rejected for r in records])

    def _features(self, completions: Sequence[Text]) -> np.ndarray:
        counts = np.zeros((len(completions), len(self.tokenizer) + 1))
        for row, ids in zip(counts, self.tokenizer([plain(c) for c in completions]).input_ids, strict=True):
            np.add.at(row, ids, 1)
            row[-1] = len(ids)
        return np.log1p(counts)


def _weights(differences: np.ndarray, ridge: float) -> np.ndarray:
    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        h = differences @ w
        return float(np.logaddexp(0, -h).sum() + ridge / 2 * w @ w), -differences.T @ expit(-h) + ridge * w

    found: np.ndarray = minimize(loss, np.zeros(differences.shape[1]), jac=True, method="L-BFGS-B").x
    return found
