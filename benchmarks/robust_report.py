"""What benchmarks/robust_study.py found: JSON, a Markdown table and a figure, from the outcomes of its runs."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from robust_data import CORRUPTIONS, as_prompts, labelled, load_pool, message
from robust_runs import Tier
from scipy.special import expit

from polyref.evaluation.winrate import crossed_outcomes, win_rate
from polyref.files import write_bytes
from polyref.objectives.metrics import mean_interval
from polyref.types import Text

RESULTS = Path(__file__).parent / "results"
BASELINE = "sigmoid"
COLOURS = tuple(f"C{number}" for number in range(10))


def write(tier: Tier, name: str, runs: Sequence[tuple[str, str, int]]) -> None:
    """benchmarks/results/robust_study_NAME.json and .png; the table also on the terminal."""
    prompts = as_prompts(json.loads((Path(tier.folder) / "held_out.json").read_text()))
    arms, corruptions, seeds = (list(dict.fromkeys(run[i] for run in runs)) for i in range(3))
    rows = [row_of(tier, prompts, arm, corruption, seeds) for corruption in corruptions for arm in arms]
    content = {
        "tier": name,
        "pairs": len(load_pool(Path(tier.folder) / "pool.json").prompts),
        "held_out_prompts": len(prompts),
        "seeds": seeds,
        "settings": tier.settings(),
        "labels": {c: label_quality(tier, c, seeds) for c in corruptions},
        "rows": rows,
        "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
        "machine": {"processor": platform.machine(), "threads_a_run": 1},
    }
    write_bytes(RESULTS / f"robust_study_{name}.json", (json.dumps(content, indent=1) + "\n").encode())
    figure(rows, corruptions, arms, RESULTS / f"robust_study_{name}.png")
    frontier(rows, corruptions, RESULTS / f"robust_study_{name}_kl.png")
    print(markdown(rows, corruptions, arms))


def row_of(tier: Tier, prompts: Sequence[Text], arm: str, corruption: str, seeds: Sequence[int]) -> dict[str, Any]:
    """One arm under one corruption over all seeds.

    Intervals are from a bootstrap over prompts, seeds of a prompt together: they say nothing of other seeds, other labels.
    """
    found = [json.loads(tier.file("policy", arm, corruption, seed).read_text()) for seed in seeds]
    base = [json.loads(tier.file("policy", BASELINE, corruption, seed).read_text()) for seed in seeds]
    start = [json.loads(tier.file("start", seed).read_text()) for seed in seeds]
    over_plain = [outcomes(a["gold"], b["gold"]) for a, b in zip(found, base, strict=True)]
    over_start = [outcomes(a["gold"], b["gold"]) for a, b in zip(found, start, strict=True)]
    clusters = [prompt for _ in seeds for prompt in prompts]
    gains = [np.mean(a["gold"], 1) - np.mean(b["gold"], 1) for a, b in zip(found, base, strict=True)]
    by_seed = [float(outcome.mean()) for outcome in over_plain]
    ids = np.tile(np.arange(len(prompts)), len(seeds))
    return {
        "arm": arm,
        "corruption": corruption,
        "win_rate_over_plain": list(win_rate(np.concatenate(over_plain), clusters, seed=0).rate),
        "win_rate_by_seed": by_seed,
        "win_rate_over_start": list(win_rate(np.concatenate(over_start), clusters, seed=0).rate),
        "gold_over_plain": list(mean_interval(np.concatenate(gains), ids, seed=0)),
        "gold": list(mean_interval(np.concatenate([np.mean(a["gold"], 1) for a in found]), ids, seed=0)),
        "kl": list(mean_interval(np.concatenate([np.mean(a["log_ratio"], 1) for a in found]), ids, seed=0)),
        "tokens": float(np.mean([a["tokens"] for a in found])),
        "train_seconds": float(np.mean([a["train_seconds"] for a in found])),
        "logs": {key: float(np.mean([a["logs"][key] for a in found])) for key in found[0]["logs"]},
    }


def outcomes(policy: Any, baseline: Any) -> np.ndarray:
    """(P,): the share of comparisons that the policy wins; draws of one number share their randomness, and are not compared."""
    a, b = torch.tensor(policy, dtype=torch.float64), torch.tensor(baseline, dtype=torch.float64)
    return crossed_outcomes(a, b).numpy()


def label_quality(tier: Tier, corruption: str, seeds: Sequence[int]) -> dict[str, float]:
    """How often labels follow gold; the log loss on them, in nats a label, of the learnt g out of fold and of the true one."""
    pool = load_pool(Path(tier.folder) / "pool.json")
    better = pool.gold[:, 0, 0] > pool.gold[:, 0, 1]
    follow, learnt, right = [], [], []
    for seed in seeds:
        records = labelled(pool, corruption, seed)
        z = np.array([r.chosen == message(pairs[0][0]) for r, pairs in zip(records, pool.texts, strict=True)])
        rewards = np.array(json.loads(tier.file("auxiliary", corruption, seed).read_text())["rewards"])[:, 0]
        follow.append((z == better).mean())
        learnt.append(_log_loss(expit(rewards[:, 0] - rewards[:, 1]), z))
        right.append(_log_loss(CORRUPTIONS[corruption](pool)[:, 0], z))
    found = {"follow_gold": follow, "learnt_g_nats": learnt, "true_g_nats": right}
    return {name: float(np.mean(values)) for name, values in found.items()}


def _log_loss(g: np.ndarray, z: np.ndarray) -> float:
    return float(-np.log(np.where(z, g, 1 - g).clip(1e-12)).mean())


def markdown(rows: Sequence[dict[str, Any]], corruptions: Sequence[str], arms: Sequence[str]) -> str:
    """Win rate over plain DPO [95% interval]; in bold where the interval leaves out one half."""
    of = {(row["arm"], row["corruption"]): row for row in rows}
    lines = ["| Arm | " + " | ".join(corruptions) + " | KL, nats |", "| --- " * (len(corruptions) + 2) + "|"]
    for arm in arms:
        cells = []
        for corruption in corruptions:
            mean, low, high = of[arm, corruption]["win_rate_over_plain"]
            text = f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            cells.append("50" if arm == BASELINE else f"**{text}**" if low > 0.5 or high < 0.5 else text)
        kl = np.mean([of[arm, corruption]["kl"][0] for corruption in corruptions])
        lines.append(f"| {arm} | {' | '.join(cells)} | {kl:.1f} |")
    return "\n".join(lines)


def figure(rows: Sequence[dict[str, Any]], corruptions: Sequence[str], arms: Sequence[str], path: Path) -> None:
    """A panel for each corruption: the win rate of each arm over plain DPO, seeds as small marks."""
    shown = [arm for arm in arms if arm != BASELINE]
    of = {(row["arm"], row["corruption"]): row for row in rows}
    size = (2.2 + 2.1 * len(corruptions), 0.9 + 0.32 * len(shown))
    drawing, axes = plt.subplots(1, len(corruptions), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, corruption in zip(axes[0], corruptions, strict=True):
        for y, arm in enumerate(shown):
            row = of[arm, corruption]
            mean, low, high = (100 * value for value in row["win_rate_over_plain"])
            colour = "#1f6f8b" if not arm.endswith("true g") else "#9aa5ad"
            axis.plot([low, high], [y, y], color=colour, linewidth=2)
            axis.plot(mean, y, "o", color=colour, markersize=6)
            for value in row["win_rate_by_seed"]:
                axis.plot(100 * value, y, "|", color="#555555")
        axis.axvline(50, color="#999999", linewidth=0.8)
        axis.set_title(corruption, fontsize=10)
        axis.set_yticks(range(len(shown)), shown)
        axis.tick_params(labelsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylim(len(shown) - 0.5, -0.5)
    drawing.supxlabel("gold win rate over plain DPO, %", fontsize=10)
    drawing.savefig(path, dpi=150)
    plt.close(drawing)


def frontier(rows: Sequence[dict[str, Any]], corruptions: Sequence[str], path: Path) -> None:
    """A panel for each corruption: the win rate over the start against the KL that it took, an arm a point."""
    size = (0.8 + 2.6 * len(corruptions), 3.4)
    drawing, axes = plt.subplots(1, len(corruptions), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, corruption in zip(axes[0], corruptions, strict=True):
        for number, row in enumerate(row for row in rows if row["corruption"] == corruption):
            mean, low, high = (100 * value for value in row["win_rate_over_start"])
            marks = {"color": (*COLOURS, "#000000")[number % 11], "marker": "osD^vP*X<>p"[number % 11], "label": row["arm"]}
            axis.errorbar(row["kl"][0], mean, [[mean - low], [high - mean]], linestyle="none", elinewidth=0.8, **marks)
        axis.set_title(corruption, fontsize=10)
        axis.tick_params(labelsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("gold win rate over the start, %", fontsize=10)
    drawing.supxlabel("KL to the start, nats", fontsize=10)
    names = axes[0][0].get_legend_handles_labels()
    drawing.legend(*names, loc="outside right center", fontsize=9, frameon=False)
    drawing.savefig(path, dpi=150)
    plt.close(drawing)
