"""What benchmarks/iterate_study.py found: every round of every arm with intervals as JSON, a Markdown table and a figure."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import multistep_study_report
import numpy as np
from multistep_study_report import interval, percent, rows_of, said, wins

from polyref.files import write_bytes

Judged = Mapping[str, np.ndarray]
Run = tuple[str, int, float, int]
"""An arm, the number of its references, its beta, and the seed."""
Runs = Mapping[Run, Path]

RESULTS = Path(__file__).parent / "results"
BASELINE, FIRST = "offline", "rounds"
"""What arms are compared with, and the arm whose first round is the baseline on its share of the labels."""
COLOURS = {"offline": "#2f6bdb", "rounds": "#d9641e", "rounds, enhancer": "#17876d"}
NUMBERS = ("reward", "gold", "kl", "kl_start", "tokens")


def file(tier: str) -> Path:
    return RESULTS / f"iterate_study_{tier}.json"


def write(tier: str, settings: Mapping[str, Any], runs: Runs) -> None:
    """benchmarks/results/iterate_study_TIER.json and .png; the table also on the terminal."""
    cells, seeds = list(dict.fromkeys(run[:3] for run in runs)), list(dict.fromkeys(run[3] for run in runs))
    result = {
        "tier": tier,
        "seeds": seeds,
        "settings": settings,
        "proxy_and_gold": agreement([judged(run, 0) for run in runs.values()]),
        "cells": [summary(runs, cell, seeds) for cell in sorted(cells, key=lambda cell: cell[1])],
        "versions": {package: version(package) for package in ("torch", "transformers", "peft", "polyref")},
        "machine": {"processor": platform.machine(), "threads_a_run": 1},
    }
    write_bytes(file(tier), (json.dumps(result, indent=1) + "\n").encode())
    figure(result, file(tier).with_suffix(".png"))
    print(markdown(result))


def judged(run: Path, number: int) -> Judged:
    """What was drawn on the held-out prompts after a round, all (P, draws): reward, gold, KL to the anchor, length in tokens.

    `kl_start` is log pi/start in nats: the start is the first reference.
    """
    prompts = [row for chunk in sorted((run / "stages" / f"evaluate-{number}").glob("chunk-*.json")) for row in rows_of(chunk)]
    start = np.array([[one["own"] - one["logps"][0] for one in row] for row in prompts])
    tokens = np.array([[float(one["tokens"]) for one in row] for row in prompts])
    return multistep_study_report.judged(run, number) | {"kl_start": start, "tokens": tokens}


def summary(runs: Runs, cell: tuple[str, int, float], seeds: Sequence[int]) -> dict[str, Any]:
    """Each round over all seeds; intervals are from a bootstrap over prompts, seeds of a prompt together.

    `over_start` and `over_offline` compare every draw of one policy with every one of the other, by gold; the latter is offline
    DPO with the same references and beta, None where it has no run. `goal_less_offline` is the difference in what training
    raises: the reward less beta times the KL to the anchor.
    """
    told = [json.loads((runs[*cell, seed] / "summary.json").read_text()) for seed in seeds]
    policies = [[judged(runs[*cell, seed], number) for seed in seeds] for number in range(len(told[0]["rounds"]))]
    offline = [runs.get((BASELINE, *cell[1:], seed)) for seed in seeds]
    base = None if None in offline else [judged(run, 1) for run in offline if run is not None]
    labels = np.mean([[row.get("pairs", 0) for row in one["rounds"]] for one in told], 0).cumsum().tolist()
    return {
        "arm": cell[0],
        "references": cell[1],
        "beta": cell[2],
        "rounds": [point(some) | {"labels": count} for some, count in zip(policies, labels, strict=True)],
        "drawn": float(np.mean([one["tokens"] for one in told])),
        "over_start": wins(policies[-1], policies[0]),
        "over_offline": None if base is None else wins(policies[-1], base),
        "goal_less_offline": None if base is None else difference(policies[-1], base, cell[2]),
        "by_seed": [{name: float(one[name].mean()) for name in NUMBERS} for one in policies[-1]],
    }


def point(policies: Sequence[Judged]) -> dict[str, list[float]]:
    return {name: interval([one[name].mean(1) for one in policies]) for name in NUMBERS}


def difference(after: Sequence[Judged], before: Sequence[Judged], beta: float) -> list[float]:
    """Of reward - beta KL, prompt by prompt."""
    goals = [[(one["reward"] - beta * one["kl"]).mean(1) for one in some] for some in (after, before)]
    return interval([a - b for a, b in zip(*goals, strict=True)])


def agreement(starts: Sequence[Judged]) -> float:
    """The correlation of the reward and gold among a prompt's completions, drawn by the start."""
    reward, gold = (
        np.concatenate([one[name] - one[name].mean(1, keepdims=True) for one in starts]) for name in ("reward", "gold")
    )
    return float(np.corrcoef(reward.ravel(), gold.ravel())[0, 1])


def markdown(result: Mapping[str, Any]) -> str:
    """The last policy of each arm; the start before them. Win rates, by gold, in percent."""
    head = ("References", "Arm", "beta", "labels", "reward", "gold", "wins over the start", "over offline DPO")
    head += ("KL to the anchor, nats", "to the start", "reward − β KL, less offline DPO's", "tokens")
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for references in dict.fromkeys(row["references"] for row in result["cells"]):
        some = [row for row in result["cells"] if row["references"] == references]
        lines.append(_line(references, "start", some[0]["rounds"][0], "", "50", "", ""))
        for row in some:
            own = row["arm"] == BASELINE
            over = "50" if own else "" if row["over_offline"] is None else percent(row["over_offline"])
            goal = "0" if own else "" if row["goal_less_offline"] is None else said(row["goal_less_offline"])
            start = percent(row["over_start"])
            lines.append(_line(references, row["arm"], row["rounds"][-1], f"{row['beta']:g}", start, over, goal))
    return "\n".join(lines)


def _line(references: int, arm: str, at: Mapping[str, Any], beta: str, start: str, offline: str, goal: str) -> str:
    labels = f"{at['labels']:.0f}" if at["labels"] else ""
    cells = [str(references), arm, beta, labels, said(at["reward"]), said(at["gold"]), start, offline]
    return "| " + " | ".join([*cells, said(at["kl"]), said(at["kl_start"]), goal, f"{at['tokens'][0]:.1f}"]) + " |"


def figure(result: Mapping[str, Any], path: Path) -> None:
    """Reward and gold against KL to the anchor, and gold against labels: a row for each number of references.

    A curve for each arm and beta, a mark for each round. Offline DPO on the labels of one round is the first round of `FIRST`.
    """
    import matplotlib.figure

    groups = list(dict.fromkeys(row["references"] for row in result["cells"]))
    drawing = matplotlib.figure.Figure(figsize=(11, 0.4 + 3.2 * len(groups)), layout="constrained")
    panels = drawing.subplots(len(groups), 3, squeeze=False)
    shown = (("kl", "reward"), ("kl", "gold"), ("labels", "gold"))
    words = {"kl": "KL to the references, nats", "labels": "labels", "reward": "reward, which labels", "gold": "gold reward"}
    for references, axes in zip(groups, panels, strict=True):
        some = [row for row in result["cells"] if row["references"] == references]
        for axis, (across, along) in zip(axes, shown, strict=True):
            for row in some:
                _curve(axis, row, some, across, along)
            title = f"{references} reference{'s' if references > 1 else ''}"
            axis.set(xlabel=words[across], ylabel=words[along], title=title)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].legend(frameon=False, fontsize=8)
    drawing.savefig(path, dpi=150, metadata={"Software": None})


def _curve(axis: Any, row: Mapping[str, Any], others: Sequence[Mapping[str, Any]], across: str, along: str) -> None:
    """From the start on, the last policy of each seed as a cross; solid at the largest beta, dotted below it."""
    colour, points, name = COLOURS[row["arm"]], row["rounds"], f"{row['arm']}, β {row['beta']:g}"
    alike = [one for one in others if one["beta"] == row["beta"]]
    if row["arm"] == BASELINE:
        points = [points[0], *(one["rounds"][1] for one in alike if one["arm"] == FIRST), *points[1:]]
    x, y = (np.array([[one[key]] * 3 if key == "labels" else one[key] for one in points]) for key in (across, along))
    style = {"linestyle": "-" if row["beta"] == max(one["beta"] for one in others) else ":", "marker": "o", "markersize": 3.5}
    axis.plot(x[:, 0], y[:, 0], color=colour, linewidth=1.2, label=name, **style)
    ends = [np.abs(values[:, 1:] - values[:, :1]).T for values in (x, y)]
    axis.errorbar(x[:, 0], y[:, 0], xerr=ends[0], yerr=ends[1], linestyle="none", color=colour, elinewidth=0.8)
    if across in NUMBERS:
        axis.plot([s[across] for s in row["by_seed"]], [s[along] for s in row["by_seed"]], "x", color=colour, markersize=4)
