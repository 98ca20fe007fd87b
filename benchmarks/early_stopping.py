"""Exact samples a second of a geometric composition: token proposals that stop early, against rejection of whole completions.

    python benchmarks/early_stopping.py --model FOLDER_OR_HUB_ID  # under pairs of system prompts, ever further apart
    python benchmarks/early_stopping.py --quick                   # a tiny random model and copies of it, ever further away

Both draw exactly from the same law with the same expected acceptance F, in one process and one batch size, taking turns of as
many proposals; each turn has a seed of its own. `proposals` is the ratio of proposals a second, turn by turn; `samples` that of
accepted ones over all turns, which chance moves more. Writes early_stopping.json to --output_dir.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conductor import conditions, keep
from sampling import real, tiny

METHODS = ("tokens", "rejection")
SYSTEM_PROMPTS = {
    "one prompt in two wordings": ("Be concise: answer in one short sentence.", "Be brief: answer with one short sentence."),
    "two tones": ("Be concise: answer in one short sentence.", "Be warm and kind, as to a friend who needs encouragement."),
    "two languages": ("Be concise: answer in one short sentence.", "Réponds toujours en français."),
}
NOISE = {"noise 0.3": 0.3, "noise 1": 1.0, "noise 3": 3.0}
"""Standard deviation of what is added to the weights of the second of two tiny models, in units of each tensor's own."""

Draw = Callable[[str, int], tuple[int, int, int]]
"""A turn of a method under a seed: proposals, how many were accepted, and the calls they took."""


def main() -> None:
    arguments = parse_arguments()
    import torch
    import transformers

    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer, prompts = tiny(arguments.prompts) if arguments.quick else real(arguments)
    pairs = noisy(model, tokenizer) if arguments.quick else prompted(model, tokenizer)
    started = time.perf_counter()
    levels = {}
    for name, references in pairs.items():
        levels[name] = summary(in_turn(drawing(references, prompts, arguments), arguments.steps))
        print(f"{name}: {json.dumps(levels[name])}", flush=True)
    given = "--quick" if arguments.quick else f"--model {Path(arguments.model).name}"
    result = {
        "command": f"python benchmarks/early_stopping.py {given}",
        **conditions(arguments.threads, "torch", "transformers", "polyref"),
        "minutes": round((time.perf_counter() - started) / 60, 1),
        **{name: getattr(arguments, name) for name in ("prompts", "n", "max_new_tokens", "batch_size", "steps")},
        "levels": levels,
    }
    keep(result, Path(arguments.output_dir) / "early_stopping.json")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", default="../shared/data/pandalm-human/pairs.jsonl.gz")
    parser.add_argument("--prompts", type=int, help="of a turn: 4, and 1 with --quick")
    parser.add_argument("--n", type=int, default=16, help="proposals for each")
    parser.add_argument("--max_new_tokens", type=int, default=24)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3, help="turns of each method at each level, after one uncounted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output_dir", default=str(Path(__file__).parent / "results"))
    arguments = parser.parse_args()
    if arguments.quick == (arguments.model is not None):
        parser.error("give --model, or --quick")
    arguments.prompts = arguments.prompts or (1 if arguments.quick else 4)
    return arguments


def prompted(model: Any, tokenizer: Any) -> dict[str, Any]:
    """One model under two system prompts, for each pair of these."""
    from polyref import Reference, ReferenceSet

    return {
        name: ReferenceSet(tuple(Reference(model, tokenizer=tokenizer, system_prompt=told) for told in pair))
        for name, pair in SYSTEM_PROMPTS.items()
    }


def noisy(model: Any, tokenizer: Any) -> dict[str, Any]:
    """A model and a copy with noise in its weights, for each amount of it."""
    import copy

    import torch

    from polyref import Reference, ReferenceSet

    pairs = {}
    for name, amount in NOISE.items():
        other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
        for tensor in other.parameters():
            if tensor.dim() > 1:  # norms stay as they are
                tensor.data += amount * tensor.data.std() * torch.randn(tensor.shape, generator=generator)
        pairs[name] = ReferenceSet(tuple(Reference(each, tokenizer=tokenizer) for each in (model, other)))
    return pairs


def drawing(references: Any, prompts: Sequence[Any], arguments: argparse.Namespace) -> Draw:
    """Turns of n proposals for each prompt."""
    from polyref.samplers.composed import draw_composed
    from polyref.samplers.engine import SamplingParameters
    from polyref.samplers.members import load_members

    members, parameters = load_members(references), SamplingParameters(arguments.max_new_tokens)

    def draw(method: str, turn: int) -> tuple[int, int, int]:
        options: dict[str, Any] = {"seed": turn, "method": method, "fixed": True, "batch_size": arguments.batch_size}
        drawn = draw_composed(members, prompts, arguments.n, parameters, **options)
        return sum(one.proposals for one in drawn), sum(one.accepted for one in drawn), sum(one.calls for one in drawn)

    return draw


def in_turn(draw: Draw, steps: int) -> dict[str, list[dict[str, float]]]:
    """`steps` turns of each method, after one that is not counted; which goes first changes from turn to turn."""
    turns: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for step in range(steps + 1):
        for method in METHODS if step % 2 else METHODS[::-1]:
            start = time.perf_counter()
            proposals, accepted, calls = draw(method, step)
            seconds = time.perf_counter() - start
            if step:
                turns[method].append({"seconds": seconds, "proposals": proposals, "accepted": accepted, "calls": calls})
    return turns


def summary(turns: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Rates of each method over all its turns, and ratios, `tokens` to `rejection`; none of samples where one has none."""
    total = {method: {key: sum(turn[key] for turn in each) for key in each[0]} for method, each in turns.items()}
    rates = {
        method: {
            "samples_a_second": of["accepted"] / of["seconds"],
            "proposals_a_second": of["proposals"] / of["seconds"],
            "acceptance": of["accepted"] / of["proposals"],
            "calls_a_proposal": of["calls"] / of["proposals"],
        }
        for method, of in total.items()
    }
    by_turn = [
        ours["proposals"] / ours["seconds"] * theirs["seconds"] / theirs["proposals"]
        for ours, theirs in zip(turns["tokens"], turns["rejection"], strict=True)
    ]
    ours, theirs = (rates[method]["samples_a_second"] for method in METHODS)
    return {
        "methods": rates,
        "proposals": {"median": statistics.median(by_turn), "low": min(by_turn), "high": max(by_turn)},
        "samples": ours / theirs if ours and theirs else None,
    }


if __name__ == "__main__":
    main()
