"""Training in rounds against offline DPO on as many labels, with and without an enhancer, with one reference and with three.

    python benchmarks/iterate_study.py --tier pocket  --pocket runs/pocket --gold MINILM                   # three seeds
    python benchmarks/iterate_study.py --tier smollm2 --pocket runs/pocket --gold MINILM --model SMOLLM2   # one seed
    python benchmarks/iterate_study.py --tier pocket --markdown                                            # the last table

MINILM and SMOLLM2 are as in benchmarks/robust_study.py, whose preparations are taken from --robust_study, or made there: its
gold reward, which only judges here, prompts to train on, and held-out ones. The reward that labels is a proxy: of the pocket
policy the regression on token counts of benchmarks/multistep_study.py, of SmolLM2 a lexicon's sentiment (the extra
`sentiment`). Every arm asks about the same prompts, draws and scores as many completions of each, labels as many pairs, and
makes as many updates; what differs is who draws, and when. Offline DPO draws everything from the start; rounds take fresh
prompts, in equal batches, and train on the pairs of all rounds so far. Runs have one thread each, two at a time; a study that
was interrupted goes on where it stopped, and prints first how long it will take. Writes
benchmarks/results/iterate_study_TIER.json and a figure beside it.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OMP_NUM_THREADS", "1")

import iterate_study_report
import multistep_study
import torch
from multistep_study import conduct, gold, parse_arguments, proxy
from transformers import logging as transformers_logging

from polyref import Reference, ReferenceSet
from polyref.cli.iterate import make_iterate
from polyref.cli.iterate_settings import EnhancerSettings, IterateSettings
from polyref.cli.loop_settings import LoopPrompts
from polyref.cli.settings import LoraSettings
from polyref.rewards.functions import NamedReward
from polyref.rewards.rules import rule

SYSTEM_PROMPTS = multistep_study.SYSTEM_PROMPTS | {"careful": "Answer carefully, and say when you are not sure."}
ENHANCER: Final[Mapping[str, Any]] = {"who": "start", "stays": "worst"}
"""Who draws half of each round's completions: the policy before round 1, of whose completions the worst stays."""
OFFLINE, ONLINE, ENHANCED = "offline", "rounds", "rounds, enhancer"
Cell = tuple[str, int, float]
"""An arm, the number of its references, and its beta."""
GRIDS: Final[Mapping[str, tuple[Cell, ...]]] = {
    "pocket": tuple(itertools.product((OFFLINE, ONLINE, ENHANCED), (1, 3), (0.3, 0.1))),
    "smollm2": ((ENHANCED, 3, 0.3), (OFFLINE, 3, 0.3)),
}
MINUTES = {"pocket": 2.0, "smollm2": 20.0}
"""Of one run on one thread of two x86-64 cores, from shorter ones: what the estimate is made from."""


@dataclass(frozen=True)
class Study:
    """What runs share. `prompts` train, in `rounds` equal batches, `judged` are held out; `references` are the three, of which
    K = 1 has the first. `completions` and `pairs` of a prompt, and `updates`, are those of every arm.

    `sentiment`: what the lexicon's sentiment is multiplied by; None for the proxy of token counts.
    """

    policy: str
    references: tuple[tuple[str, str, str | None], ...]
    gold: str
    prepared: str
    folder: str
    prompts: int
    judged: int
    rounds: int
    completions: int
    pairs: int
    updates: int
    max_new_tokens: int
    learning_rate: float
    batch_size: int
    lora_layers: int | None = None
    sentiment: float | None = None
    draws_judged: int = 2

    def settings(self) -> dict[str, Any]:
        """Everything that outcomes depend on, but the names of folders."""
        folders = ("policy", "gold", "prepared", "folder", "references")
        own = {name: value for name, value in asdict(self).items() if name not in folders}
        told = [[name, system_prompt] for name, _, system_prompt in self.references]
        return own | {"references": told, "enhancer": dict(ENHANCER)}

    def run_folder(self, arm: str, members: int, beta: float, seed: int) -> Path:
        return Path(self.folder) / f"{arm.replace(', ', '-')}-{members}-beta{beta:g}-seed{seed}"


def main() -> None:
    arguments = parse_arguments(__doc__, MINUTES, "runs/iterate_study")
    runs = [(*cell, seed) for seed, cell in itertools.product(arguments.seeds, GRIDS[arguments.tier])]
    conduct(arguments, make_study, run, runs, MINUTES[arguments.tier], iterate_study_report)


def make_study(arguments: argparse.Namespace) -> Study:
    prepared, folder = str(arguments.robust_study / arguments.tier), str(arguments.output_dir / arguments.tier)
    if arguments.tier == "pocket":
        references = tuple((name, str(arguments.pocket / name), None) for name in ("base", "harmless", "helpful"))
        policy = str(arguments.pocket / "base")
        return Study(policy, references, arguments.gold, prepared, folder, 300, 150, 3, 8, 2, 120, 32, 3e-4, 8)
    told = tuple((name, arguments.model, text) for name, text in SYSTEM_PROMPTS.items())
    own = {"lora_layers": 8, "sentiment": 3.0}
    return Study(arguments.model, told, arguments.gold, prepared, folder, 64, 32, 4, 4, 2, 80, 24, 1e-3, 4, **own)


def run(study: Study, arm: str, members: int, beta: float, seed: int) -> None:
    """One arm from start to end: a run folder of `polyref iterate`."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("polyref").setLevel(logging.ERROR)
    rounds, own, other = (1 if arm == OFFLINE else study.rounds), study.completions, None
    if arm == ENHANCED:
        own, other = own // 2, EnhancerSettings(**ENHANCER, completions=own - own // 2)
    references = [Reference(model, name=name, system_prompt=told) for name, model, told in study.references[:members]]
    settings = IterateSettings(
        output_dir=str(study.run_folder(arm, members, beta, seed)),
        model=study.policy,
        lora=None if study.lora_layers is None else LoraSettings(last_layers=study.lora_layers),
        references=ReferenceSet(tuple(references)),
        beta=beta,
        rounds=rounds,
        prompts_per_round=study.prompts // rounds,
        completions=own,
        enhancer=other,
        pairs=study.pairs,
        max_new_tokens=study.max_new_tokens,
        patience=None,
        eval_completions=study.draws_judged,
        batch_size=64 if study.lora_layers is None else 32,
    )
    folder = Path(study.folder)
    prompts = LoopPrompts(data=str(folder / "prompts.jsonl"), eval_data=str(folder / "held_out.jsonl"))
    training = {
        "learning_rate": study.learning_rate,
        "max_steps": study.updates // rounds,
        "per_device_train_batch_size": study.batch_size,
        "warmup_steps": 5,
        "max_length": 512,
        "seed": seed,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    reward = proxy(study) if study.sentiment is None else sentiment(study.sentiment)
    make_iterate(settings, prompts, training, reward=reward, gold=gold(study))


def sentiment(scale: float) -> NamedReward:
    """VADER's sentiment of a completion, times `scale`: soft labels are surer."""
    found = rule("rule:sentiment")
    return NamedReward("sentiment", lambda *texts: scale * found(*texts), f"{scale:g} x {found.fingerprint}")


if __name__ == "__main__":
    main()
