"""How many sequences of the local engine depend on batch size or order, in float32, for each coupling; and what each costs.

    python benchmarks/coupling.py --model FOLDER_OR_HUB_ID [--data ../shared/data/pandalm-human/pairs.jsonl.gz]
    python benchmarks/coupling.py --quick

n completions of each of some prompts are drawn under one seed in batches of each size, and once more, in the last of these,
with the prompts shuffled. A sequence counts as the same if its tokens are equal in all of these draws. --quick: a tiny random
model, a few seconds. Writes coupling.json to --output_dir.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conductor import conditions, keep
from sampling import real, tiny

TARGET = 0.99


def main() -> None:
    arguments = parse_arguments()
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    from polyref.samplers.tokens import INVERSE, RACE

    model, tokenizer, prompts = tiny(arguments.prompts) if arguments.quick else real(arguments)
    result = {
        "command": "python benchmarks/coupling.py "
        + ("--quick" if arguments.quick else f"--model {Path(arguments.model).name} --prompts {arguments.prompts}"),
        **conditions(arguments.threads, "torch", "transformers", "polyref"),
        **{name: getattr(arguments, name) for name in ("prompts", "n", "max_new_tokens", "batch_sizes")},
        "target": TARGET,
        "couplings": {},
    }
    for name, coupling in {"INVERSE": INVERSE, "RACE": RACE}.items():
        result["couplings"][name] = measured(model.float(), tokenizer, prompts, arguments, coupling)
        print(name, json.dumps(result["couplings"][name]), flush=True)
    keep(result, Path(arguments.output_dir) / "coupling.json")


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", default="../shared/data/pandalm-human/pairs.jsonl.gz")
    parser.add_argument("--prompts", type=int, default=25)
    parser.add_argument("--n", type=int, default=8, help="completions of each")
    parser.add_argument("--max_new_tokens", type=int, default=24)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output_dir", default=str(Path(__file__).parent / "results"))
    arguments = parser.parse_args(given)
    if arguments.quick == (arguments.model is not None):
        parser.error("give --model, or --quick")
    return arguments


def measured(
    model: Any, tokenizer: Any, prompts: Sequence[Any], arguments: argparse.Namespace, coupling: Any
) -> dict[str, Any]:
    """The share of sequences that every draw gives alike, and each draw's seconds of the processor."""
    from polyref.samplers.engine import SamplingParameters
    from polyref.samplers.local import LocalEngine

    order = random.Random(0).sample(range(len(prompts)), len(prompts))
    draws = [(str(size), size, list(range(len(prompts)))) for size in arguments.batch_sizes]
    draws.append((f"{arguments.batch_sizes[-1]} shuffled", arguments.batch_sizes[-1], order))
    sequences, seconds = [], {}
    for name, size, places in draws:
        engine = LocalEngine(model, tokenizer, batch_size=size, coupling=coupling)
        start = time.process_time()  # of this process alone, whatever else the machine is at
        drawn = engine([prompts[place] for place in places], arguments.n, SamplingParameters(arguments.max_new_tokens), seed=0)
        seconds[name] = round(time.process_time() - start, 2)
        by_place = dict(zip(places, drawn, strict=True))
        sequences.append([completion.token_ids for place in range(len(prompts)) for completion in by_place[place]])
    return {"processor_seconds": seconds, **agreement(sequences)}


def agreement(sequences: Sequence[Sequence[tuple[int, ...]]]) -> dict[str, Any]:
    """Of draws of the same sequences: how many there are, how many are equal in all, and the tokens of the first draw."""
    same = [len(set(versions)) == 1 for versions in zip(*sequences, strict=True)]
    tokens = sum(len(sequence) for sequence in sequences[0])
    return {"sequences": len(same), "same": sum(same), "share": sum(same) / len(same), "tokens": tokens}


if __name__ == "__main__":
    main()
