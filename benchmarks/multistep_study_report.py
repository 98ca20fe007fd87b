"""What benchmarks/multistep_study.py found: every step of every arm with intervals as JSON, a Markdown table and a figure."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyref.evaluation.winrate import crossed_outcomes, win_rate
from polyref.files import write_bytes
from polyref.objectives.metrics import mean_interval

Judged = Sequence[Mapping[str, np.ndarray]]
"""What `judged` gives, of each seed."""

RESULTS = Path(__file__).parent / "results"
BASELINE = "RSO"
COLOURS = ("#2f6bdb", "#d9641e", "#17876d", "#a8479b")
Runs = Mapping[tuple[str, int], Path]
"""The run folder of every arm and seed."""


def file(tier: str) -> Path:
    return RESULTS / f"multistep_study_{tier}.json"


def write(tier: str, settings: Mapping[str, Any], runs: Runs) -> None:
    """benchmarks/results/multistep_study_TIER.json and .png; the table also on the terminal."""
    arms, seeds = (list(dict.fromkeys(run[i] for run in runs)) for i in range(2))
    result = {
        "tier": tier,
        "seeds": seeds,
        "settings": settings,
        "proxy_and_gold": agreement(runs),
        "arms": {arm: summary(runs, arm, seeds) for arm in arms},
        "versions": {package: version(package) for package in ("torch", "transformers", "peft", "polyref")},
        "machine": {"processor": platform.machine(), "threads_a_run": 1},
    }
    write_bytes(file(tier), (json.dumps(result, indent=1) + "\n").encode())
    figure(result, file(tier).with_suffix(".png"))
    print(markdown(result))


def judged(run: Path, step: int) -> dict[str, np.ndarray]:
    """What was drawn on the held-out prompts after a step: reward, gold and log pi/anchor in nats, all (P, draws)."""
    prompts = [row for chunk in sorted((run / "stages" / f"evaluate-{step}").glob("chunk-*.json")) for row in rows_of(chunk)]
    return {
        "reward": np.array([[one["rewards"][0] for one in row] for row in prompts]),
        "gold": np.array([[one["rewards"][1] for one in row] for row in prompts]),
        "kl": np.array([[one["own"] - float(np.mean(one["logps"])) for one in row] for row in prompts]),
    }


def rows_of(chunk: Path) -> list[list[dict[str, Any]]]:
    return [row["proposals"] for row in json.loads(chunk.read_text())]


def summary(runs: Runs, arm: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Each step over all seeds; intervals are from a bootstrap over prompts, seeds of a prompt together.

    Where seeds took unlike numbers of steps, the steps that all of them took, and the last. `over_start` and `over_rso` compare
    draws of one policy with those of the other, by gold, but for the draws that share their randomness.
    """
    told = [json.loads((runs[arm, seed] / "summary.json").read_text()) for seed in seeds]
    last = [len(one["steps"]) - 1 for one in told]
    after = [judged(runs[arm, seed], step) for seed, step in zip(seeds, last, strict=True)]
    start = [judged(runs[arm, seed], 0) for seed in seeds]
    rso = [judged(runs[BASELINE, seed], _last(runs[BASELINE, seed])) for seed in seeds]
    shared = range(min(last) + (len(set(last)) == 1))
    steps = [_point([judged(runs[arm, seed], step) for seed in seeds]) for step in shared]
    acceptances = [[row["acceptance"] for row in one["steps"][1:]] for one in told]
    return {
        "steps": steps if len(set(last)) == 1 else [*steps, _point(after)],
        "betas": [[row["beta"] for row in one["steps"][1:]] for one in told],
        "acceptance": [[each[0] if each else None for each in one] for one in acceptances],
        "pairs": float(np.mean([sum(row["pairs"] for row in one["steps"][1:]) for one in told])),
        "scored": float(np.mean([sum(row["scored"] for row in one["steps"][1:]) for one in told])),
        "tokens": float(np.mean([one["tokens"] for one in told])),
        "reached": all(one["reached"] for one in told),
        "over_start": wins(after, start),
        "over_rso": wins(after, rso),
        "reward_less_rso": _difference(after, rso, "reward"),
        "gold_less_rso": _difference(after, rso, "gold"),
        "by_seed": [{name: float(values.mean()) for name, values in one.items()} for one in after],
    }


def _last(run: Path) -> int:
    return len(json.loads((run / "summary.json").read_text())["steps"]) - 1


def _point(found: Judged) -> dict[str, list[float]]:
    return {name: interval([one[name].mean(1) for one in found]) for name in ("reward", "gold", "kl")}


def _difference(after: Judged, before: Judged, name: str) -> list[float]:
    return interval([a[name].mean(1) - b[name].mean(1) for a, b in zip(after, before, strict=True)])


def interval(by_seed: Sequence[np.ndarray]) -> list[float]:
    return list(mean_interval(np.concatenate(by_seed), np.tile(np.arange(len(by_seed[0])), len(by_seed)), seed=0))


def wins(after: Judged, before: Judged) -> list[float]:
    found = [crossed_outcomes(*(torch.from_numpy(x["gold"]) for x in two)) for two in zip(after, before, strict=True)]
    names = [str(prompt) for one in found for prompt in range(len(one))]
    return list(win_rate(np.concatenate(found), names, seed=0).rate)


def agreement(runs: Runs) -> float:
    """The correlation of the reward and gold among a prompt's completions, drawn by the start."""
    first = [judged(run, 0) for (arm, _), run in runs.items() if arm == BASELINE]
    reward, gold = (
        np.concatenate([one[name] - one[name].mean(1, keepdims=True) for one in first]) for name in ("reward", "gold")
    )
    return float(np.corrcoef(reward.ravel(), gold.ravel())[0, 1])


def markdown(result: Mapping[str, Any]) -> str:
    """The last policy of each arm; its start first. Win rates, by gold, in percent; tokens through policy or references."""
    head = ("Arm", "reward", "KL, nats", "gold", "wins over the start", "over RSO", "accepted, by step", "pairs", "tokens")
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    start = next(iter(result["arms"].values()))["steps"][0]
    lines.append(f"| start | {said(start['reward'])} | {said(start['kl'])} | {said(start['gold'])} | 50 | | | | |")
    for arm, row in result["arms"].items():
        last = row["steps"][-1]
        rates = list(zip(*row["acceptance"], strict=False))
        accepted = ", ".join("–" if None in rate else f"{100 * np.mean(rate):.0f}%" for rate in rates)
        over = "50" if arm == BASELINE else percent(row["over_rso"])
        numbers = (said(last["reward"]), said(last["kl"]), said(last["gold"]), percent(row["over_start"]), over)
        name = arm if row["reached"] else f"{arm} (beta not reached)"
        lines.append(f"| {name} | {' | '.join(numbers)} | {accepted} | {row['pairs']:.0f} | {row['tokens']:.0f} |")
    return "\n".join(lines)


def said(values: Sequence[float]) -> str:
    mean, low, high = values
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def percent(values: Sequence[float]) -> str:
    mean, low, high = (100 * value for value in values)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def figure(result: Mapping[str, Any], path: Path) -> None:
    """Reward and gold against KL to the anchor: a curve for each arm from the start on, its seeds as small marks."""
    import matplotlib.figure

    drawing = matplotlib.figure.Figure(figsize=(9.5, 3.6), layout="constrained")
    panels = drawing.subplots(1, 2)
    for axis, name, label in zip(panels, ("reward", "gold"), ("reward, the one raised", "gold reward"), strict=True):
        for (arm, row), colour in zip(result["arms"].items(), COLOURS, strict=False):
            kl, value = (np.array([step[key] for step in row["steps"]]) for key in ("kl", name))
            axis.plot(kl[:, 0], value[:, 0], "-", color=colour, linewidth=1.2, marker="o", markersize=3.5, label=arm)
            ends = {"linestyle": "none", "color": colour, "elinewidth": 0.8}
            across, along = ((v[:, 0] - v[:, 1], v[:, 2] - v[:, 0]) for v in (kl, value))
            axis.errorbar(kl[:, 0], value[:, 0], xerr=across, yerr=along, **ends)
            axis.plot([s["kl"] for s in row["by_seed"]], [s[name] for s in row["by_seed"]], "x", color=colour, markersize=4)
        axis.set(xlabel="weighted KL to the references, nats", ylabel=label)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=9)
    drawing.savefig(path, dpi=150, metadata={"Software": None})
