"""Variance-reduced training on people's votes: pandalm-human (three votes a pair, some split, some ties) and mt-bench-human.

    python benchmarks/human_votes_study.py --pocket runs/pocket      # 6 arms x 3 seeds, pocket policy

Auxiliary pairs come from the replies to the same prompt (human_votes.py), g from their surface (surface_preferences.py),
cross-fitted on the training votes of its set. Every run is a `polyref train` of its own, as single-thread processes, two at a
time; a study that was interrupted goes on where it stopped. The estimated time is printed first. Writes
benchmarks/results/human_votes_study.json, and a figure beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a process is a thread here

import numpy as np
import torch
import yaml
from human_votes import Side, Vote, auxiliary_pairs, by_majority, load_votes
from human_votes_measures import describe, draw, factor, interval, length, per_vote
from surface_preferences import fit_surface_preferences

from polyref.data.records import record_to_row
from polyref.data.sources import prompt_key
from polyref.data.tokenize import tokenize_records
from polyref.files import write_bytes
from polyref.objectives.variance_reduced import optimal_control
from polyref.references.reference_set import Reference
from polyref.rewards.auxiliary_columns import comparisons, with_auxiliary
from polyref.rewards.cross_fit import cross_fit
from polyref.scoring.models import ModelSource, load_tokenizer
from polyref.training.config import PreferenceConfig
from polyref.training.preference_trainer import PreferenceTrainer
from polyref.types import PreferenceRecord

RESULTS = Path(__file__).parent / "results"
ARMS = {  # the label of a pair, and the objective
    "sigmoid, majority": ("majority", "plain"),
    "sigmoid, shares": ("share", "plain"),
    "variance reduced, majority": ("majority", "variance_reduced"),
    "variance reduced, shares": ("share", "variance_reduced"),
}
SETS = {"pandalm-human": tuple(ARMS), "mt-bench-human": ("sigmoid, majority", "variance reduced, majority")}
TRAIN_PAIRS = 400
"""At most so many pairs of a set are trained on, drawn at random; g and the pools know all training pairs."""
BASELINE = "sigmoid, majority"
AUXILIARY, FOLDS, RIDGE = 4, 5, 0.1
TRAINING = {
    "beta": 0.1,
    "max_length": 512,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-5,
    "num_train_epochs": 1,
    "warmup_steps": 10,
    "logging_steps": 10,
    "use_cpu": True,
}
MINUTES = {"plain": 0.7, "variance_reduced": 2.0}
"""Of one run on one thread, rounded from runs of `python benchmarks/human_votes_study.py` two at a time on two x86-64 processor
cores: what the estimate printed at the start is made from. Another machine has another speed."""


class Run(NamedTuple):
    name: str
    arm: str
    seed: int
    folder: Path


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(words)
    torch.set_num_threads(1)
    runs = list(make_runs(arguments))
    waiting = [run for run in runs if not (run.folder / "summary.json").exists()]
    minutes = sum(MINUTES[ARMS[run.arm][1]] for run in waiting) / arguments.processes
    print(f"{len(waiting)} of {len(runs)} runs to do, about {minutes:.0f} minutes, {arguments.processes} processes", flush=True)
    sides = {name: prepare(arguments, name) for name in SETS}
    with ThreadPoolExecutor(arguments.processes) as pool:
        failed = [str(run.folder) for run, ok in zip(waiting, pool.map(train, waiting), strict=True) if not ok]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; see train.log there, then start the study again")
    report(arguments, sides, runs)


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pocket", type=Path, required=True, help="folder written by examples/pocket_policy.py")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/human_votes_study"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds; data and g are the same for all"
    )
    return parser.parse_args(words)


def make_runs(arguments: argparse.Namespace) -> Iterator[Run]:
    """Write the settings of every run, and name its folder."""
    for name, arms in SETS.items():
        for seed in arguments.seeds:
            for arm in arms:
                label, objective = ARMS[arm]
                folder = arguments.output_dir / name / f"{arm.replace(', ', '-').replace(' ', '-')}-seed{seed}"
                settings = TRAINING | {
                    "model": str(arguments.pocket / "base"),
                    "data": str(arguments.output_dir / f"{name}-{label}.jsonl"),
                    "eval_data": str(arguments.output_dir / f"{name}-held-out.jsonl"),
                    "objective": objective,
                    "seed": seed,
                    "output_dir": str(folder),
                }
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "settings.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
                yield Run(name, arm, seed, folder)


def prepare(arguments: argparse.Namespace, name: str) -> tuple[Side, Side]:
    """(training, held out) of set `name`, with g of shares; the files of its runs are written. g sees no held-out vote."""
    tokenizer = load_tokenizer(ModelSource(str(arguments.pocket / "base")))

    def fitting(votes: list[Vote]) -> list[Vote]:
        """Those whose prompt leaves room for a completion: the same pairs for every arm."""
        found = tokenize_records([vote.record for vote in votes], tokenizer, max_length=TRAINING["max_length"])
        kept = set(map(id, found.records))
        return [vote for vote in votes if id(vote.record) in kept]

    votes = [fitting(side) for side in load_votes(arguments.data, name)]
    auxiliary = [auxiliary_pairs(side, AUXILIARY, seed=number) for number, side in enumerate(votes)]
    records = [[vote.record for vote in side] for side in votes]
    asked = [pair for side, drawn in zip(records, auxiliary, strict=True) for pair in comparisons(side, drawn)]

    def predicted(labelled: list[PreferenceRecord]) -> tuple[torch.Tensor, ...]:
        """g of the pairs of each side, fitted on labels as the arm records them."""
        fit = partial(fit_surface_preferences, ridge=RIDGE)
        fitted = cross_fit(labelled, lambda others, _: fit(others), folds=FOLDS, seed=0, pairs=asked)
        return fitted.probability.view(-1, 1 + AUXILIARY).split([len(side) for side in records])

    train, held_out = map(Side, votes, auxiliary, predicted(records[0]))
    by_label = Side(votes[0], auxiliary[0], predicted(list(map(by_majority, votes[0])))[0])
    rows = sorted(random.Random(0).sample(range(len(votes[0])), min(TRAIN_PAIRS, len(votes[0]))))
    for label, trained in (("share", train.take(rows)), ("majority", by_label.take(rows))):
        labelled = trained.records if label == "share" else list(map(by_majority, trained.votes))
        ready = with_auxiliary(labelled, trained.auxiliary, trained.g.flatten())
        write_rows(arguments.output_dir / f"{name}-{label}.jsonl", ready)
    write_rows(arguments.output_dir / f"{name}-held-out.jsonl", held_out.records)
    return train, held_out


def write_rows(file: Path, records: Sequence[PreferenceRecord]) -> None:
    write_bytes(file, "".join(json.dumps(record_to_row(record)) + "\n" for record in records).encode())


def train(run: Run) -> bool:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "polyref.cli.main", "train", "--config", str(run.folder / "settings.yaml")]
    with (run.folder / "train.log").open("a") as log:
        ok = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode == 0
    print(f"{run.name}, {run.folder.name}: {'done' if ok else 'FAILED'}", flush=True)
    return ok


def report(arguments: argparse.Namespace, sides: dict[str, tuple[Side, Side]], runs: Sequence[Run]) -> None:
    """What is said of held-out votes: intervals from a bootstrap over prompts, the seeds of a pair in one cluster."""
    sets = {}
    for name, (training, held_out) in sides.items():
        h = {
            arm: np.stack([implied(arguments, run, held_out) for run in runs if (run.name, run.arm) == (name, arm)])
            for arm in SETS[name]
        }
        values = {arm: per_vote(differences[:, :, 0], held_out) for arm, differences in h.items()}
        arms: dict[str, dict[str, Any]] = {}
        for arm in SETS[name]:
            arms[arm] = {key: interval(value, held_out) for key, value in values[arm].items()}
            arms[arm]["agreement by seed"] = np.nanmean(values[arm]["agreement"], 1).tolist()
            if arm != BASELINE:
                less = {key: value - values[BASELINE][key] for key, value in values[arm].items()}
                arms[arm][f"less {BASELINE}"] = {key: interval(value, held_out) for key, value in less.items()}
            if ARMS[arm][1] == "variance_reduced":
                arms[arm]["factor"] = {
                    f"c = {c:g}": factor(h[arm], held_out, ARMS[arm][0], c) for c in (1.0, optimal_control(AUXILIARY))
                }
        longer = np.array([length(vote.record.chosen) - length(vote.record.rejected) for vote in held_out.votes])
        sets[name] = {
            "training": describe(training),
            "held out": describe(held_out)
            | {"longer reply": interval(per_vote(longer[None], held_out)["agreement"], held_out)},
            "arms": arms,
        }
    settings = {name: value for name, value in TRAINING.items() if name != "use_cpu"} | {"ridge": RIDGE}
    result = {
        "seeds": arguments.seeds,
        "auxiliary pairs": AUXILIARY,
        "folds": FOLDS,
        "trained on at most": TRAIN_PAIRS,
        "settings": settings,
        "sets": sets,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "human_votes_study.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(sets, RESULTS / "human_votes_study.png")
    for name, row in sets.items():
        for arm, numbers in row["arms"].items():
            print(f"{name}, {arm}:", {key: [f"{v:.3f}" for v in numbers[key]] for key in ("agreement", "log loss")})


def implied(arguments: argparse.Namespace, run: Run, side: Side) -> np.ndarray:
    """The reward difference that the trained policy implies for each vote and its auxiliary pairs: (N, 1 + M).

    Under reverse KL it is a difference of two rewards, so that each reply is scored once, against the first of its prompt.
    """
    pairs = [tuple(map(prompt_key, pair)) for pair in comparisons(side.records, side.auxiliary)]
    replies: dict[str, list[str]] = {}
    for prompt, *both in pairs:
        known = replies.setdefault(prompt, [])
        known += [reply for reply in both if reply not in known]
    asked = [(prompt, reply, known[0]) for prompt, known in replies.items() for reply in known[1:]]
    records = [PreferenceRecord(*map(json.loads, texts)) for texts in asked]
    with TemporaryDirectory() as folder:
        settings = PreferenceConfig(output_dir=folder, report_to="none", disable_tqdm=True, **TRAINING)
        reference = Reference(str(arguments.pocket / "base"))
        trainer = PreferenceTrainer(str(run.folder / "model"), reference, settings, eval_dataset=records)
        h = np.asarray(trainer.predict(trainer.eval_dataset).predictions, dtype=np.float64)
    reward = {(prompt, known[0]): 0.0 for prompt, known in replies.items()}
    reward |= {(prompt, reply): float(value) for (prompt, reply, _), value in zip(asked, h, strict=True)}
    differences = [reward[prompt, first] - reward[prompt, second] for prompt, first, second in pairs]
    return np.reshape(differences, (len(side.votes), -1))


if __name__ == "__main__":
    main()
