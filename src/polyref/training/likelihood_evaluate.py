"""Held-out negative log-likelihood of weighted samples, with intervals over prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from transformers import Trainer

from polyref.data.sample_tokens import TokenizedSamples
from polyref.objectives.metrics import mean_interval
from polyref.training.evaluate import plain_interval
from polyref.training.sample_rows import SampleRows


def likelihood_report(trainer: Trainer, dataset: SampleRows, *, seed: int = 0) -> dict[str, Any]:
    """The weighted negative log-likelihood of each prompt's samples, by what `trainer.predict` returns for `dataset`, in nats.

    `nll` is its mean over prompts, [mean, low, high] with a 95% interval from a bootstrap over them (None where one prompt
    gives none), `values` the mean prompt by prompt, `effective` as `effective_samples`.
    """
    rows = np.asarray(trainer.predict(cast(Any, dataset)).predictions, dtype=np.float64) / dataset.scale
    values = np.bincount([row.prompt for row in dataset.rows], weights=rows)
    return {
        "samples": sum(len(each.shares) for each in dataset.prompts),
        "prompts": len(values),
        "nll": plain_interval(mean_interval(values, seed=seed)),
        "effective": effective_samples(dataset.prompts),
        "values": values.tolist(),
    }


def effective_samples(prompts: Sequence[TokenizedSamples]) -> float:
    """The mean over prompts of the effective number of samples, 1 / sum_j share_j^2."""
    return math.fsum(1 / math.fsum(share * share for share in each.shares) for each in prompts) / len(prompts)


def likelihood_change(before: Mapping[str, Any], after: Mapping[str, Any], *, seed: int = 0) -> list[float | None]:
    """By how much the likelihood of two reports on the same prompts rose, prompt by prompt: [mean, low, high] in nats."""
    return plain_interval(mean_interval(np.subtract(before["values"], after["values"]), seed=seed))
