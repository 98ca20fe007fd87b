"""Where the time of a round of `polyref iterate` goes: inside models, in the optimiser, or in neither, by stage.

    python benchmarks/loop.py --model FOLDER_OR_HUB_ID [--name NAME]
    python benchmarks/loop.py --model pocket/base --references pocket/harmless pocket/helpful --all_weights --name pocket
    python benchmarks/loop.py --quick

A run of some rounds against two references, the model under two system prompts unless others are named, drawn as
configs/online_dpo.yaml draws: an enhancer that is the same policy drawn hotter, best against worst, LoRA unless --all_weights.
Inside models are forward passes with their output head, and backward passes. No second counts twice: what begins in the middle
of something else stops its clock. The first round also imports libraries and warms up; it is told, and is no part of the share.
--quick: a tiny random model. For a CPU, where a call has ended when it returns. Writes loop_NAME.json to --output_dir.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conductor import conditions, keep
from sampling import tiny

INSIDE = ("forward", "backward")
KINDS = (*INSIDE, "optimiser", "choosing tokens", "key-value caches", "loading", "disk", "other")
TARGET = 0.05


class Clock:
    """Seconds by stage and kind."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: Counter[tuple[str, str]] = Counter()
        self.now, self.stage, self.kinds, self.since = now, "before", ["other"], now()

    def turn(self) -> None:
        """Give the time since the last turn to what is on."""
        now = self.now()
        self.seconds[self.stage, self.kinds[-1]] += now - self.since
        self.since = now

    def begin(self, kind: str) -> None:
        self.turn()
        self.kinds.append(kind)

    def end(self) -> None:
        self.turn()
        self.kinds.pop()

    def timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time is of `kind`."""

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            self.begin(kind)
            try:
                return function(*args, **options)
            finally:
                self.end()

        return call


def main() -> None:
    arguments = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(arguments, Path(folder))
    result = {
        "command": "python benchmarks/loop.py " + ("--quick" if arguments.quick else f"--model {Path(arguments.model).name}"),
        **conditions(arguments.threads, "torch", "transformers", "peft", "polyref"),
        **{name: getattr(arguments, name) for name in ("name", "rounds", *SIZES)},
        **summary(seconds),
    }
    keep(result, Path(arguments.output_dir) / f"loop_{arguments.name}.json")
    print(table(result))


SIZES = ("prompts", "held_out", "completions", "max_new_tokens", "batch_size", "all_weights", "processor_time")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--references", nargs="+", help="two or more models; the model under two system prompts otherwise")
    parser.add_argument("--all_weights", action="store_true", help="train all weights, not a LoRA")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--name", help="of the result")
    parser.add_argument("--data", default="packaged:pandalm-human")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=32, help="of each round")
    parser.add_argument("--held_out", type=int, default=16, help="prompts that rounds are judged on")
    parser.add_argument("--completions", type=int, default=4, help="of each prompt, and as many of the enhancer's")
    parser.add_argument("--max_new_tokens", type=int, default=24)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor_time", action="store_true", help="of all threads, where others use the machine too")
    parser.add_argument("--output_dir", default=str(Path(__file__).parent / "results"))
    arguments = parser.parse_args()
    if arguments.quick == (arguments.model is not None):
        parser.error("give --model, or --quick")
    if arguments.rounds < 2:
        parser.error("give at least 2 rounds: the first is not counted")
    if arguments.name is None:
        arguments.name = "quick" if arguments.quick else Path(arguments.model).name.lower()
    return arguments


def measure(arguments: argparse.Namespace, folder: Path) -> Mapping[tuple[str, str], float]:
    """Seconds of a run in `folder`, by stage and kind."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.model, arguments.data, arguments.all_weights = *saved_tiny(folder, arguments), True
    own, source = settings(arguments, folder / "run")
    clock = Clock(time.process_time if arguments.processor_time else time.perf_counter)
    watch(clock)
    from polyref.cli.iterate import make_iterate

    make_iterate(own, source, {"learning_rate": 1e-4, "per_device_train_batch_size": 8, "num_train_epochs": 1})
    clock.turn()
    return clock.seconds


def settings(arguments: argparse.Namespace, run: Path) -> tuple[Any, Any]:
    """What `make_iterate` is asked for."""
    from polyref.cli.iterate_settings import EnhancerSettings, IterateSettings
    from polyref.cli.loop_settings import LoopPrompts
    from polyref.cli.preference_source import RewardSource
    from polyref.cli.settings import LoraSettings
    from polyref.references.reference_set import Reference, ReferenceSet

    said = ("Answer in one or two short sentences.", "Answer carefully, and say when you are not sure.")
    members = [Reference(arguments.model, system_prompt=text, name=text.split()[1]) for text in said]
    if arguments.quick or arguments.references:
        members = [Reference(model, name=str(i)) for i, model in enumerate(arguments.references or [arguments.model], 1)]
    own = IterateSettings(
        str(run),
        arguments.model,
        lora=None if arguments.all_weights else LoraSettings(r=16, alpha=32),
        references=ReferenceSet(tuple(members)),
        reward=RewardSource("rule:length:words"),
        gold=RewardSource("rule:length:characters"),
        patience=None,
        rounds=arguments.rounds,
        completions=arguments.completions,
        enhancer=EnhancerSettings(completions=arguments.completions, temperature=1.3),
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
    )
    prompts, held_out = arguments.prompts, arguments.held_out
    form = "as_is" if arguments.quick else "chat"
    return own, LoopPrompts(arguments.data, limit=prompts, held_out=held_out, prompt_format=form)  # type: ignore[arg-type]


def saved_tiny(folder: Path, arguments: argparse.Namespace) -> tuple[str, str]:
    """A random model, and a file of prompts."""
    model, tokenizer, prompts = tiny(arguments.prompts + arguments.held_out)
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(folder / "tiny"), str(folder / "prompts.jsonl")


def watch(clock: Clock) -> None:
    """Let `clock` see models, optimisers, and what else takes long; stages turn it."""
    import torch
    from peft import PeftModel
    from torch.optim import optimizer
    from transformers import PreTrainedModel, Trainer

    from polyref import files, stages
    from polyref.cli import iterate_plan  # noqa: F401
    from polyref.loops import iterate  # noqa: F401
    from polyref.samplers import running, tokens
    from polyref.samplers.rows import Rows
    from polyref.scoring import head, models
    from polyref.training import checkpoints

    def method(kind: str, owner: Any, *names: str) -> None:
        for name in names:
            setattr(owner, name, clock.timed(kind, getattr(owner, name)))

    method("forward", PreTrainedModel, "__call__")
    method("forward", PeftModel, "__call__")
    method("backward", torch.autograd, "backward")
    optimizer.register_optimizer_step_pre_hook(lambda *_: clock.begin("optimiser"))
    optimizer.register_optimizer_step_post_hook(lambda *_: clock.end())
    method("key-value caches", Rows, "pick", "join")
    method("disk", stages.Stage, "finish")
    method("disk", stages.RunFolder, "append_metrics", "_write_manifest")
    method("disk", Trainer, "_save_checkpoint")
    everywhere("forward", head.token_logps, clock)
    everywhere("choosing tokens", tokens.next_tokens, clock)
    everywhere("loading", models.load_causal_lm, clock)
    everywhere("loading", models.load_tokenizer, clock)
    everywhere("loading", models.attach_adapter, clock)
    everywhere("disk", checkpoints.save_policy, clock)
    everywhere("disk", files.write_bytes, clock)
    assert running.next_tokens is not tokens.laws
    named = stages.RunFolder.stage

    def stage(self: Any, name: str, *args: Any, **options: Any) -> Any:
        clock.turn()
        clock.stage = name
        return named(self, name, *args, **options)

    stages.RunFolder.stage = stage  # type: ignore[method-assign]


def everywhere(kind: str, function: Callable[..., Any], clock: Clock) -> None:
    """Time `function` under every name that a module of polyref has for it."""
    timed = clock.timed(kind, function)
    for module in [module for name, module in sys.modules.items() if name.startswith("polyref")]:
        for name in [name for name, value in vars(module).items() if value is function]:
            setattr(module, name, timed)


def summary(seconds: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """Of each round its seconds, the share outside forward and backward passes, and that of the optimiser; and by stage.

    Stages are means over the rounds after the first.
    """
    numbers = sorted({int(stage.rpartition("-")[2]) for stage, _ in seconds if "-" in stage} - {0})
    rounds = []
    for number in numbers:
        kinds = Counter[str]()
        for (stage, kind), value in seconds.items():
            if stage.endswith(f"-{number}"):
                kinds[kind] += value
        rounds.append({"round": number} | shares(kinds))
    later, stages = numbers[1:], dict[str, Counter[str]]()
    for (stage, kind), value in seconds.items():
        name, _, number = stage.rpartition("-")
        if number.isdigit() and int(number) in later:
            stages.setdefault(name, Counter())[kind] += value / len(later)
    counted = [row for row in rounds if row["round"] in later]
    return {
        "target": TARGET,
        "outside": statistics.median(row["outside"] for row in counted),
        "outside_but_optimiser": statistics.median(row["outside"] - row["optimiser"] for row in counted),
        "rounds_measured": rounds,
        "stages": {name: shares(kinds) | {"by_kind": {k: kinds[k] for k in KINDS}} for name, kinds in stages.items()},
    }


def shares(kinds: Mapping[str, float]) -> dict[str, float]:
    """Seconds in all, and of these the share outside forward and backward passes, and the share of the optimiser."""
    total = sum(kinds.values())
    inside = sum(kinds.get(kind, 0.0) for kind in INSIDE)
    return {"seconds": total, "outside": 1 - inside / total, "optimiser": kinds.get("optimiser", 0.0) / total}


def table(result: Mapping[str, Any]) -> str:
    """Seconds of a round after the first, by stage and kind."""

    def line(name: str, cells: Sequence[str]) -> str:
        return f"{name:<10}" + "".join(f"{cell:>18}" for cell in cells)

    lines = [line("stage", [*KINDS, "seconds", "outside"])]
    for name, row in result["stages"].items():
        cells = [f"{row['by_kind'][kind]:.3f}" for kind in KINDS]
        lines.append(line(name, [*cells, f"{row['seconds']:.2f}", f"{row['outside']:.1%}"]))
    for row in result["rounds_measured"]:
        said = f"round {row['round']}: {row['seconds']:.1f} s, {row['outside']:.1%} outside forward and backward passes"
        lines.append(f"{said}, {row['optimiser']:.1%} in the optimiser")
    lines.append(f"rounds after the first: {result['outside']:.1%} outside, the target is {result['target']:.0%}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
