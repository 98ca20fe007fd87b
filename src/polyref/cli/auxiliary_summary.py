"""What `polyref auxiliary` counts, and what it says at the end."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from polyref.samplers.auxiliary import Drawn

if TYPE_CHECKING:
    from polyref.types import PreferenceRecord, Text

logger = logging.getLogger(__name__)

_SURE = 1e-6


@dataclass(frozen=True)
class Totals:
    """Over all chunks: completions drawn and their tokens, how many ended, pairs drawn again, pairs kept, distinct ones."""

    completions: int = 0
    tokens: int = 0
    ended: int = 0
    equal: int = 0
    pairs: int = 0

    def plus(self, counts: Mapping[str, int]) -> Totals:
        """With those of one more chunk."""
        return Totals(**{field.name: getattr(self, field.name) + counts[field.name] for field in fields(Totals)})


def counts_of(drawn: Drawn) -> dict[str, int]:
    """The counts of one chunk."""
    pairs = sum(map(len, drawn.pairs))
    return asdict(Totals(drawn.completions, drawn.tokens, drawn.ended, drawn.equal, pairs))


def drawing_summary(records: Sequence[PreferenceRecord], totals: Totals | None) -> dict[str, Any]:
    """What was drawn, and how like the data it is: mean characters of completions, and distinct pairs.

    `totals` is None where pairs were picked, not drawn.
    """
    from polyref.data.auxiliary import auxiliary_completions
    from polyref.data.sources import prompt_key

    drawn = [
        (prompt_key(record.prompt), *sorted((prompt_key(first), prompt_key(second))))
        for record in records
        for first, second in zip(record.auxiliary_1 or (), record.auxiliary_2 or (), strict=True)
    ]
    found: dict[str, Any] = {
        "auxiliary_pairs": len(drawn),
        "distinct_pairs": len(set(drawn)),
        "mean_characters": {
            "data": fmean(_characters(text) for record in records for text in (record.chosen, record.rejected)),
            "auxiliary": fmean(_characters(text) for record in records for text in auxiliary_completions(record)),
        },
    }
    if totals is not None:
        found |= {
            "completions_drawn": totals.completions,
            "tokens_drawn": totals.tokens,
            "share_ended": totals.ended / totals.completions,
            "equal_pairs_redrawn": totals.equal,
        }
    return found


def agreement(records: Sequence[PreferenceRecord]) -> dict[str, float]:
    """How g agrees with the labels z: mean probability of what the label prefers, log loss in nats, share on the label's side.

    Log loss is -z log g - (1-z) log(1-g), g kept 1e-6 from 0 and 1; 0.693 is that of g = 1/2. Ties, and labels that prefer
    neither, count one half.
    """
    given, losses, right = [], [], []
    for record in records:
        label = 1.0 if record.chosen_probability is None else record.chosen_probability
        g = float(record.predicted_probability or 0.0)
        given.append(0.5 if label == 0.5 else g if label > 0.5 else 1 - g)
        near = min(max(g, _SURE), 1 - _SURE)
        losses.append(-label * math.log(near) - (1 - label) * math.log(1 - near))
        right.append(0.5 if label == 0.5 or g == 0.5 else float((g > 0.5) == (label > 0.5)))
    return {
        "mean": fmean(given),
        "log_loss": fmean(losses),
        "accuracy": fmean(right),
    }


def tell(summary: Mapping[str, Any], run_dir: Path) -> None:
    """The few numbers to look at first, and what to do next."""
    g, held_out = summary["preference_model"], summary["held_out_pairs"]
    logger.info(
        "g gives what the labels prefer %.3f on average, log loss %.3f (0.693 is that of g = 1/2)%s",
        g["mean"],
        g["log_loss"],
        ", each pair by a fit that never saw its prompt" if g["kind"] == "cross_encoder" else "",
    )
    if "completions_drawn" in summary:
        lengths = summary["mean_characters"]
        counts = (summary["completions_drawn"], 100 * summary["share_ended"], summary["equal_pairs_redrawn"])
        logger.info("%d completions drawn, %.1f%% ended; %d pairs of equal ones were drawn again", *counts)
        logger.info("completions have %.0f characters in the data, %.0f here", lengths["data"], lengths["auxiliary"])
    for what, count in summary["left_out"].items():
        if count:
            logger.warning("%d pairs were left out: %s", count, what)
    data = f"--data {run_dir / summary['files'][0]}" + (f" --eval_data {run_dir / summary['files'][1]}" if held_out else "")
    logger.info("next: polyref train --model POLICY %s --objective variance_reduced", data)


def _characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)
