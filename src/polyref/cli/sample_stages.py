"""The long stage of `polyref sample`: samples of some prompts at a time, kept in files, and the pairs made of them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from polyref.cli.auxiliary_stages import keep
from polyref.cli.preference_source import RewardSource
from polyref.cli.sample_settings import SampleSettings
from polyref.errors import DataError, one_line

if TYPE_CHECKING:
    from polyref.data.prompt_rows import PromptRow
    from polyref.rewards.protocols import Reward
    from polyref.samplers.pairs import Paired
    from polyref.samplers.sampled import Sampled
    from polyref.stages import Stage

    Row = dict[str, Any]


def load_reward(source: RewardSource) -> Reward:
    """The reward that `source` names."""
    from polyref.rewards.reward_model import RewardModel
    from polyref.rewards.rules import rule

    given = {name: value for name, value in asdict(source).items() if value is not None}
    return rule(source.model) if source.model.startswith("rule:") else RewardModel.load(**given)


def draw(stage: Stage, own: SampleSettings, prompts: Sequence[PromptRow], reward: Reward | None) -> list[tuple[Row, list[Row]]]:
    """What is written for each prompt: its row of diagnostics, and the rows of its samples.

    DataError, once the chunk is kept, for a prompt without a sample that may not be left out.
    """
    from polyref.cli.progress import Meter
    from polyref.samplers.sampled import open_draw, sample

    starts = range(0, len(prompts), own.prompts_at_once)
    files = [stage.folder / f"chunk-{number:06d}.json" for number in range(len(starts))]
    missing = {file for file in files if not file.exists()}
    how = own.drawing
    ready = open_draw(own.references, prompts, how) if missing else None
    found: list[tuple[Row, list[Row]]] = []
    begun, calls = time.perf_counter(), 0
    with Meter("prompts") as meter:
        for start, file in zip(starts, files, strict=True):
            some = prompts[start : start + own.prompts_at_once]
            if ready is not None and file in missing:
                sampled = sample(some, ready, how, reward)
                calls += sum(one.drawn.calls for one in sampled)
                told = [_told(row, one, own) for row, one in zip(some, sampled, strict=True)]
                keep(file, told)
            kept = [(diagnostics, rows) for diagnostics, rows in json.loads(file.read_text())]
            _refuse_empty(some, kept, own)
            found += kept
            if missing:
                meter("sampling", len(found), len(prompts))
    if missing:
        seconds = time.perf_counter() - begun
        keep(stage.run.path / "timing.json", {"calls": calls, "seconds": seconds, "calls_a_second": calls / seconds})
    if not stage.done:
        stage.finish(files)
    return found


def make_pairs_of(prompts: Sequence[PromptRow], found: Sequence[tuple[Row, list[Row]]], own: SampleSettings) -> Paired:
    """Preference pairs among the samples of each prompt; of weighted ones, n resampled by their weights."""
    from polyref.samplers.pairing import PAIRINGS
    from polyref.samplers.pairs import Scored, make_pairs

    scored = []
    for row, (_, samples) in zip(prompts, found, strict=True):
        some = [samples[i] for i in _counting_alike(row, samples, own)]
        texts = [one["completion"] if isinstance(row.prompt, str) else tuple(one["completion"]) for one in some]
        rewards, ended = [one["reward"] for one in some], [one["ended"] for one in some]
        scored.append(Scored(row.prompt, texts, rewards, None, row.source, row.row, ended=ended))
    settings: dict[str, Any] = {"pairs": own.pairs, "min_margin": own.min_margin, "tie_within": own.tie_within}
    return make_pairs(scored, PAIRINGS[str(own.pairing)], seed=own.seed, **settings)


def _counting_alike(row: PromptRow, samples: Sequence[Row], own: SampleSettings) -> Iterable[int]:
    import torch

    from polyref.samplers.sampled import stream
    from polyref.samplers.weights import systematic

    log_weights = [one["log_weight"] for one in samples]
    if len(set(log_weights)) <= 1:
        return range(len(samples))
    uniform = float(stream(own.seed, "pairs", row.prompt, row.reference_weights).random())
    chosen: list[int] = systematic(torch.tensor(log_weights, dtype=torch.float64), own.n, uniform).tolist()
    return chosen


def _told(row: PromptRow, one: Sampled, own: SampleSettings) -> tuple[Row, list[Row]]:
    """The rows of a prompt, of plain values: what is not a finite number is None."""
    from polyref.samplers.auxiliary import as_completion

    prompt = _plain(row.prompt)
    samples = [
        {
            "prompt": prompt,
            "completion": _plain(as_completion(row.prompt, sample.text)),
            "log_weight": log_weight,
            "logps": [_number(logp) for logp in sample.logps],
            "reward": reward,
            "ended": sample.ended,
        }
        for sample, log_weight, reward in one.samples
    ]
    drawn, kept = one.drawn, one.kept
    composed = own.references.composition == "geometric" and drawn.method != "engine"
    diagnostics = {
        "prompt": prompt,
        "row": row.row,
        "method": drawn.method,
        "exact": one.exact,
        "proposals": drawn.proposals,
        "accepted": drawn.accepted,
        "acceptance": _number(drawn.acceptance),
        "log_f": [_number(value) for value in drawn.log_mass] if composed else None,
        "calls": drawn.calls,
        "samples": len(samples),
        "ess": one.ess,
        "tilt_acceptance": [_number(value) for value in kept.acceptance] if kept and kept.acceptance else None,
        "log_z": [_number(value) for value in kept.log_z] if kept and kept.log_z else None,
        "note": one.note,
    }
    return diagnostics, samples


def _refuse_empty(prompts: Sequence[PromptRow], kept: Sequence[tuple[Row, list[Row]]], own: SampleSettings) -> None:
    empty = [i for i, (_, samples) in enumerate(kept) if not samples]
    if empty and not own.leave_out:
        first, note = prompts[empty[0]], kept[empty[0]][0]["note"]
        text = first.prompt if isinstance(first.prompt, str) else first.prompt[-1]["content"]
        where = f"{first.source}, row {first.row}, prompt {one_line(text, 40)!r}"
        more = f", nor for {len(empty) - 1} other prompts" if len(empty) > 1 else ""
        what = f"no sample within the budget{more} ({note})"
        raise DataError(what, where=where, fix="raise the budget or beta, take method smc, or set leave_out to do without")


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(text: Any) -> Any:
    return text if isinstance(text, str) else [dict(message) for message in text]
