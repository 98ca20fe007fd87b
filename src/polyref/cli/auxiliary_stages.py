"""The two long stages of `polyref auxiliary`: each keeps what is done in files, and a killed run does only what is missing."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyref.cli.auxiliary_summary import Totals, counts_of
from polyref.cli.preference_source import PreferenceSource, cross_fitted, opened
from polyref.errors import ModelError
from polyref.references.reference_set import ReferenceSet
from polyref.samplers.engine import SamplingParameters

if TYPE_CHECKING:
    import torch

    from polyref.rewards.cross_fit import Comparison
    from polyref.samplers.auxiliary import Pair
    from polyref.stages import Stage
    from polyref.types import PreferenceRecord

logger = logging.getLogger(__name__)

_SURELY = 64  # completions, none of which ended: a policy that never does


@dataclass(frozen=True)
class Drawing:
    """How auxiliary pairs are drawn: `pairs` a record from `policy`, `prompts_at_once` in a chunk (see `AuxiliarySettings`)."""

    policy: ReferenceSet
    per_pair: bool
    pairs: int
    parameters: SamplingParameters
    redraws: int
    batch_size: int
    prompts_at_once: int
    seed: int


def draw(stage: Stage, how: Drawing, records: Sequence[PreferenceRecord]) -> tuple[list[list[Pair]], Totals]:
    """The auxiliary pairs of each record, and what they took. ModelError for a policy of whose completions none ends."""
    from polyref.cli.progress import Meter
    from polyref.samplers.auxiliary import as_completions, draw_pairs
    from polyref.samplers.references import sampling_policy

    totals, auxiliary, chunks = Totals(), [list["Pair"]() for _ in records], _chunks(records, how.prompts_at_once)
    files = [stage.folder / f"chunk-{number:06d}.json" for number in range(len(chunks))]
    missing = {file for file in files if not file.exists()}
    policy = sampling_policy(how.policy, per_pair=how.per_pair, batch_size=how.batch_size) if missing else None
    tokens, seconds = 0, 0.0
    with Meter("pairs") as meter:
        for file, chunk in zip(files, chunks, strict=True):
            prompts = [records[i].prompt for i in chunk]
            if policy is not None and file in missing:
                start = time.perf_counter()
                drawn = draw_pairs(prompts, policy, how.pairs, how.parameters, seed=how.seed, redraws=how.redraws)
                tokens, seconds = tokens + drawn.tokens, seconds + time.perf_counter() - start
                _refuse_endless(totals.plus(counts_of(drawn)), how.parameters, last=file == files[-1])
                keep(file, {"counts": counts_of(drawn), "pairs": drawn.pairs})
            kept = json.loads(file.read_text())
            totals = totals.plus(kept["counts"])
            for i, prompt, pairs in zip(chunk, prompts, kept["pairs"], strict=True):
                auxiliary[i] = as_completions(prompt, pairs)
            if missing:
                meter("drawing auxiliary pairs", totals.pairs, how.pairs * len(records))
    if missing:
        speed = {"tokens": tokens, "seconds": seconds, "tokens_a_second": tokens / seconds}
        keep(stage.run.path / "timing.json", speed)
        logger.info("drew %d tokens in %.1f s, %.0f a second", *speed.values())
    if not stage.done:
        stage.finish(files)
    return auxiliary, totals


def score(
    stage: Stage,
    source: PreferenceSource,
    records: Sequence[PreferenceRecord],
    votes: Sequence[PreferenceRecord],
    pairs: Sequence[Comparison],
    *,
    at_once: int,
    seed: int,
    inputs: dict[str, str],
) -> torch.Tensor:
    """g of `pairs`, (P,) float64, `at_once` of them between two files, or a fold; NaN where a judge gave no verdict.

    `pairs` are `comparisons` of `records`, whose rows errors name.
    """
    import torch

    from polyref.cli.progress import Meter
    from polyref.rewards.protocols import rows_named

    if (encoder := source.cross_encoder) is not None:
        files, starts = [stage.folder / "probabilities.json"], range(1)
        if not files[0].exists():
            with Meter("steps or pairs") as meter:
                options: dict[str, Any] = {"seed": seed, "folder": stage.folder / "folds", "inputs": inputs}
                keep(files[0], cross_fitted(encoder, records, pairs, progress=meter, **options).tolist())
    else:
        starts = range(0, len(pairs), at_once)
        files = [stage.folder / f"chunk-{number:06d}.json" for number in range(len(starts))]
    if any(not file.exists() for file in files):
        places = _places(records, len(pairs) // len(records))
        with opened(source, votes, stage.run.path / "judge.jsonl") as ask, Meter("pairs") as meter:
            for start, file in zip(starts, files, strict=True):
                if not file.exists():
                    with rows_named(places[start : start + at_once]):
                        said = ask(pairs[start : start + at_once]).tolist()
                    keep(file, [None if math.isnan(g) else g for g in said])
                meter("asking the preference model", min(start + at_once, len(pairs)), len(pairs))
    if not stage.done:
        stage.finish(files)
    values = [g for file in files for g in json.loads(file.read_text())]
    return torch.tensor([math.nan if g is None else g for g in values], dtype=torch.float64)


def _places(records: Sequence[PreferenceRecord], each: int) -> list[str]:
    """Where in the data each record's own pair and its `each` - 1 auxiliary pairs are from."""
    numbers = ["", *(f", auxiliary pair {number}" for number in range(1, each))]
    return [f"{record.source}, row {record.row}{number}" for record in records for number in numbers]


def keep(file: Path, value: Any) -> None:
    """Write `value` to `file` as JSON, whole or not at all."""
    from polyref.files import write_bytes

    write_bytes(file, (json.dumps(value, ensure_ascii=False) + "\n").encode())


def _chunks(records: Sequence[PreferenceRecord], prompts_at_once: int) -> list[list[int]]:
    """Indices of records, all those of a prompt in one chunk."""
    from polyref.data.sources import prompt_key

    groups: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault(prompt_key(record.prompt), []).append(i)
    some = list(groups.values())
    starts = range(0, len(some), prompts_at_once)
    return [[i for group in some[start : start + prompts_at_once] for i in group] for start in starts]


def _refuse_endless(totals: Totals, parameters: SamplingParameters, *, last: bool) -> None:
    if not totals.ended and (last or totals.completions >= _SURELY):
        what = f"none of {totals.completions} completions ended within {parameters.max_new_tokens} tokens"
        fix = "raise max_new_tokens, or give a policy that ends its turn"
        raise ModelError(what, where="sampling_policy", fix=fix)
