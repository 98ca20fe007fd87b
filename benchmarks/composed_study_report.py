"""What benchmarks/composed_study.py found: numbers with intervals as JSON, Markdown tables and a figure."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from polyref.files import write_bytes
from polyref.objectives.metrics import mean_interval

RESULTS = Path(__file__).parent / "results"
GEOMETRIC = ("rejection", "tokens", "smc", "auto")
COLOURS = {"mixture": "#5f6b7a", "rejection": "#2f6bdb", "tokens": "#d9641e", "smc": "#17876d", "auto": "#a8479b"}


def file(tier: str) -> Path:
    return RESULTS / f"composed_study_{tier}.json"


def write(tier: str, settings: Mapping[str, Any], prompts: int, left_out: int, cells: Mapping[str, Any]) -> None:
    """benchmarks/results/composed_study_TIER.json and .png; the tables also on the terminal."""
    counts = sorted({cell["members"] for cell in cells.values()})
    result = {
        "tier": tier,
        "prompts": prompts,
        "left_out": left_out,
        "settings": settings,
        "members": {str(count): summary({c["method"]: c for c in cells.values() if c["members"] == count}) for count in counts},
        "versions": {package: version(package) for package in ("torch", "transformers", "polyref")},
        "machine": {"processor": platform.machine(), "threads_a_run": 1},
    }
    write_bytes(file(tier), (json.dumps(result, indent=1) + "\n").encode())
    figure({count: {c["method"]: c for c in cells.values() if c["members"] == count} for count in counts}, file(tier))
    print(markdown(result))


def summary(cells: Mapping[str, Any]) -> dict[str, Any]:
    """By method, of one number of members: means over prompts with 95% bootstrap intervals, costs, and agreement about F."""
    return {method: row(cells, method) for method in cells if method != "long"}


def row(cells: Mapping[str, Any], method: str) -> dict[str, Any]:
    cell, found = cells[method], cells[method]["prompts"]
    of = {name: np.array([prompt[name] for prompt in found], dtype=float) for name in ("proposals", "samples", "ess", "calls")}
    shares = of["samples"] / np.maximum(of["proposals"], 1)
    result: dict[str, Any] = {
        "methods": {name: sum(prompt["method"] == name for prompt in found) for name in {prompt["method"] for prompt in found}},
        "proposals": of["proposals"].mean(),
        "samples": of["samples"].mean(),
        "without": int((of["samples"] == 0).sum()),
        "acceptance": list(mean_interval(shares, seed=0)),
        "acceptance_median": float(np.median(shares)),
        "ess": list(mean_interval(of["ess"], seed=0)),
        "distinct": float(np.mean([prompt["distinct"] for prompt in found])),
        "calls": of["calls"].mean(),
        "calls_a_sample": of["calls"].sum() / max(of["samples"].sum(), 1),
        "calls_an_effective": of["calls"].sum() / max(of["ess"].sum(), 1),
        "seconds": cell["seconds"],
        "seconds_a_sample": cell["seconds"] / max(of["samples"].sum(), 1),
    }
    return result | (agreement(cells, method) if method in GEOMETRIC else {})


def agreement(cells: Mapping[str, Any], method: str) -> dict[str, Any]:
    """F by `method`: its mean, its log by prompt, and how it agrees with `rejection` and with `long`.

    `less_rejection` is the mean paired difference of F, 0 in expectation where both are unbiased; `overlap` the share of
    prompts whose intervals have a point in common; `covered` the share whose interval holds the estimate of the long run, which
    has an error of its own.
    """
    mass = masses(cells[method])
    known = np.isfinite(mass[:, 0])
    result: dict[str, Any] = {"mass": list(mean_interval(mass[known, 0], seed=0)), "log_mass": logs(mass)}
    if method != "rejection":
        other = masses(cells["rejection"])
        result["less_rejection"] = list(mean_interval((mass - other)[known, 0], seed=0))
        result["overlap"] = float(np.mean((mass[:, 1] <= other[:, 2]) & (other[:, 1] <= mass[:, 2])))
    if "long" in cells:
        best = masses(cells["long"])[:, 0]
        result["covered"] = float(np.mean((mass[:, 1] <= best) & (best <= mass[:, 2])))
    return result


def masses(cell: Mapping[str, Any]) -> np.ndarray:
    """F of each prompt and its interval, (P, 3)."""
    return np.array([prompt["mass"] for prompt in cell["prompts"]], dtype=float)


def logs(mass: np.ndarray) -> list[list[float | None]]:
    """log F of each prompt with its interval in nats, None where it is not finite."""
    return [[math.log(value) if value > 0 else None for value in prompt] for prompt in mass.tolist()]


def markdown(result: Mapping[str, Any]) -> str:
    """A table for each number of members."""
    tables = []
    for count, rows in result["members"].items():
        title = f"{count} members, {result['prompts']} prompts"
        head = ("Method", "accepted", "median", "samples", "ESS", "distinct", "calls", "calls a sample", "ms a sample")
        more = ("mean F", "F less rejection's", "overlap", "covered")
        lines = [title, "", "| " + " | ".join(head + more) + " |", "| --- " * len(head + more) + "|"]
        tables.append("\n".join([*lines, *(_line(method, row) for method, row in rows.items())]))
    return "\n\n".join(tables)


def _line(method: str, row: Mapping[str, Any]) -> str:
    used = ", ".join(f"{prompts} {name}" for name, prompts in sorted(row["methods"].items()))
    cells = [
        f"{method} ({used})" if len(row["methods"]) > 1 else method,
        _interval(row["acceptance"]),
        f"{row['acceptance_median']:.2f}",
        f"{row['samples']:.1f}",
        _interval(row["ess"], ".1f"),
        f"{row['distinct']:.1f}",
        f"{row['calls']:.0f}",
        f"{row['calls_a_sample']:.0f}",
        f"{1000 * row['seconds_a_sample']:.0f}",
        _interval(row["mass"], ".3f") if "mass" in row else "",
        _interval(row["less_rejection"], "+.3f") if "less_rejection" in row else "",
        f"{100 * row['overlap']:.0f}%" if "overlap" in row else "",
        f"{100 * row['covered']:.0f}%" if "covered" in row else "",
    ]
    return "| " + " | ".join(cells) + " |"


def _interval(values: Sequence[float], form: str = ".2f") -> str:
    mean, low, high = (format(value, form) for value in values)
    return f"{mean} [{low}, {high}]"


def figure(cells: Mapping[int, Mapping[str, Any]], path: Path) -> None:
    """A row for each number of members: log F by prompt with intervals, a prompt's share accepted, effective size."""
    import matplotlib.figure

    drawing = matplotlib.figure.Figure(figsize=(10.5, 3.1 * len(cells)), layout="constrained")
    panels = drawing.subplots(len(cells), 3, squeeze=False, width_ratios=(2.2, 1, 1))
    for (count, by_method), axes in zip(cells.items(), panels, strict=True):
        _agreement(axes[0], by_method)
        axes[0].set_title(f"{count} members: log F, nats", loc="left", fontsize=10)
        shown = [method for method in by_method if method != "long"]
        for axis, title in ((axes[1], "accepted"), (axes[2], "effective size")):
            for place, method in enumerate(shown):
                prompts = by_method[method]["prompts"]
                values = [p["ess"] if axis is axes[2] else p["samples"] / max(p["proposals"], 1) for p in prompts]
                spread = np.random.default_rng(0).uniform(-0.25, 0.25, len(values))
                axis.scatter(values, place + spread, s=4, alpha=0.35, linewidths=0, color=COLOURS[method])
                axis.plot(np.mean(values), place, "|", markersize=16, markeredgewidth=2, color=COLOURS[method])
            axis.set_yticks(range(len(shown)), shown)
            axis.set_ylim(len(shown) - 0.4, -0.6)
            axis.set_xlim(0, None)
            axis.set_title(title, loc="left", fontsize=10)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
    panels[-1][0].set_xlabel("prompts, by the mean estimate of F", fontsize=9)
    drawing.savefig(path.with_suffix(".png"), dpi=150, metadata={"Software": None})


def _agreement(axis: Any, by_method: Mapping[str, Any]) -> None:
    """Estimates of the methods side by side, prompts in the order of their mean; what is below the axis is at its edge."""
    shown = {name: masses(by_method[name]) for name in ("rejection", "tokens", "smc", "long") if name in by_method}
    mean = np.mean([mass[:, 0] for mass in shown.values()], axis=0)
    order = np.argsort(-mean)
    floor = math.log(max(min(float(mean.min()), 0.5) / 4, 1e-4))
    width = 0.8 / len(shown)
    for number, (name, mass) in enumerate(shown.items()):
        with np.errstate(divide="ignore"):
            middle, low, high = np.maximum(np.log(mass[order]), floor).T
        places = np.arange(len(order)) + (number - (len(shown) - 1) / 2) * width
        if name == "long":
            axis.plot(np.arange(len(order)), middle, ".", color="#1d2129", markersize=2.5, label=f"{name} run")
            continue
        axis.vlines(places, low, high, color=COLOURS[name], linewidth=0.7, alpha=0.45)
        axis.plot(places, middle, "o", color=COLOURS[name], markersize=1.8, label=name)
    axis.set_ylim(floor, 0.15)
    axis.set_xticks([])
    axis.legend(fontsize=8, frameon=False, loc="lower left")
