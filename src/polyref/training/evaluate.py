"""Held-out preference accuracy and margin of a policy or a reward model, with intervals that respect shared prompts."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from transformers import Trainer

from polyref.data.sources import prompt_key
from polyref.objectives.metrics import mean_interval, preference_accuracy
from polyref.training.dataset import ScoredPairs


def preference_report(trainer: Trainer, dataset: ScoredPairs, *, seed: int = 0) -> dict[str, Any]:
    """Accuracy and margin of the reward difference h, implied or trained, that `trainer.predict` returns for `dataset`.

    `accuracy` is the share of pairs where the sign of h is the majority's label (a tie of either counts 1/2), `margin` the mean
    of h in reward units; each is [mean, low, high] with a 95% interval from a bootstrap over prompts. `h` keeps the values,
    pair by pair, and `prompt_ids` says which pairs share a prompt.
    """
    h = np.asarray(trainer.predict(cast(Any, dataset)).predictions, dtype=np.float64)
    numbers: dict[str, int] = {}
    prompts = [numbers.setdefault(prompt_key(pair.record.prompt), len(numbers)) for pair in dataset.pairs]
    shares = [1.0 if pair.record.chosen_probability is None else pair.record.chosen_probability for pair in dataset.pairs]
    majority = (torch.tensor(shares, dtype=torch.float64).sub(0.5).sign() + 1) / 2
    correct = preference_accuracy(torch.from_numpy(h), chosen_probability=majority).numpy()
    return {
        "pairs": len(h),
        "prompts": len(set(prompts)),
        "accuracy": list(mean_interval(correct, prompts, seed=seed)),
        "margin": list(mean_interval(h, prompts, seed=seed)),
        "h": h.tolist(),
        "prompt_ids": prompts,
    }
