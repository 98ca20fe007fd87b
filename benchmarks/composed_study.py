"""Drawing from composed references: what each method accepts, what its samples are worth, what it says of F, what it costs.

    python benchmarks/composed_study.py --tier pocket  --pocket runs/pocket      # 2 and 3 policies, every prompt that fits
    python benchmarks/composed_study.py --tier smollm2 --model FOLDER_OR_HUB_ID  # 2 and 3 system prompts, 30 prompts
    python benchmarks/composed_study.py --tier pocket --markdown                 # the tables of the last run

Prompts are those of pandalm-human, which comes with the library. Each method makes 16 proposals a prompt (`smc`: particles) of
at most 24 tokens; `auto` is asked for 8 samples within the calls that 16 such proposals can take. Each is a process of one
thread, two at a time; a study that was interrupted goes on where it stopped, and prints first how long it will take. Writes
benchmarks/results/composed_study_TIER.json and a figure beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OMP_NUM_THREADS", "1")

import composed_study_report
import torch
from robust_data import as_prompts
from robust_study import everything, refuse_other_settings
from transformers import logging as transformers_logging

from polyref import Reference, ReferenceSet
from polyref.data.sources import by_prompt, load_packaged
from polyref.errors import DataError
from polyref.files import write_bytes
from polyref.samplers.composed import draw_composed
from polyref.samplers.composed_values import Drawn
from polyref.samplers.engine import SamplingParameters
from polyref.samplers.members import Members, load_members
from polyref.types import Text

SYSTEM_PROMPTS = {
    "concise": "Be concise: answer in one short sentence.",
    "kind": "Be warm and kind, as to a friend who needs encouragement.",
    "formal": "Write formally and precisely, as in a letter to an authority.",
}
POCKET = ("base", "harmless", "helpful")
COUNTS = (2, 3)
PROPOSALS, ASKED, LONG, TOKENS, SEED = 16, 8, 128, 24, 0
"""A prompt's proposals; samples that `auto` is asked for; particles of `long`, from which F is known better."""

METHODS: Final[Mapping[str, Mapping[str, Any]]] = {
    "mixture": {"n": PROPOSALS, "fixed": True},
    "rejection": {"n": PROPOSALS, "fixed": True},
    "tokens": {"n": PROPOSALS, "fixed": True},
    "smc": {"n": PROPOSALS},
    "auto": {"n": ASKED},
    "long": {"n": LONG, "method": "smc"},
}
GRIDS = {"pocket": tuple(METHODS), "smollm2": ("rejection", "tokens", "smc", "auto")}
"""Of SmolLM2 no mixture: with one seed its samples are the proposals of `rejection`, all of them kept."""
LIMITS = {"pocket": None, "smollm2": 30}
RATES = {"pocket": 3000.0, "smollm2": 110.0}
"""Completion tokens through models a second, on one thread of two x86-64 cores: what the estimate is made from."""


@dataclass(frozen=True)
class Study:
    """What cells share: models with names and system prompts, the most K first of which are composed; a folder for outcomes."""

    models: tuple[str, ...]
    names: tuple[str, ...]
    system_prompts: tuple[str | None, ...]
    folder: str
    batch_size: int = 32

    def settings(self) -> dict[str, Any]:
        """Everything that outcomes depend on, but the names of folders."""
        own = {"names": self.names, "system_prompts": self.system_prompts, "batch_size": self.batch_size}
        return own | {"max_new_tokens": TOKENS, "seed": SEED, "methods": {name: dict(given) for name, given in METHODS.items()}}

    def file(self, members: int, method: str) -> Path:
        return Path(self.folder) / f"{members}-{method}.json"

    def members(self, count: int, composition: Any = "geometric") -> Members:
        rows = zip(self.models[:count], self.names, self.system_prompts, strict=False)
        references = (Reference(model, name=name, system_prompt=told) for model, name, told in rows)
        return load_members(ReferenceSet(tuple(references), composition=composition))


def main() -> None:
    arguments = parse_arguments()
    if arguments.markdown:
        print(composed_study_report.markdown(json.loads(composed_study_report.file(arguments.tier).read_text())))
        return
    study = make_study(arguments)
    Path(study.folder).mkdir(parents=True, exist_ok=True)
    refuse_other_settings(study)
    cells = list(itertools.product(COUNTS, GRIDS[arguments.tier]))
    waiting = [cell for cell in cells if not study.file(*cell).exists()]
    prompts, left_out = chosen_prompts(study, LIMITS[arguments.tier])
    calls = len(prompts) * sum(members * (LONG if method == "long" else PROPOSALS) * TOKENS for members, method in waiting)
    minutes = calls / RATES[arguments.tier] / 60 / arguments.processes
    print(f"{len(waiting)} of {len(cells)} cells to do, at most about {minutes:.0f} minutes", flush=True)
    waiting.sort(key=lambda cell: -cell[0] * METHODS[cell[1]]["n"])  # the longest first
    everything(draw, study, waiting, arguments.processes)
    found = {f"{members} {method}": json.loads(study.file(members, method).read_text()) for members, method in cells}
    composed_study_report.write(arguments.tier, study.settings(), len(prompts), left_out, found)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=GRIDS, required=True)
    parser.add_argument("--pocket", type=Path, help="folder written by examples/pocket_policy.py")
    parser.add_argument("--model", help="SmolLM2-135M-Instruct: a folder or hub id")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/composed_study"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--markdown", action="store_true", help="draw nothing; print the tables of the results there are")
    arguments = parser.parse_args()
    if not arguments.markdown and (arguments.pocket if arguments.tier == "pocket" else arguments.model) is None:
        parser.error("--tier pocket needs --pocket, --tier smollm2 needs --model")
    return arguments


def make_study(arguments: argparse.Namespace) -> Study:
    folder = str(arguments.output_dir / arguments.tier)
    if arguments.tier == "pocket":
        return Study(tuple(str(arguments.pocket / name) for name in POCKET), POCKET, (None,) * 3, folder, 64)
    return Study((arguments.model,) * 3, tuple(SYSTEM_PROMPTS), tuple(SYSTEM_PROMPTS.values()), folder)


def chosen_prompts(study: Study, limit: int | None) -> tuple[list[Text], int]:
    """The first `limit` prompts for which every member has room, kept in the study's folder; and how many have none."""
    kept = Path(study.folder) / "prompts.json"
    if not kept.exists():
        members = study.members(len(study.models))
        every = [group[0].prompt for group in by_prompt(load_packaged("pandalm-human", prompt_format="chat")).values()]
        fitting = [prompt for prompt in every if fits(members, prompt)]
        write_bytes(kept, json.dumps({"prompts": fitting[:limit], "left_out": len(every) - len(fitting)}).encode())
    found = json.loads(kept.read_text())
    return as_prompts(found["prompts"]), found["left_out"]


def fits(members: Members, prompt: Text) -> bool:
    try:
        for member in members.members:
            assert member is not None
            member.prompt_ids(prompt, TOKENS, 1)
    except DataError:
        return False
    return True


def draw(study: Study, count: int, method: str) -> None:
    """One cell: all prompts by one method, with the seconds of the drawing alone."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    prompts, _ = chosen_prompts(study, None)
    settings: dict[str, Any] = {"method": method} | METHODS[method]
    if method == "auto":
        settings["budget"] = PROPOSALS * count * TOKENS
    members = study.members(count, "arithmetic" if method == "mixture" else "geometric")
    start = time.perf_counter()
    parameters, n = SamplingParameters(TOKENS), settings.pop("n")
    drawn = draw_composed(members, prompts, n, parameters, seed=SEED, batch_size=study.batch_size, **settings)
    seconds = time.perf_counter() - start
    content = {"members": count, "method": method, "seconds": seconds, "prompts": rows(drawn)}
    write_bytes(study.file(count, method), json.dumps(content).encode())


def rows(drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    """What is kept of each prompt: F as its estimate and interval, NaN where nothing was drawn."""
    return [
        {
            "method": one.method,
            "proposals": one.proposals,
            "samples": len(one.samples),
            "distinct": len({sample.token_ids for sample in one.samples}),
            "ess": one.ess,
            "mass": list(one.mass),
            "calls": one.calls,
            "tokens": sum(len(sample.token_ids) for sample in one.samples),
        }
        for one in drawn
    ]


if __name__ == "__main__":
    main()
