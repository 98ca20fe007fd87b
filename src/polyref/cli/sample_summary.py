"""What `polyref sample` counts, and what it says at the end."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from polyref.cli.sample_settings import SampleSettings

if TYPE_CHECKING:
    from polyref.samplers.pairs import Paired

    Row = dict[str, Any]

logger = logging.getLogger(__name__)


def summary_of(
    own: SampleSettings, found: Sequence[tuple[Row, list[Row]]], too_long: int, paired: Paired | None
) -> dict[str, Any]:
    """What was drawn, what it took, and the numbers that say how far to believe it."""
    rows, samples = [row for row, _ in found], [one for _, some in found for one in some]
    proposals, accepted = (sum(row[name] for row in rows) for name in ("proposals", "accepted"))
    log_f = [row["log_f"][0] for row in rows if row["log_f"] and row["log_f"][0] is not None]
    summary: dict[str, Any] = {
        "references": [member.label for member in own.references.members],
        "weights": list(own.references.weights or ()),
        "composition": own.references.composition,
        "prompts": len(rows),
        "left_out": {"prompt too long": too_long, "no sample": sum(not row["samples"] for row in rows)},
        "methods": dict(sorted(Counter(row["method"] for row in rows).items())),
        "exact_prompts": sum(row["exact"] for row in rows),
        "short_prompts": sum(row["samples"] < own.n for row in rows),
        "noted_prompts": sum(not row["exact"] or row["samples"] < own.n for row in rows),
        "proposals": proposals,
        "accepted": accepted,
        "acceptance": accepted / proposals if proposals else None,
        "samples": len(samples),
        "ess": sum(row["ess"] for row in rows),
        "calls": sum(row["calls"] for row in rows),
        "share_ended": fmean(one["ended"] for one in samples) if samples else None,
        "log_f": {"lowest": min(log_f), "median": median(log_f), "highest": max(log_f)} if log_f else None,
    }
    if own.reward is not None:
        means = [_mean_reward(some) for _, some in found if some]
        tilt = {"beta": own.beta, "tilt": own.tilt, "r_max": own.r_max} if own.beta is not None else {}
        summary["reward"] = {"model": own.reward.model, "mean": fmean(means) if means else None} | tilt
    if paired is not None:
        summary["pairs"] = {
            "pairing": own.pairing,
            "pairs": len(paired.records),
            "ties": paired.ties,
            "prompts_without": len(paired.without),
        }
    return summary


def _mean_reward(samples: Sequence[Row]) -> float:
    top = max(one["log_weight"] for one in samples)
    weights = [math.exp(one["log_weight"] - top) for one in samples]
    return math.fsum(w * one["reward"] for w, one in zip(weights, samples, strict=True)) / math.fsum(weights)


def tell(summary: Mapping[str, Any], run_dir: Path) -> None:
    """The few numbers to look at first, and what to do next."""
    counts = (summary["samples"], summary["prompts"], summary["ess"], summary["proposals"], summary["calls"])
    logger.info("%d samples of %d prompts, worth %.1f draws, from %d proposals and %d calls", *counts)
    if (log_f := summary["log_f"]) is not None:
        logger.info("log F is %.2f in the median, from %.2f to %.2f", log_f["median"], log_f["lowest"], log_f["highest"])
    if summary["noted_prompts"]:
        logger.warning("%d prompts are approximate or short; %s says why", summary["noted_prompts"], summary["files"][1])
    for what, count in summary["left_out"].items():
        if count:
            logger.warning("%d prompts were left out: %s", count, what)
    if "pairs" in summary:
        told = summary["pairs"]
        logger.info("%d pairs, %d of them ties; %d prompts give none", told["pairs"], told["ties"], told["prompts_without"])
        logger.info("next: polyref train --model POLICY --data %s", run_dir / summary["files"][2])
    logger.info("the samples are in %s, the page in %s", run_dir / summary["files"][0], run_dir / "report.html")
