"""Rejection-sampling optimisation in one step and in several, at equal total proposals: reward, KL to the anchor, win rate.

    python benchmarks/multistep_study.py --tier pocket  --pocket runs/pocket --gold MINILM                   # three seeds
    python benchmarks/multistep_study.py --tier smollm2 --pocket runs/pocket --gold MINILM --model SMOLLM2   # one seed
    python benchmarks/multistep_study.py --tier pocket --markdown                                            # the last table

MINILM and SMOLLM2 are as in benchmarks/robust_study.py, whose preparations are taken from --robust_study, or made there: its
gold reward, which only judges here, prompts to train on, and held-out ones. The reward that is raised is a proxy: a regression
on token counts, fitted on labels that gold gave, scaled to a standard deviation of 1 among the completions of a prompt. The
anchor is the geometric composition of two references. Every arm draws as many scored proposals a prompt in all, makes at most
as many pairs of them, and as many updates of the policy (`adapted`: at most as many, where it needs fewer steps). Runs have one
thread each, two at a time; a study that was interrupted goes on where it stopped, and prints first how long it will take.
Writes benchmarks/results/multistep_study_TIER.json and a figure beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OMP_NUM_THREADS", "1")

import multistep_study_report
import numpy as np
import robust_study
import torch
from robust_auxiliary import TokenCountReward
from robust_data import Pool, load_pool, message
from robust_gold import GoldReward
from robust_study import everything, refuse_other_settings
from scipy.special import expit
from transformers import logging as transformers_logging

from polyref import Reference, ReferenceSet
from polyref.cli.loop_settings import LoopPrompts
from polyref.cli.multistep import make_multistep
from polyref.cli.multistep_settings import MultistepSettings
from polyref.cli.settings import LoraSettings
from polyref.files import write_bytes
from polyref.rewards.functions import NamedReward
from polyref.scoring.models import ModelSource, load_tokenizer
from polyref.types import PreferenceRecord, Text

SYSTEM_PROMPTS = {
    "concise": "Be concise: answer in one short sentence.",
    "kind": "Be warm and kind, as to a friend who needs encouragement.",
}
ARMS: Final[Mapping[str, Mapping[str, Any]]] = {
    "RSO": {"steps": 1},
    "2 steps": {"steps": 2},
    "4 steps": {"steps": 4},
    "adapted": {"acceptance": 0.5, "most_steps": 4},
}
"""Equal in 1/beta; the last with the same share of proposals accepted at each, of a quarter of all proposals."""
DEAR = 4
"""Proposals of full length that one exact draw of the references may take; where it takes more, they are drawn as particles."""
MINUTES = {"pocket": 4.0, "smollm2": 12.0}
"""Of one run on one thread of two x86-64 cores, from shorter ones: what the estimate is made from."""


@dataclass(frozen=True)
class Study:
    """What runs share. `prompts` train, `judged` are held out; `proposals` and `pairs` of a prompt, and `updates`, in all."""

    policy: str
    references: tuple[tuple[str, str, str | None], ...]
    gold: str
    prepared: str
    folder: str
    prompts: int
    judged: int
    proposals: int
    pairs: int
    updates: int
    max_new_tokens: int
    learning_rate: float
    batch_size: int
    lora_layers: int | None = None
    beta: float = 0.3
    draws_judged: int = 4

    def settings(self) -> dict[str, Any]:
        """Everything that outcomes depend on, but the names of folders."""
        folders = ("policy", "gold", "prepared", "folder", "references")
        own = {name: value for name, value in asdict(self).items() if name not in folders}
        told = [[name, system_prompt] for name, _, system_prompt in self.references]
        return own | {"references": told, "dear": DEAR, "arms": {arm: dict(given) for arm, given in ARMS.items()}}

    def run_folder(self, arm: str, seed: int) -> Path:
        return Path(self.folder) / f"{arm.replace(' ', '-')}-seed{seed}"


def main() -> None:
    arguments = parse_arguments(__doc__, MINUTES, "runs/multistep_study")
    runs = [(arm, seed) for seed, arm in itertools.product(arguments.seeds, ARMS)]
    conduct(arguments, make_study, run, runs, MINUTES[arguments.tier], multistep_study_report)


def conduct(
    arguments: argparse.Namespace,
    make: Callable[[argparse.Namespace], Any],
    one: Callable[..., None],
    runs: Any,
    each: float,
    report: Any,
) -> None:
    """Take the `runs` that are not done of the study that `make` makes, by `one`, in `each` so many minutes.

    Writes what the module `report` makes of all of them; with --markdown only prints the table of the results there are.
    """
    if arguments.markdown:
        print(report.markdown(json.loads(report.file(arguments.tier).read_text())))
        return
    study = make(arguments)
    Path(study.folder).mkdir(parents=True, exist_ok=True)
    refuse_other_settings(study)
    waiting = [own for own in runs if not (study.run_folder(*own) / "summary.json").exists()]
    minutes = len(waiting) * each / min(arguments.processes, max(len(waiting), 1))
    print(f"{len(waiting)} of {len(runs)} runs to do, about {minutes:.0f} minutes", flush=True)
    prepare(study, arguments)
    everything(one, study, waiting, arguments.processes)
    report.write(arguments.tier, study.settings(), {own: study.run_folder(*own) for own in runs})


def parse_arguments(told: str | None, tiers: Mapping[str, float], output_dir: str) -> argparse.Namespace:
    """The arguments of a study of `tiers`, whose runs are in `output_dir` unless another is named."""
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=tiers, required=True)
    parser.add_argument("--pocket", type=Path, help="folder written by examples/pocket_policy.py")
    parser.add_argument("--gold", help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--model", help="SmolLM2-135M-Instruct: a folder or hub id")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--robust_study", type=Path, default=Path("runs/robust_study"), help="its --output_dir")
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", help="0 1 2, of --tier smollm2 only 0")
    parser.add_argument("--markdown", action="store_true", help="train nothing; print the table of the results there are")
    arguments = parser.parse_args()
    arguments.seeds = arguments.seeds or ([0, 1, 2] if arguments.tier == "pocket" else [0])
    if not arguments.markdown and (arguments.pocket is None or arguments.gold is None):
        parser.error("give --pocket and --gold")
    if not arguments.markdown and arguments.tier == "smollm2" and arguments.model is None:
        parser.error("--tier smollm2 needs --model")
    return arguments


def make_study(arguments: argparse.Namespace) -> Study:
    prepared, folder = str(arguments.robust_study / arguments.tier), str(arguments.output_dir / arguments.tier)
    if arguments.tier == "pocket":
        references = tuple((name, str(arguments.pocket / name), None) for name in ("harmless", "helpful"))
        policy = str(arguments.pocket / "base")
        return Study(policy, references, arguments.gold, prepared, folder, 100, 100, 32, 8, 120, 32, 3e-4, 8)
    told = tuple((name, arguments.model, text) for name, text in SYSTEM_PROMPTS.items())
    return Study(arguments.model, told, arguments.gold, prepared, folder, 32, 40, 16, 4, 48, 24, 5e-4, 4, 8, draws_judged=2)


def prepare(study: Study, arguments: argparse.Namespace) -> None:
    """The preparations of the robust study, and the prompts in the form that multi-step training reads."""
    if not (Path(study.prepared) / "gold.json").exists():
        tier = robust_study.make_tier(argparse.Namespace(**vars(arguments) | {"output_dir": arguments.robust_study}))
        Path(tier.folder).mkdir(parents=True, exist_ok=True)
        robust_study.refuse_other_settings(tier)
        robust_study.prepare(tier, argparse.Namespace(**vars(arguments) | {"output_dir": arguments.robust_study}))
    prompts = load_pool(Path(study.prepared) / "pool.json").prompts
    held_out = json.loads((Path(study.prepared) / "held_out.json").read_text())
    write_prompts(Path(study.folder) / "prompts.jsonl", prompts[: study.prompts])
    write_prompts(Path(study.folder) / "held_out.jsonl", held_out[: study.judged])


def write_prompts(path: Path, prompts: Sequence[Any]) -> None:
    """Conversations without system messages: those are the references'."""
    rows = [json.dumps({"prompt": [turn for turn in prompt if turn["role"] != "system"]}) for prompt in prompts]
    write_bytes(path, ("\n".join(rows) + "\n").encode())


def run(study: Study, arm: str, seed: int) -> None:
    """One arm from start to end: a run folder of `polyref multistep`."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("polyref").setLevel(logging.ERROR)
    parts = ARMS[arm].get("steps") or ARMS[arm]["most_steps"]
    references = (Reference(model, name=name, system_prompt=told) for name, model, told in study.references)
    settings = MultistepSettings(
        output_dir=str(study.run_folder(arm, seed)),
        model=study.policy,
        lora=None if study.lora_layers is None else LoraSettings(last_layers=study.lora_layers),
        references=ReferenceSet(tuple(references)),
        beta=study.beta,
        proposals=study.proposals // parts,
        keep=study.proposals // parts,
        pairs=study.pairs // parts,
        budget=DEAR * len(study.references) * study.max_new_tokens * (study.proposals // parts),
        max_new_tokens=study.max_new_tokens,
        eval_completions=study.draws_judged,
        batch_size=64 if study.lora_layers is None else 32,
        **ARMS[arm],
    )
    own = Path(study.folder)
    prompts = LoopPrompts(data=str(own / "prompts.jsonl"), eval_data=str(own / "held_out.jsonl"))
    training = {
        "learning_rate": study.learning_rate,
        "max_steps": study.updates // parts,
        "per_device_train_batch_size": study.batch_size,
        "warmup_steps": 5,
        "max_length": 512,
        "seed": seed,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    make_multistep(settings, prompts, training, reward=proxy(study), gold=gold(study))


def proxy(study: Study) -> NamedReward:
    """The reward of token counts, from a label of gold's for every pair of the pool."""
    pool = load_pool(Path(study.prepared) / "pool.json")
    fitted = TokenCountReward(load_tokenizer(ModelSource(study.policy)), gold_labelled(pool, seed=0), seed=0)
    flat = [message(text) for pairs in pool.texts for pair in pairs for text in pair]
    rewards = fitted([], flat).view(len(pool.prompts), -1)
    scale = float((rewards - rewards.mean(1, keepdim=True)).std())
    return known("token counts", lambda prompts, completions: fitted(prompts, completions) / scale, fitted.weights / scale)


def gold(study: Study) -> NamedReward:
    fitted = GoldReward(study.gold)
    fitted.weights = np.array(json.loads((Path(study.prepared) / "gold.json").read_text())["weights"])
    return known("gold", fitted, fitted.weights)


def known(name: str, function: Callable[[Sequence[Text], Sequence[Text]], Any], weights: np.ndarray) -> NamedReward:
    """A reward that a run knows again by its weights, up to what another order of sums makes of them."""
    return NamedReward(name, function, json.dumps([f"{value:.3e}" for value in np.quantile(weights, np.linspace(0, 1, 9))]))


def gold_labelled(pool: Pool, seed: int) -> list[PreferenceRecord]:
    """Every pair of the pool, in the order of a label drawn from gold's preference probability."""
    draws = np.random.default_rng(seed).random(pool.gold.shape[:2])
    first = draws < expit(pool.gold[..., 0] - pool.gold[..., 1])
    return [
        PreferenceRecord(prompt, *map(message, pair if wins else pair[::-1]), source="gold", row=number)
        for number, (prompt, pairs, row) in enumerate(zip(pool.prompts, pool.texts, first.tolist(), strict=True), 1)
        for pair, wins in zip(pairs, row, strict=True)
    ]


if __name__ == "__main__":
    main()
