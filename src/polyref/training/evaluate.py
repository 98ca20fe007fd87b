"""Held-out preference accuracy, margin and calibration, with intervals that respect shared prompts."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from transformers import Trainer

from polyref.data.sources import prompt_key
from polyref.objectives.calibration import calibration_error, fit_temperature, negative_log_likelihood, reliability
from polyref.objectives.metrics import Interval, mean_interval, preference_accuracy
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
    majority = (_labels(dataset).sub(0.5).sign() + 1) / 2
    correct = preference_accuracy(torch.from_numpy(h), chosen_probability=majority).numpy()
    return {
        "pairs": len(h),
        "prompts": len(set(prompts)),
        "accuracy": list(mean_interval(correct, prompts, seed=seed)),
        "margin": list(mean_interval(h, prompts, seed=seed)),
        "h": h.tolist(),
        "prompt_ids": prompts,
    }


def calibration_report(report: dict[str, Any], dataset: ScoredPairs, *, seed: int = 0) -> dict[str, Any]:
    """How the reward differences of `report`, as `preference_report` makes it of `dataset`, read as probabilities s(h/T).

    `temperature` T minimises the negative log-likelihood of these very labels (None where no T does, see `fit_temperature`).
    "raw" (T = 1) and "calibrated" each hold `nll` in nats a pair, `error` (expected calibration error) and `bins`, the
    reliability curve: confidence, accuracy [mean, low, high] (None where one prompt gives no interval) and count.
    """
    h, labels = torch.tensor(report["h"], dtype=torch.float64), _labels(dataset)
    temperature = fit_temperature(h, labels)

    def reading(differences: torch.Tensor) -> dict[str, Any]:
        bins = reliability(differences, labels, report["prompt_ids"], seed=seed)
        return {
            "nll": negative_log_likelihood(differences, labels),
            "error": calibration_error(bins),
            "bins": [
                {"confidence": each.confidence, "accuracy": plain_interval(each.accuracy), "count": each.count} for each in bins
            ],
        }

    return {
        "temperature": temperature,
        "raw": reading(h),
        "calibrated": reading(h / temperature) if temperature is not None else None,
    }


def plain_interval(interval: Interval | list[float]) -> list[float | None]:
    """[mean, low, high] for a file: one prompt gives no interval, and JSON knows no NaN."""
    return [value if math.isfinite(value) else None for value in interval]


def _labels(dataset: ScoredPairs) -> torch.Tensor:
    """P(chosen preferred) of every pair: (N,) float64."""
    shares = [1.0 if pair.record.chosen_probability is None else pair.record.chosen_probability for pair in dataset.pairs]
    return torch.tensor(shares, dtype=torch.float64)
