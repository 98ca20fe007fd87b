"""The gold reward of benchmarks/robust_study.py: sentence embeddings under a linear head, fitted on human pairs, then fixed.

No training sees it: it draws the labels, and judges what was trained on them. The head reads the few directions in which
completions of one prompt differ most: of a head on all of them, 400 labels taught the pocket policy nothing measurable.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from polyref.types import PreferenceRecord, Text

MAX_TOKENS, ASKED = 128, 100
"""Of a text, and the characters of the last turn that are read."""
RIDGE = 10.0


class GoldReward:
    """r(x, y) = w . phi(x, y), phi the unit embedding of the beginning of the last turn with the completion behind it."""

    name = "gold"

    def __init__(self, folder: str | Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, use_safetensors=True).eval()
        self.weights = np.zeros(self.model.config.hidden_size)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        return torch.from_numpy(self.features(prompts, completions) @ self.weights)

    def features(self, prompts: Sequence[Text], completions: Sequence[Text]) -> np.ndarray:
        """(N, d) float64."""
        rows = zip(prompts, completions, strict=True)
        return self._embed([f"{plain(prompt)[:ASKED]}\n{plain(completion)}" for prompt, completion in rows])

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str], batch: int = 64) -> np.ndarray:
        """Mean-pooled unit vectors; equal texts once, those of like length together."""
        order = sorted(set(texts), key=len)
        found: dict[str, np.ndarray] = {}
        for i in range(0, len(order), batch):
            some = order[i : i + batch]
            inputs = self.tokenizer(some, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            states, mask = self.model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
            pooled = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
            found |= dict(zip(some, pooled.double().numpy(), strict=True))
        return np.stack([found[text] for text in texts])

    def differences(self, records: Sequence[PreferenceRecord]) -> np.ndarray:
        """phi(chosen) - phi(rejected), (N, d)."""
        prompts = [record.prompt for record in records]
        rejected = self.features(prompts, [record.rejected for record in records])
        return self.features(prompts, [record.chosen for record in records]) - rejected

    def fit(self, differences: np.ndarray, directions: np.ndarray) -> None:
        """w, within the span of `directions` (d, k), by ridge logistic regression of the human choices."""
        seen = differences @ directions

        def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
            h = seen @ w
            return float(np.logaddexp(0, -h).sum() + RIDGE / 2 * w @ w), -seen.T @ expit(-h) + RIDGE * w

        start = np.zeros(directions.shape[1])
        self.weights = directions @ minimize(loss, start, jac=True, method="L-BFGS-B").x


def plain(text: Text) -> str:
    """The text itself; of a conversation its last turn."""
    return text if isinstance(text, str) else text[-1]["content"]
