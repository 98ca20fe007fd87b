"""`polyref iterate --dry_run`: the plan in counts, tokens, time and disk, at rates measured with the policy."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from polyref.cli.iterate_settings import IterateSettings
from polyref.cli.loop_settings import LoopPrompts
from polyref.cli.training_run import MAY_CHANGE, refuse_many_processes

if TYPE_CHECKING:
    from polyref.data.prompt_rows import PromptRow

_PROBE_TOKENS, _PROBE_SEQUENCES = 16, 8
_TRAINING = 3
"""A training step in forward passes: one forward, and a backward of two. Assumed."""


@dataclass(frozen=True)
class Rates:
    """Tokens a second of drawing and of one forward pass, and the bytes of the weights, all and those that train."""

    drawn: float
    read: float
    weights: int
    trained: int


@dataclass(frozen=True)
class Count:
    """What a round takes: `name`, completion tokens at most, and tokens with their prompts that pass through models."""

    name: str
    completions: int
    drawn: int
    read: int
    passes: int


def print_plan(own: IterateSettings, source: LoopPrompts, training: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write the plan to standard output. Refuses what the run, of this `config`, would itself refuse before it draws."""
    from polyref.cli.iterate import ASKING
    from polyref.cli.iterate_plan import check_labeller, check_training, inputs_of, offline_of, open_rewards
    from polyref.stages import refuse_other

    refuse_many_processes()
    args = check_training(own, training)
    check_labeller(own, None)
    fitted = cache(lambda: source.pairs(own.bonus_data))
    open_rewards(own, fitted, None, None)
    prompts, held_out = source.load()
    offline, _ = offline_of(own, source, held_out)
    inputs = inputs_of(own, prompts, held_out, offline, fitted(), {})
    refuse_other(own.output_dir, config, inputs, "write", may_change=(*MAY_CHANGE, *ASKING))
    rates = measure(own, prompts)
    lengths = _lengths(own, prompts)
    epochs = float(args.num_train_epochs)
    sys.stdout.write(_told(own, rates, counts(own, prompts, held_out, len(offline), lengths, epochs), epochs, len(offline)))


def _lengths(own: IterateSettings, prompts: Sequence[PromptRow]) -> int:
    """The mean length of the first 200 prompts in tokens of the policy's tokenizer, rounded up."""
    from polyref.data.encode import Encoder
    from polyref.scoring.models import load_tokenizer

    encoder, some = Encoder(load_tokenizer(own.source)), prompts[:200]
    return -(-sum(len(encoder.encode_prompt(row.prompt, None)) for row in some) // len(some))


def counts(
    own: IterateSettings,
    prompts: Sequence[PromptRow],
    held_out: Sequence[PromptRow],
    offline: int,
    length: int,
    epochs: float,
) -> list[Count]:
    """Every stage of the run at its longest: no completion ends early, every prompt gives its pairs, no rail is broken."""
    judged, longest, k = len(held_out or prompts), own.max_new_tokens, len(own.reference_set)
    found: list[Count] = []

    def drawing(name: str, many: int, scorings: int) -> None:
        found.append(Count(name, many, many * longest, many * (length + longest), scorings))

    drawing("evaluate 0", judged * own.eval_completions, k)
    each, other = own.prompts_per_round or len(prompts), own.enhancer_agent
    for number in range(1, own.rounds + 1):
        drawing(f"generate {number}", each * own.main.n, 0)
        if other is not None:
            drawing(f"enhance {number}", each * other.n, 0)
        rounds = number if own.replay is None else min(number, own.replay + 1)
        pairs = rounds * each * own.pairs
        share = own.offline_share
        pairs += offline if share is None else min(offline, round(share * pairs / (1 - share)))
        passes = round(_TRAINING * epochs) + k
        found.append(Count(f"train {number}", 2 * pairs, 0, 2 * pairs * (length + longest), passes))
        drawing(f"evaluate {number}", judged * own.eval_completions, k)
    return found


def measure(own: IterateSettings, prompts: Sequence[PromptRow]) -> Rates:
    """Draw a few tokens with the policy and read them once, after a draw that is not timed."""
    import torch

    from polyref.loops.policies import Policy
    from polyref.samplers.engine import SamplingParameters
    from polyref.samplers.local import LocalEngine
    from polyref.scoring.models import default_device, load_tokenizer

    model = Policy(own.source).load().to(default_device())
    size = min(own.batch_size, _PROBE_SEQUENCES)
    engine = LocalEngine(model, load_tokenizer(own.source), batch_size=size)
    parameters = SamplingParameters(min(own.max_new_tokens, _PROBE_TOKENS))
    prompt = prompts[0].prompt
    engine([prompt], 1, parameters, seed=0)
    begun = time.perf_counter()
    (drawn,) = engine([prompt], size, parameters, seed=0)
    drawing = time.perf_counter() - begun
    rows = torch.tensor([engine.prompt_ids(prompt)] * size, device=default_device())
    begun = time.perf_counter()
    with torch.no_grad():
        model(input_ids=rows).logits.sum().item()
    reading = time.perf_counter() - begun
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trained = _adapter_bytes(own, model) if own.lora is not None else weights
    tokens = sum(len(one.token_ids) for one in drawn)
    return Rates(tokens / max(drawing, 1e-9), rows.numel() / max(reading, 1e-9), weights, trained)


def _adapter_bytes(own: IterateSettings, model: Any) -> int:
    from peft import get_peft_model

    from polyref.cli.settings import peft_config

    adapted = get_peft_model(model, peft_config(own.lora, model))
    return sum(one.numel() * one.element_size() for one in adapted.parameters() if one.requires_grad)


def _told(own: IterateSettings, rates: Rates, stages: Sequence[Count], epochs: float, offline: int) -> str:
    lines, total = [], 0.0
    for one in stages:
        seconds = one.drawn / rates.drawn + one.read * one.passes / rates.read
        total += seconds
        lines.append(
            f"  {one.name:<12}  {one.completions:>9,}  {one.drawn:>13,}  {one.read * one.passes:>15,}  {_time(seconds):>9}"
        )
    average = rates.weights * (2 if own.dtype in ("float16", "bfloat16") else 1)  # averages are kept in float32 at least
    kept = own.rounds * rates.trained + (average * (own.rounds - 1) if own.anchor == "average" else 0)
    kept += rates.weights if own.lora is None or own.merge_adapter else rates.trained
    most = kept + 3 * rates.trained  # a checkpoint: weights, and AdamW's two moments
    text = sum(one.drawn for one in stages) * 8  # characters and numbers of a token, as JSON keeps them
    head = f"  {'stage':<12}  {'texts':>9}  {'tokens drawn':>13}  {'tokens read':>15}  {'time':>9}"
    notes = [
        f"Time: {_time(total)}, at {rates.drawn:,.0f} tokens drawn and {rates.read:,.0f} read a second, both measured now.",
        f"Assumed: a training step costs {_TRAINING} forward passes, references read as fast as the policy; rewards are not "
        "counted. Counts are at most: no completion ends early, and no rail is broken.",
        f"Disk: {_bytes(kept + text)} at the end, {_bytes(most + text)} while a checkpoint is kept.",
        f"Anchor: {own.moving.told}.",
    ]
    title = f"{own.rounds} rounds of {epochs:g} epochs, {offline} offline pairs; nothing is drawn or trained now."
    return "\n".join([title, "", head, *lines, "", *notes, ""])


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _bytes(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"
