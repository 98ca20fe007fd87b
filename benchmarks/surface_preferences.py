"""A preference model of surface features: what a few hundred votes can teach; a pocket-sized network learns them by heart.

g(x, y1, y2) = s(w . v), v the differences d of the replies' features and all products d_j |d_k|: antisymmetric, and, by the
products, no difference of rewards. w has the least mean log loss of the (soft) labels + ridge |w|^2 / 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from polyref.rewards.preference_model import NamedPreferences, probability_of
from polyref.rewards.protocols import PreferenceModel
from polyref.types import PreferenceRecord, Text

FEATURES = ("log length", "empty", "repetition", "copied", "ended")


def words_of(text: Text) -> str:
    return text if isinstance(text, str) else " ".join(str(message["content"]) for message in text)


def features(prompt: Text, reply: Text) -> list[float]:
    """FEATURES of one reply: log(1 + characters), whether it is blank, the share of its words that repeat an earlier one, the
    share of its words that the prompt has, and whether it ends as a sentence does."""
    text, asked = words_of(reply).strip(), set(words_of(prompt).lower().split())
    words = text.lower().split()
    count = max(len(words), 1)
    repeated, copied = (len(words) - len(set(words))) / count, sum(word in asked for word in words) / count
    return [log(1 + len(text)), float(not text), repeated, copied, float(text.endswith((".", "!", "?", '"', ")")))]


def differences(prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text]) -> np.ndarray:
    """d of N rows, (N, F)."""
    rows = zip(prompts, first, second, strict=True)
    found = [np.subtract(features(prompt, one), features(prompt, other)) for prompt, one, other in rows]
    return np.reshape(found, (len(prompts), len(FEATURES)))


def fit_surface_preferences(records: Sequence[PreferenceRecord], *, ridge: float = 0.01) -> PreferenceModel:
    """The model with the least loss on `records`, each difference divided by its root mean square there."""
    d = differences(*zip(*((r.prompt, r.chosen, r.rejected) for r in records), strict=True))
    scale = np.sqrt((d**2).mean(0)) + 1e-9
    labels = np.array([1.0 if r.chosen_probability is None else r.chosen_probability for r in records])

    def inputs(d: np.ndarray) -> np.ndarray:
        unit = d / scale
        return np.concatenate([unit, (unit[:, :, None] * np.abs(unit[:, None, :])).reshape(len(d), -1)], 1)

    v = inputs(d)

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        h = v @ w
        loss = np.logaddexp(0, h) - labels * h
        return loss.mean() + ridge / 2 * w @ w, v.T @ (1 / (1 + np.exp(-h)) - labels) / len(h) + ridge * w

    w = minimize(objective, np.zeros(v.shape[1]), jac=True, method="L-BFGS-B").x

    def preferences(prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text]) -> Tensor:
        return probability_of(torch.from_numpy(inputs(differences(prompts, first, second)) @ w))

    return NamedPreferences("surface features", preferences)
