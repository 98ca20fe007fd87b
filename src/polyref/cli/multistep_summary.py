"""What `polyref multistep` leaves in its folder at the end, and what it says."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyref.cli.loop_plan import held_to
from polyref.cli.multistep_plan import ANCHOR
from polyref.cli.multistep_settings import MultistepSettings

if TYPE_CHECKING:
    from polyref.data.prompt_rows import PromptRow
    from polyref.loops.policies import Policy
    from polyref.stages import RunFolder
    from polyref.training.config import PreferenceConfig
    from polyref.types import PreferenceRecord

    Row = Mapping[str, Any]

logger = logging.getLogger(__name__)


def summary_of(
    own: MultistepSettings,
    args: PreferenceConfig,
    rows: Sequence[Row],
    prompts: Sequence[PromptRow],
    held_out: Sequence[PromptRow],
    fitted: Sequence[PreferenceRecord],
) -> dict[str, Any]:
    """What was done, and the rows of the start and of each step."""
    equal = own.equal_steps
    return {
        "model": own.model,
        "references": [member.label for member in own.anchor.members],
        "weights": list(own.anchor.weights or ()),
        "composition": own.anchor.composition,
        **held_to(ANCHOR, own.source, own.anchor),
        "reward": own.rewards.told,
        "pessimism": own.pessimism,
        "loss_type": args.loss_type,
        "labels": own.labels,
        "pairing": own.pairing,
        "beta": own.beta,
        "schedule": f"{equal} equal in 1/beta" if equal is not None else f"adapted to acceptance {own.acceptance:g}",
        "reached": rows[-1]["beta"] == own.beta,
        "correct": own.correct,
        "prompts": len(prompts),
        **judges_of(prompts, held_out, fitted),
        "proposals": sum(row["proposals"] for row in rows[1:]),
        "tokens": sum(row["tokens"] for row in rows[1:]),
        "steps": list(rows),
    }


def judges_of(
    trained: Sequence[PromptRow | PreferenceRecord], held_out: Sequence[PromptRow], fitted: Sequence[PreferenceRecord]
) -> dict[str, Any]:
    """How many prompts that judge are `trained` on too, or are in bonus_data, the pairs `fitted`; and what judges, in words."""
    from polyref.data.sources import prompt_key

    trained_on, apart, known = ({prompt_key(row.prompt) for row in some} for some in (trained, held_out, fitted))
    shared, seen = len(trained_on & apart), len(known & (apart or trained_on))
    also = [f"{shared} of them trained on too"] * (shared > 0) + [f"{seen} of them in bonus_data"] * (seen > 0)
    judges = f"{len(held_out)} held-out prompts" if held_out else "the prompts trained on"
    told = judges + (f" ({', '.join(also)})" if also else "")
    return {"shared_prompts": shared, "bonus_prompts": seen, "judged_on": told}


def warn_of_judges(summary: Row) -> None:
    """Say so where the policy, or the reward, was made of what judges it."""
    if summary.get("shared_prompts") or summary.get("bonus_prompts"):
        logger.warning("judged on %s: what it gained there flatters", summary["judged_on"])


def write(folder: RunFolder, own: MultistepSettings, summary: Row, policy: Policy) -> list[Path]:
    """The policy, summary.json and the page; where they are."""
    from polyref.files import write_bytes
    from polyref.report.multistep import write_multistep_page
    from polyref.scoring.models import load_tokenizer
    from polyref.training.checkpoints import save_policy

    save_policy(policy.load(), load_tokenizer(own.source), folder.path / "model", merge_adapter=own.merge_adapter)
    write_bytes(folder.path / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    write_multistep_page(folder.path / "report.html", folder.path.name, summary)
    return [folder.path / name for name in ("model", "summary.json", "report.html")]


def tell(summary: Row, run_dir: Path) -> None:
    """The start and each step in a line, and what is to be mended."""
    for row in summary["steps"]:
        gold = f", gold {row['gold'][0]:.3f}" if row["gold"] is not None else ""
        kl = f"{row['kl'][0]:.3f}" if row["kl"] is not None else "unknown"
        at = "start" if not row["step"] else f"step {row['step']}, beta {row['beta']:.4g}"
        logger.info("%s: reward %.3f%s, KL to the anchor %s nats", at, row["reward"][0], gold, kl)
    logger.info("%d proposals and %d tokens in all", summary["proposals"], summary["tokens"])
    last = summary["steps"][-1]
    warn_of_judges(summary)
    for row in summary["steps"][1:]:
        if row.get("above_r_max"):
            of = "step %d: rewards of %d prompts are above r_max, so that their tilt is approximate; raise it"
            logger.warning(of, row["step"], row["above_r_max"])
    if last.get("unscored"):
        of = "the KL leaves out %d completions that a reference gives no probability or cannot read, and is too small"
        logger.warning(of, last["unscored"])
    if not summary["reached"]:
        reached = f"{summary['beta']:g} was not reached: the last step is at {summary['steps'][-1]['beta']:.4g}"
        logger.warning("beta %s; raise most_steps, or lower acceptance", reached)
    logger.info("the policy is in %s, the page in %s", run_dir / "model", run_dir / "report.html")
