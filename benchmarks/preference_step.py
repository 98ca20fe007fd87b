"""Preference training steps a second and peak memory, side by side with TRL's DPOTrainer.

    python benchmarks/preference_step.py --model FOLDER_OR_HUB_ID [--data ../shared/data/hh-harmless-base/pairs.jsonl.gz]

One worker process a contestant, each inside its own library's `Trainer.train()` on the same pairs, optimiser and batch size; a
conductor lets them take one optimiser step each in turn, so that all see the same state of the machine. Contestants: polyref
(two references, through its cache), TRL with reference log-probs precomputed, TRL with the reference model in memory.
Writes benchmarks/results/preference_step.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from conductor import begin, conditions, expect, keep, take_turns

CONTESTANTS = ("polyref", "trl_precomputed", "trl_in_memory")
PROMPT_TOKENS, COMPLETION_TOKENS = 256, 128
RESULTS = Path(__file__).parent / "results" / "preference_step.json"


def main() -> None:
    arguments = parse_arguments()
    workers = {}
    for name in arguments.contestants:
        workers[name] = begin(work, name, arguments)
        print(f"{name}: {expect(workers[name][1], 'ready')}", flush=True)
    timings, finals = take_turns(workers, arguments)
    report(arguments, timings, finals)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="../shared/data/hh-harmless-base/pairs.jsonl.gz")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30, help="counted steps of each contestant")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    return parser.parse_args()


def work(name: str, connection: Connection, arguments: argparse.Namespace) -> None:
    try:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(arguments.threads)
        with tempfile.TemporaryDirectory() as folder:
            trainer = (
                make_polyref(arguments, folder) if name == "polyref" else make_trl(arguments, folder, name == "trl_precomputed")
            )
            conduct(trainer, connection, name, arguments)
    except BaseException as error:
        connection.send(("error", f"{name}: {type(error).__name__}: {error}"))
        raise


def load_rows(arguments: argparse.Namespace) -> tuple[list[dict[str, str]], Any]:
    """The first pairs whose prompt and completions fit, as plain text, so that both libraries tokenise the same strings."""
    from transformers import AutoTokenizer

    from polyref import load_preferences

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = []
    for record in load_preferences(arguments.data):
        if not (isinstance(record.prompt, str) and isinstance(record.chosen, str) and isinstance(record.rejected, str)):
            continue
        replies = (record.chosen, record.rejected)
        if not all(reply.strip() for reply in replies) or len(tokenizer(record.prompt).input_ids) > PROMPT_TOKENS:
            continue
        if max(len(tokenizer(reply).input_ids) + 1 for reply in replies) <= COMPLETION_TOKENS:
            rows.append({"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected})
        if len(rows) == arguments.pairs:
            break
    return rows, tokenizer


def common(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": arguments.batch_size,
        "num_train_epochs": 1 + (arguments.warmup + arguments.steps) * arguments.batch_size / arguments.pairs,
        "learning_rate": 1e-6,
        "max_length": PROMPT_TOKENS + COMPLETION_TOKENS,
        "beta": 0.1,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
        "seed": 0,
    }


def make_polyref(arguments: argparse.Namespace, folder: str) -> Any:
    from polyref import PreferenceConfig, PreferenceTrainer, Reference, ReferenceSet

    rows, tokenizer = load_rows(arguments)
    prompts = (None, "Be careful and kind. ")
    references = ReferenceSet(tuple(Reference(arguments.model, system_prompt=prompt) for prompt in prompts))
    args = PreferenceConfig(**common(arguments, folder), cache_dir=f"{folder}/cache")
    return PreferenceTrainer(arguments.model, references, args, rows, processing_class=tokenizer)


def make_trl(arguments: argparse.Namespace, folder: str, precomputed: bool) -> Any:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    rows, tokenizer = load_rows(arguments)
    args = DPOConfig(**common(arguments, folder), gradient_checkpointing=False, precompute_ref_log_probs=precomputed)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)

    class Trainer(DPOTrainer):
        """Spared the minutes of precomputing: a step costs the same whatever the reference's log-probs are."""

        def compute_ref_log_probs(self, model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
            if not precomputed:
                return super().compute_ref_log_probs(model, batch)
            zeros = torch.zeros(len(batch["input_ids"]) // 2)
            return zeros, zeros

    return Trainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def conduct(trainer: Any, connection: Connection, name: str, arguments: argparse.Namespace) -> None:
    """Train, one optimiser step at a time, each on the conductor's word."""
    from transformers import TrainerCallback

    calls = [0]
    trainer.model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

    class Conducted(TrainerCallback):
        started = 0.0
        tokens = 0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            connection.send(("ready", "ready"))

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if connection.recv() == "stop":
                control.should_training_stop = True
                control.should_epoch_stop = True
                raise Finished
            calls[0] = 0
            Conducted.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # the optimiser has stepped; gradients are cleared after this hook, in about a millisecond
            connection.send(
                ("step", {"seconds": time.perf_counter() - Conducted.started, "calls": calls[0], "tokens": seen[0]})
            )

    seen = [0]
    original = trainer.compute_loss

    def counting(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen[0] = int(inputs["input_ids"].numel())
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = counting
    trainer.add_callback(Conducted())
    try:
        trainer.train()
    except Finished:
        pass
    final = {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if name == "polyref":
        final |= measure_alone(trainer, arguments)
    connection.send(("final", final))


class Finished(Exception):
    """The conductor has heard enough."""


def measure_alone(trainer: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of collation a batch, and this machine's float32 matrix rate."""
    import torch

    batches = list(trainer.get_train_dataloader().batch_sampler)
    start = time.perf_counter()
    for batch in batches:
        trainer.data_collator([trainer.train_dataset[i] for i in batch])
    collation = (time.perf_counter() - start) / len(batches)
    a, b = torch.randn(2, 2048, 2048)
    rates = []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        rates.append(2 * 2048**3 / (time.perf_counter() - start))
    parameters = sum(p.numel() for p in trainer.model.parameters())
    head = trainer.model.get_output_embeddings().weight.numel()
    pairs = trainer.train_dataset.pairs
    scored = sum(len(c) for p in pairs for c in p.tokens.completions) / len(pairs) * arguments.batch_size
    return {
        "collation_seconds": collation,
        "matrix_flops": statistics.median(rates),
        "body_parameters": float(parameters - head),
        "head_parameters": float(head),
        "scored_tokens": scored,
    }


def report(arguments: argparse.Namespace, timings: dict[str, list[dict[str, float]]], finals: dict[str, Any]) -> None:
    rows = {}
    for name, steps in timings.items():
        seconds = [s["seconds"] for s in steps]
        low, _, high = statistics.quantiles(seconds, n=4)
        rows[name] = {
            "median_seconds": statistics.median(seconds),
            "quartiles_seconds": [low, high],
            "total_seconds": sum(seconds),
            "steps_per_second": 1 / statistics.median(seconds),
            "padded_tokens_per_second": sum(s["tokens"] for s in steps) / sum(seconds),
            "policy_calls_per_step": statistics.mean(s["calls"] for s in steps),
            "peak_mib": finals[name]["peak_mib"],
        }
    result: dict[str, Any] = {
        "command": "python benchmarks/preference_step.py --model SmolLM2-135M-Instruct",
        **conditions(arguments.threads, "torch", "transformers", "trl", "polyref"),
        "pairs": arguments.pairs,
        "batch_size": arguments.batch_size,
        "steps": arguments.steps,
        "contestants": rows,
    }
    ours = rows.get("polyref")
    if ours:
        alone = finals["polyref"]
        tokens = statistics.mean(s["tokens"] for s in timings["polyref"])
        flops = 6 * alone["body_parameters"] * tokens + 8 * alone["head_parameters"] * alone["scored_tokens"]
        result["collation_share"] = alone["collation_seconds"] / ours["median_seconds"]
        result["matrix_gflops_per_second"] = alone["matrix_flops"] / 1e9
        result["share_of_matrix_rate"] = (
            flops / statistics.mean(s["seconds"] for s in timings["polyref"]) / alone["matrix_flops"]
        )
        result["ratios"] = {
            name: {
                "speed_median": row["median_seconds"] / ours["median_seconds"],
                "speed_total": row["total_seconds"] / ours["total_seconds"],
                "memory": ours["peak_mib"] / row["peak_mib"],
            }
            for name, row in rows.items()
            if name != "polyref"
        }
    keep(result, RESULTS)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
