"""What variance reduction costs against plain training, as M and the model grow, with references scored once or in every step.

    python benchmarks/variance_reduced_cost.py             # on a quiet machine: at most 10 minutes
    python benchmarks/variance_reduced_cost.py --quick     # two small models, M = 1 and 4: under a minute, into runs/
    python benchmarks/variance_reduced_cost.py --markdown  # the tables of docs/training.md, from the last results

Ratios of a step of the trainer with M auxiliary pairs a prompt to a plain one, on Llamas of random weights, float32 on one
thread: operations (counted as they run, beside a model of them), seconds (the two take turns in one process; a ratio is of one
turn), and what a process of its own holds at most beyond what it held before there was a model. The estimated time is printed
first. Writes variance_reduced_cost.json, and a figure beside it.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: all that is measured runs on one thread

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import step_cost
import torch
from conductor import conditions, keep
from step_cost import Case, operations

NAME = "variance_reduced_cost"
PRELOADED = ["polyref.training.preference_trainer", "polyref.cli.settings", "transformers.models.llama.modeling_llama", "peft"]
RESULTS = Path(__file__).parent / "results"
SMOLLM2 = Case("135M", 576, 1536, 30, 9, 3, 49152, batch=1, rounds=2, prompt=64, completion=32)
CASES = (
    Case("1M", 128, 384, 4, 4, 2, 2048, batch=2, rounds=6),
    Case("10M", 320, 864, 6, 5, 5, 8192, batch=1, rounds=3),
    Case("10M, short prompt", 320, 864, 6, 5, 5, 8192, batch=1, rounds=3, prompt=16),
    Case("50M", 512, 1536, 12, 8, 8, 16384, batch=1, rounds=2),
    SMOLLM2,
    replace(SMOLLM2, name="135M, LoRA on 8 layers", lora_layers=8),
)
QUICK = tuple(replace(case, batch=1, rounds=2, every=(0, 1, 4)) for case in CASES[:2])
INK, GRID = "#1d2129", "#dcdfe3"
SERIES = ("#2f6bdb", "#d9641e", "#17876d", "#a8479b", "#b08a00", "#5f6b7a")
COLOURED = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor", "grid.color")
"""The colours of the report page in the light, which its style leaves open."""

START_SECONDS, PROCESS_SECONDS, SHARE_OF_RATE = 8.0, 0.7, 0.5
"""Of the estimate: seconds until the first process and until each other begins, and a step's share of the matrix rate."""


def main() -> None:
    arguments = parse_arguments()
    file = arguments.output_dir / f"{NAME}.json"
    if arguments.markdown:
        if not file.exists():
            raise SystemExit(f"{file} is not there: measure first, without --markdown")
        print(markdown(json.loads(file.read_text())))
        return
    cases = QUICK if arguments.quick else CASES
    print(f"about {estimate(cases, matrix_rate()) / 60:.1f} minutes; keep the machine quiet", flush=True)
    start = time.perf_counter()
    measured = {}
    for case in cases:
        peaks = {pairs: in_a_process(step_cost.alone, case, pairs) for pairs in case.every}
        timings = in_a_process(step_cost.in_turn, case)
        measured[case.name] = asdict(case) | {"parameters": case.parameters, "steps": summary(case, peaks, timings)}
        print(f"{case.name}: done after {time.perf_counter() - start:.0f} s", flush=True)
    result = {
        "command": f"python benchmarks/{NAME}.py" + (" --quick" if arguments.quick else ""),
        **conditions(1, "torch", "transformers", "peft", "polyref"),
        "minutes": (time.perf_counter() - start) / 60,
        "cases": measured,
    }
    keep(result, file)
    draw(result, file.with_suffix(".png"))
    print(markdown(result))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small models, M = 1 and 4")
    parser.add_argument("--markdown", action="store_true", help="measure nothing; print the tables of the results there are")
    parser.add_argument("--output_dir", type=Path, help="benchmarks/results; with --quick, runs/variance_reduced_cost")
    arguments = parser.parse_args()
    arguments.output_dir = arguments.output_dir or (Path("runs") / NAME if arguments.quick else RESULTS)
    return arguments


def matrix_rate() -> float:
    """Operations a second of a float32 matrix product, on one thread, now."""
    torch.set_num_threads(1)
    a, rates = torch.randn(1024, 1024), []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        rates.append(2 * 1024**3 / (time.perf_counter() - start))
    return statistics.median(rates)


def estimate(cases: Sequence[Case], rate: float) -> float:
    """Seconds of a run: the modelled operations of every step and scoring, at a share of the matrix rate."""
    seconds = START_SECONDS
    for case in cases:
        once = sum(operations(case, pairs)[part] for pairs in case.every for part in ("step", "score"))
        seconds += (case.rounds + 1) * once / (SHARE_OF_RATE * rate) + PROCESS_SECONDS * (len(case.every) + 1)
    return seconds


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run in a fresh process; all are forked from one that has loaded what they need, and holds no model."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def summary(
    case: Case, peaks: dict[int, dict[str, float]], timings: dict[int, list[dict[str, float]]]
) -> dict[str, dict[str, Any]]:
    """By M: what was measured of a step, and what follows from it, as ratios to plain training with its references cached.

    Scored once, an epoch costs its steps, and there is one epoch of scoring, and of the cache, before; otherwise every epoch
    scores. So caching is paid for after 1 + cache/score epochs. `one_off_epochs` is what auxiliary completions add to the
    scoring before training, in epochs of plain training.
    """
    plain, rows = timings[0], {}
    held = {pairs: values["peak_mib"] - values["held_mib"] for pairs, values in peaks.items()}
    for pairs, turns in timings.items():
        model, tokens = operations(case, pairs), operations(case, 0)
        together = list(zip(turns, plain, strict=True))
        rows[str(pairs)] = peaks[pairs] | {
            "modelled_step_operations": model["step"],
            "modelled_score_operations": model["score"],
            "seconds": spread([turn["step"] for turn in turns]),
            "score_seconds": spread([turn["score"] for turn in turns]),
            "cache_seconds": turns[0]["cache"],
            "ratios": {
                "tokens": model["tokens"] / tokens["tokens"],
                "modelled": model["step"] / tokens["step"],
                "counted": peaks[pairs]["step_operations"] / peaks[0]["step_operations"],
                "seconds": spread([turn["step"] / other["step"] for turn, other in together]),
                "seconds_uncached": spread([(turn["score"] + turn["step"]) / other["step"] for turn, other in together]),
                "memory": held[pairs] / held[0],
                "memory_uncached": (held[pairs] + peaks[pairs]["reference_mib"]) / held[0],
            },
            "one_off_epochs": spread([(turn["score"] - other["score"]) / other["step"] for turn, other in together]),
            "paid_after_epochs": 1 + turns[0]["cache"] / statistics.median(turn["score"] for turn in turns),
        }
    return rows


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "count": len(values)}


def markdown(result: dict[str, Any]) -> str:
    """Two tables: every plain step in units, and every other one as ratios to it."""
    plain = [
        "| model | weights | batch | prompt + completions, tokens | plain step | operations | held | uncached: seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    ratios = [
        "| model | M | tokens | operations modelled | counted | seconds [range] | memory | uncached: seconds | "
        "uncached: memory | scoring before, in plain epochs | cache paid after epochs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, case in result["cases"].items():
        for pairs, row in case["steps"].items():
            if pairs == "0":
                lengths = f"{case['prompt']} + 2 of {case['completion']}"
                seconds, held = row["seconds"]["median"], row["peak_mib"] - row["held_mib"]
                plain.append(
                    f"| {name} | {case['parameters'] / 1e6:.1f} M | {case['batch']} | {lengths} | {seconds:.3g} s "
                    f"| {row['step_operations'] / 1e9:.3g} G | {held:,.0f} MiB "
                    f"| {row['ratios']['seconds_uncached']['median']:.2f} |"
                )
                continue
            r = row["ratios"]
            seconds = f"{r['seconds']['median']:.2f} [{r['seconds']['low']:.2f}, {r['seconds']['high']:.2f}]"
            cells = [r["tokens"], r["modelled"], r["counted"], seconds, r["memory"], r["seconds_uncached"]["median"]]
            cells += [r["memory_uncached"], row["one_off_epochs"]["median"], f"{row['paid_after_epochs']:.3f}"]
            ratios.append(f"| {name} | {pairs} | " + " | ".join(c if isinstance(c, str) else f"{c:.2f}" for c in cells) + " |")
    return "\n".join([*plain, "", *ratios])


def draw(result: dict[str, Any], file: Path) -> None:
    """Seconds (with their range) and memory against M by model, references scored once or in every step; tokens beside them."""
    import matplotlib.figure
    import matplotlib.lines
    import matplotlib.style

    from polyref.report import figures

    style = figures.STYLE | {name: GRID if "grid" in name or "edge" in name else INK for name in COLOURED}
    with matplotlib.style.context(["default", style]):
        figure = matplotlib.figure.Figure(figsize=(9, 4.2), layout="constrained")
        panels = figure.subplots(1, 2)
        for (name, case), colour in zip(result["cases"].items(), SERIES, strict=False):
            every = [int(pairs) for pairs in case["steps"]]
            ratios = [row["ratios"] for row in case["steps"].values()]
            for axes, key in zip(panels, ("seconds", "memory"), strict=True):
                for suffix, dashes in (("", "-"), ("_uncached", ":")):
                    values = [r[key + suffix]["median"] if key == "seconds" else r[key + suffix] for r in ratios]
                    axes.plot(every, values, dashes, color=colour, marker="o", markersize=4, label="" if suffix else name)
            ends = ([r["seconds"][end] for r in ratios] for end in ("low", "high"))
            panels[0].fill_between(every, *ends, color=colour, alpha=0.18, linewidth=0)
        first = next(iter(result["cases"].values()))
        tokens = [row["ratios"]["tokens"] for row in first["steps"].values()]
        for axes, title in zip(panels, ("seconds of a step, plain = 1", "peak memory of training, plain = 1"), strict=True):
            axes.plot(
                every, tokens, color=INK, linewidth=0.8, dashes=(3, 3), alpha=0.6, label=f"tokens, prompt {first['prompt']}"
            )
            axes.set(xticks=every, xlabel="M, auxiliary pairs a prompt", ylim=(0, None))
            axes.set_title(title, loc="left", size=9)
        handles, labels = panels[0].get_legend_handles_labels()
        for dashes, label in (("-", "references scored once, cached"), (":", "references in every step")):
            handles, labels = [*handles, matplotlib.lines.Line2D([], [], color=INK, linestyle=dashes)], [*labels, label]
        figure.legend(handles, labels, loc="outside upper left", ncols=3, handlelength=2.4)
        figure.savefig(file, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
