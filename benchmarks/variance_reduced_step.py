"""Variance-reduced training steps a second and peak memory: a prompt shared by its completions, against padded concatenation.

    python benchmarks/variance_reduced_step.py --model FOLDER_OR_HUB_ID [--data ../shared/data/hh-harmless-base/pairs.jsonl.gz]

Both contestants are this library's trainer on the same pairs, anchors, optimiser and batches, with the same objective and M
auxiliary pairs a prompt (1 by default: 4 completions). `shared` is the trainer as it is. `concatenated` computes the same
log-probabilities as libraries do that concatenate: 2 + 2M rows a prompt, each prompt + completion padded to the longest, one
forward pass with full logits, and a log-softmax over them. Before anything is timed, the two losses of a batch are compared.
A conductor lets them take one optimiser step each in turn, so that both see the same state of the machine. Auxiliary pairs are
completions of other prompts, and predictions are drawn at random: neither changes what a step costs. Writes
benchmarks/results/variance_reduced_step.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from conductor import begin, conditions, expect, keep, take_turns
from preference_step import COMPLETION_TOKENS, PROMPT_TOKENS, common, conduct, load_rows

CONTESTANTS = ("shared", "concatenated")
RESULTS = Path(__file__).parent / "results" / "variance_reduced_step.json"
TOLERANCE = 1e-3
"""The largest relative difference allowed between the two losses of one batch."""


def main() -> None:
    arguments = parse_arguments()
    workers = {}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in CONTESTANTS:
            workers[name] = begin(work, name, arguments, cache)
            connection = workers[name][1]
            losses[name] = expect(connection, "loss")
            print(f"{name}: {expect(connection, 'ready')}, loss of the first batch {losses[name]:.6f}", flush=True)
        gap = abs(losses["shared"] - losses["concatenated"])
        if gap > TOLERANCE * abs(losses["concatenated"]):
            raise SystemExit(f"the contestants do not compute the same loss: {losses}")
        timings, finals = take_turns(workers, arguments)
    report(arguments, timings, finals, losses)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="../shared/data/hh-harmless-base/pairs.jsonl.gz")
    parser.add_argument("--pairs", type=int, default=120)
    parser.add_argument("--auxiliary_pairs", type=int, default=1, help="M: a step has 2 + 2M completions a prompt")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30, help="counted steps of each contestant")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def work(name: str, connection: Connection, arguments: argparse.Namespace, cache: str) -> None:
    try:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(arguments.threads)
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(name, arguments, folder, cache)
            connection.send(("loss", first_loss(trainer)))
            conduct(trainer, connection, name, arguments)
    except BaseException as error:
        connection.send(("error", f"{name}: {type(error).__name__}: {error}"))
        raise


def auxiliary_rows(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], Any]:
    """The pairs of the benchmark, with M auxiliary pairs of completions that other prompts have."""
    rows, tokenizer = load_rows(arguments)
    draw = random.Random(0)
    completions = sorted({row[side] for row in rows for side in ("chosen", "rejected")})
    whole: list[dict[str, Any]] = []
    for row in rows:
        pairs = [draw.sample(completions, 2) for _ in range(arguments.auxiliary_pairs)]
        firsts, seconds = ([pair[side] for pair in pairs] for side in (0, 1))
        said = {"predicted_probability": draw.random(), "auxiliary_probability": [draw.random() for _ in pairs]}
        whole.append(row | {"auxiliary_1": firsts, "auxiliary_2": seconds} | said)
    return whole, tokenizer


def make_trainer(name: str, arguments: argparse.Namespace, folder: str, cache: str) -> Any:
    from polyref import PreferenceConfig, PreferenceTrainer

    rows, tokenizer = auxiliary_rows(arguments)
    args = PreferenceConfig(**common(arguments, folder), objective="variance_reduced", cache_dir=cache)
    trainer = PreferenceTrainer(arguments.model, None, args, rows, processing_class=tokenizer)
    if name == "concatenated":
        concatenate(trainer)
    return trainer


def concatenate(trainer: Any) -> None:
    """Score one padded row a completion, with the model's full logits and a log-softmax over all of their positions."""
    from dataclasses import replace

    from polyref.training import preference_trainer
    from polyref.training.dataset import PairCollator
    from polyref.types import LogProbs

    def padded_logps(model: Any, batch: Any, plan: Any) -> LogProbs:
        mask = (batch.segment_ids >= 0).long()
        logits = model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        labels = batch.input_ids[:, 1:]
        logps = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        scored = batch.segment_ids[:, 1:] > 0
        return LogProbs((logps * scored).sum(1, keepdim=True), scored.sum(1, keepdim=True))

    trainer.plan = replace(trainer.plan, layout="separate", fused=False)
    trainer.data_collator = PairCollator("separate")
    preference_trainer.completion_logps = padded_logps


def first_loss(trainer: Any) -> float:
    """The loss of one batch, on which the contestants must agree: at anchors moved from the policy, where no reward is 0."""
    import torch

    pairs = [trainer.train_dataset[i] for i in range(trainer.args.per_device_train_batch_size)]
    trainer.model.train()
    check, trainer._start_check = trainer._start_check, None
    with torch.no_grad():
        batch = trainer.data_collator(pairs)
        batch["anchor"] = batch["anchor"] * torch.linspace(0.9, 1.1, batch["anchor"].shape[1])
        loss = trainer.compute_loss(trainer.model, batch)
    trainer._start_check = check
    return loss.item()


def report(
    arguments: argparse.Namespace, timings: dict[str, list[dict[str, float]]], finals: dict[str, Any], losses: dict[str, float]
) -> None:
    rows = {}
    for name, steps in timings.items():
        seconds = [s["seconds"] for s in steps]
        low, _, high = statistics.quantiles(seconds, n=4)
        rows[name] = {
            "median_seconds": statistics.median(seconds),
            "quartiles_seconds": [low, high],
            "steps_per_second": 1 / statistics.median(seconds),
            "padded_tokens_per_step": statistics.mean(s["tokens"] for s in steps),
            "policy_calls_per_step": statistics.mean(s["calls"] for s in steps),
            "peak_mib": finals[name]["peak_mib"],
            "loss_of_the_first_batch": losses[name],
        }
    ours, theirs = rows["shared"], rows["concatenated"]
    in_turn = [
        there["seconds"] / here["seconds"] for here, there in zip(timings["shared"], timings["concatenated"], strict=True)
    ]
    low, middle, high = statistics.quantiles(in_turn, n=4)
    result = {
        "command": f"python benchmarks/variance_reduced_step.py --model {Path(arguments.model).name}",
        **conditions(arguments.threads, "torch", "transformers", "polyref"),
        "pairs": arguments.pairs,
        "auxiliary_pairs": arguments.auxiliary_pairs,
        "batch_size": arguments.batch_size,
        "longest_prompt_and_completion": [PROMPT_TOKENS, COMPLETION_TOKENS],
        "steps": arguments.steps,
        "contestants": rows,
        "ratios": {
            "speed_median": theirs["median_seconds"] / ours["median_seconds"],
            "speed_step_by_step": {"median": middle, "quartiles": [low, high]},
            "memory": ours["peak_mib"] / theirs["peak_mib"],
        },
    }
    keep(result, RESULTS)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
