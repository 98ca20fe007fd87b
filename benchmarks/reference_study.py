"""Two references against each alone: held-out preference accuracy and margins on hh-harmless-base.

    python benchmarks/reference_study.py --tier pocket --pocket runs/pocket        # 3 arms x 3 seeds, all pairs
    python benchmarks/reference_study.py --tier smollm2 --model FOLDER_OR_HUB_ID   # 3 arms, 600 pairs, LoRA

Every run is a `polyref train` of its own, as single-thread processes, two at a time; a study that was interrupted goes on where
it stopped. The estimated time is printed first. Writes benchmarks/results/reference_study_TIER.json, and a figure beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from polyref.objectives.metrics import mean_interval

RESULTS = Path(__file__).parent / "results"
SYSTEM_PROMPTS = {
    "careful": "You are a careful assistant. Refuse to help with anything harmful, and say kindly why.",
    "helpful": "You are a helpful assistant. Answer every question as fully as you can.",
}
ARMS = {"both": (0, 1), "first alone": (0,), "second alone": (1,)}
MINUTES = {"pocket": 2.0, "smollm2": 22.0}
"""Of one run on one thread, rounded from runs of `python benchmarks/reference_study.py --tier TIER` two at a time on two x86-64
processor cores: what the estimate printed at the start is made from. Another machine has another speed."""


def main() -> None:
    arguments = parse_arguments()
    runs = list(make_runs(arguments))
    waiting = [run for run in runs if not (run / "summary.json").exists()]
    minutes = len(waiting) * MINUTES[arguments.tier] / min(arguments.processes, max(len(waiting), 1))
    print(
        f"{len(waiting)} of {len(runs)} runs to do, about {minutes:.0f} minutes with {arguments.processes} processes",
        flush=True,
    )
    with ThreadPoolExecutor(arguments.processes) as pool:
        failed = [run for run, ok in zip(waiting, pool.map(train, waiting), strict=True) if not ok]
    if failed:
        raise SystemExit(f"failed: {', '.join(map(str, failed))}; see train.log there, then start the study again")
    report(arguments, runs)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=MINUTES, required=True)
    parser.add_argument("--pocket", type=Path, help="folder written by examples/pocket_policy.py")
    parser.add_argument("--model", help="SmolLM2-135M-Instruct: a folder or hub id")
    parser.add_argument("--data", default="../shared/data/hh-harmless-base/pairs.jsonl.gz")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reference_study"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", help="training seeds; the held-out prompts are the same for all")
    arguments = parser.parse_args()
    arguments.seeds = arguments.seeds or ([0, 1, 2] if arguments.tier == "pocket" else [0])
    if (arguments.pocket if arguments.tier == "pocket" else arguments.model) is None:
        parser.error("--tier pocket needs --pocket, --tier smollm2 needs --model")
    return arguments


def make_runs(arguments: argparse.Namespace) -> Iterator[Path]:
    """Write the settings of every run, and name its folder."""
    for seed in arguments.seeds:
        for arm, members in ARMS.items():
            run = arguments.output_dir / arguments.tier / f"{arm.replace(' ', '-')}-seed{seed}"
            run.mkdir(parents=True, exist_ok=True)
            settings = tier_settings(arguments)
            every = settings.pop("every_reference")
            settings |= {"references": {"members": [every[i] for i in members]}, "seed": seed, "output_dir": str(run)}
            (run / "settings.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
            yield run


def tier_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    common = {
        "data": arguments.data,
        "prompt_format": "transcript",
        "held_out": 300,
        "beta": 0.1,
        "num_train_epochs": 1,
        "warmup_steps": 10,
        "logging_steps": 10,
        "use_cpu": True,
    }
    if arguments.tier == "pocket":
        return common | {
            "model": str(arguments.pocket / "base"),
            "max_length": 512,
            "per_device_train_batch_size": 8,
            "learning_rate": 5e-5,
            "every_reference": [{"model": str(arguments.pocket / n), "name": n} for n in ("harmless", "helpful")],
        }
    return common | {
        "model": arguments.model,
        "held_out": 329,  # 300 and 600 are left once those without a completion token within max_length are dropped
        "limit": 657,
        "max_length": 320,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-4,
        "lora": {"last_layers": 8},
        "every_reference": [{"model": arguments.model, "system_prompt": p, "name": n} for n, p in SYSTEM_PROMPTS.items()],
    }


def train(run: Path) -> bool:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "polyref.cli.main", "train", "--config", str(run / "settings.yaml")]
    with (run / "train.log").open("a") as log:
        ok = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode == 0
    print(f"{run.name}: {'done' if ok else 'FAILED'}", flush=True)
    return ok


def report(arguments: argparse.Namespace, runs: list[Path]) -> None:
    """Accuracy and margin by arm over all seeds: intervals from a bootstrap over prompts, seeds of a pair in one cluster.

    `gain` is the paired difference of accuracy, after less before; `lead over` an arm that of two references less one.
    """
    rows: dict[str, dict[str, Any]] = {}
    correct: dict[tuple[str, str], np.ndarray] = {}
    for arm in ARMS:
        folders = [run for run in runs if run.name.startswith(arm.replace(" ", "-") + "-seed")]
        summaries = [json.loads((run / "summary.json").read_text()) for run in folders]
        rows[arm] = {"references": summaries[0]["references"], "train_pairs": summaries[0]["train_pairs"]}
        for when in ("before", "after"):
            h = np.array([summary[when]["h"] for summary in summaries])
            prompts = np.tile(summaries[0][when]["prompt_ids"], len(summaries))
            correct[arm, when] = (h > 0) + 0.5 * (h == 0)
            rows[arm][when] = {
                "pairs": h.shape[1],
                "accuracy": list(mean_interval(correct[arm, when].ravel(), prompts, seed=0)),
                "accuracy_by_seed": correct[arm, when].mean(1).tolist(),
                "margin": list(mean_interval(h.ravel(), prompts, seed=0)),
            }
        gain = correct[arm, "after"] - correct[arm, "before"]
        rows[arm]["gain"] = list(mean_interval(gain.ravel(), prompts, seed=0))
    for arm in list(ARMS)[1:]:
        lead = correct["both", "after"] - correct[arm, "after"]
        rows["both"][f"lead over {arm}"] = list(mean_interval(lead.ravel(), prompts, seed=0))
    result = {"tier": arguments.tier, "seeds": arguments.seeds, "arms": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"reference_study_{arguments.tier}.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(arguments.tier, rows)
    for arm, row in rows.items():
        print(arm, {when: [f"{v:.3f}" for v in row[when]["accuracy"]] for when in ("before", "after")})


def draw(tier: str, rows: dict[str, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    names = [f"{arm}\n({', '.join(row['references'])})" for arm, row in rows.items()]
    for axes, key, title in ((panels[0], "accuracy", "held-out preference accuracy"), (panels[1], "margin", "held-out margin")):
        for shift, when, colour in ((-0.12, "before", "#8a8f98"), (0.12, "after", "#2a6fdb")):
            mean, low, high = np.array([row[when][key] for row in rows.values()]).T
            places = np.arange(len(names)) + shift
            axes.errorbar(
                mean, places, xerr=[mean - low, high - mean], fmt="o", color=colour, capsize=3, label=f"{when} training"
            )
        axes.set_yticks(range(len(names)), names if axes is panels[0] else [""] * len(names))
        axes.invert_yaxis()
        axes.set_title(title, loc="left")
        axes.axvline(0.5 if key == "accuracy" else 0.0, color="#8a8f98", linewidth=0.8, linestyle=(0, (3, 3)))
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(RESULTS / f"reference_study_{tier}.png", dpi=150)


if __name__ == "__main__":
    main()
