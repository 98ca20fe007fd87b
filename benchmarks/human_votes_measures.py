"""What human_votes_study.py says of votes and of implied reward differences: numbers, intervals over prompts, a figure."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from human_votes import Side
from scipy.stats import chisquare
from surface_preferences import words_of

from polyref.data.sources import prompt_key
from polyref.objectives.calibration import fit_temperature
from polyref.objectives.metrics import mean_interval, preference_accuracy
from polyref.objectives.pairwise import sigmoid
from polyref.objectives.variance_reduced import variance_reduced


def per_vote(h: np.ndarray, side: Side) -> dict[str, np.ndarray]:
    """Of reward differences (S, N) for S seeds, each (S, N): agreement with the majority (NaN where it says tie), and log loss
    against the vote shares as it is, and at the one temperature that is best for these very votes."""
    difference = torch.from_numpy(h).double()
    majority = torch.tensor([vote.majority for vote in side.votes], dtype=torch.float64).expand_as(difference)
    shares = torch.tensor([vote.record.chosen_probability for vote in side.votes], dtype=torch.float64).expand_as(difference)
    agreement = preference_accuracy(difference, chosen_probability=majority).masked_fill(majority == 0.5, torch.nan)
    temperature = fit_temperature(difference.flatten(), shares.flatten())
    scaled = difference / temperature if temperature is not None else torch.zeros_like(difference)
    loss, scaled_loss = (sigmoid(d, chosen_probability=shares) for d in (difference, scaled))
    return {"agreement": agreement.numpy(), "log loss": loss.numpy(), "log loss at best temperature": scaled_loss.numpy()}


def interval(values: np.ndarray, side: Side) -> list[float]:
    """[mean, low, high] of values (S, N) without those that are NaN."""
    counted = ~np.isnan(values)
    return list(mean_interval(values[counted], np.tile(side.prompts, len(values))[counted.ravel()], seed=0))


def factor(h: np.ndarray, side: Side, label: str, control: float) -> list[float]:
    """Var(plain loss)/Var(variance-reduced loss) over votes and seeds, h (S, N, 1 + M): [ratio, low, high] over prompts."""
    labels = [vote.majority if label == "majority" else vote.record.chosen_probability for vote in side.votes]
    z = torch.tensor(labels, dtype=torch.float64).expand(h.shape[:2])
    d, g = torch.from_numpy(h), side.g.expand(h.shape)
    terms = variance_reduced(d[..., 0], z, g[..., 0], d[..., 1:], g[..., 1:], sigmoid, control=control)
    names, cluster = np.unique(np.tile(side.prompts, len(h)), return_inverse=True)
    pair = torch.stack([terms.data.flatten(), terms.loss.flatten()]).numpy()
    moments = np.concatenate([np.ones_like(pair[:1]), pair, pair**2])
    sums = np.stack([np.bincount(cluster, weights=row, minlength=len(names)) for row in moments])

    def ratio(sums: np.ndarray) -> np.ndarray:
        variances = sums[3:] / sums[0] - (sums[1:3] / sums[0]) ** 2
        return variances[0] / variances[1]

    draws = np.random.default_rng(0).integers(len(names), size=(4000, len(names)))
    low, high = np.quantile(ratio(sums[:, draws].sum(2)), [0.025, 0.975])
    return [float(ratio(sums.sum(1))), float(low), float(high)]


def length(reply: Any) -> int:
    return len(words_of(reply))


def describe(side: Side) -> dict[str, Any]:
    """Sizes, how good g is, and whether auxiliary pairs may have the law of the votes.

    For that, the chi-square p-value of a uniform choice of two models, where they are known, and the mean |log ratio of
    lengths| of both, and by how much it differs.
    """

    def spread(first: Any, second: Any) -> float:
        return abs(float(np.log((1 + length(first)) / (1 + length(second)))))

    voted = np.array([spread(vote.record.chosen, vote.record.rejected) for vote in side.votes])
    drawn = np.array([np.mean([spread(*pair) for pair in pairs]) for pairs in side.auxiliary])
    models = Counter(frozenset(vote.writers) for vote in side.votes if vote.writers)
    return {
        "pairs": len(side.votes),
        "prompts": len(set(side.prompts)),
        "ties": sum(vote.majority == 0.5 for vote in side.votes),
        "split": sum(vote.record.chosen_probability not in (0.5, 1.0) for vote in side.votes),
        "pairs whose pool is one pair": sum(len({tuple(map(prompt_key, p)) for p in pairs}) == 1 for pairs in side.auxiliary),
        "p of uniform pairs of models": float(chisquare(list(models.values())).pvalue) if models else None,
        "length spread": {
            "votes": interval(voted[None], side),
            "auxiliary": interval(drawn[None], side),
            "auxiliary less votes": interval((drawn - voted)[None], side),
        },
        "g": {key: interval(value, side) for key, value in per_vote(torch.logit(side.g[:, 0]).numpy()[None], side).items()},
    }


def draw(sets: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [(name, arm, numbers) for name, row in sets.items() for arm, numbers in row["arms"].items()]
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", sharey=True)
    titles = {
        "agreement": "agreement with the majority",
        "log loss": "log loss, vote shares",
        "factor": "variance factor, c = 1",
    }
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for place, (name, _, numbers) in enumerate(rows):
            found = numbers.get(key) if key != "factor" else numbers.get(key, {}).get("c = 1")
            if found is not None:
                mean, low, high = found
                colour = "#2a6fdb" if name == "pandalm-human" else "#c2571a"
                axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=3)
        axes.axvline({"agreement": 0.5, "log loss": np.log(2), "factor": 1.0}[key], color="#8a8f98", lw=0.8, ls=(0, (3, 3)))
        axes.set_title(title, loc="left")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [f"{name.removesuffix('-human')}: {arm}" for name, arm, _ in rows])
    panels[0].invert_yaxis()
    figure.savefig(file, dpi=150)
