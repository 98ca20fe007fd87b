"""What `polyref iterate` leaves in its folder at the end, and what it says as it goes."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyref.cli.iterate_settings import IterateSettings
from polyref.cli.loop_plan import held_to
from polyref.cli.multistep_summary import judges_of, warn_of_judges

if TYPE_CHECKING:
    from polyref.cli.iterate_plan import Offline
    from polyref.data.prompt_rows import PromptRow
    from polyref.loops.iterate import Outcome
    from polyref.stages import RunFolder
    from polyref.training.config import PreferenceConfig
    from polyref.types import PreferenceRecord

    Row = Mapping[str, Any]

logger = logging.getLogger(__name__)


def summary_of(
    own: IterateSettings,
    args: PreferenceConfig,
    found: Outcome,
    prompts: Sequence[PromptRow],
    held_out: Sequence[PromptRow],
    offline: Offline,
    fitted: Sequence[PreferenceRecord],
) -> dict[str, Any]:
    """What was done, why it ended, and the rows of the start and of each round."""
    members = own.reference_set.members
    return {
        "model": own.model,
        "references": [member.label for member in members],
        "weights": list(own.reference_set.weights or ()),
        "composition": own.reference_set.composition,
        **held_to(own.moving.told, own.source, own.reference_set),
        "reward": own.rewards.told,
        "pessimism": own.pessimism,
        "gold": own.gold.model if own.gold is not None else None,
        "label": own.label,
        "pairing": own.pairing,
        "enhancer": asdict(own.enhancer) if own.enhancer is not None else None,
        "loss_type": args.loss_type,
        "beta": own.beta,
        "replay": "all rounds" if own.replay is None else f"{own.replay} rounds before",
        "from_start": own.from_start,
        "prompts": len(prompts),
        "offline_pairs": len(offline.pairs),
        "offline_left_out": offline.left_out,
        **judges_of([*prompts, *offline.pairs], held_out, fitted),
        "labels": sum(row["pairs"] for row in found.rows[1:]),
        "tokens": sum(row["tokens"] for row in found.rows[1:]),
        "asked_rounds": own.rounds,
        "stop": asdict(found.stop) if found.stop is not None else None,
        "final_round": found.kept,
        "rounds": list(found.rows),
    }


def write(folder: RunFolder, own: IterateSettings, summary: Row, found: Outcome) -> list[Path]:
    """The final policy, summary.json and the page; where they are."""
    from polyref.files import write_bytes
    from polyref.report.iterate import write_iterate_page
    from polyref.scoring.models import load_tokenizer
    from polyref.training.checkpoints import save_policy

    policy = found.policies[found.kept]
    save_policy(policy.load(), load_tokenizer(own.source), folder.path / "model", merge_adapter=own.merge_adapter)
    write_bytes(folder.path / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    write_iterate_page(folder.path / "report.html", folder.path.name, summary)
    return [folder.path / name for name in ("model", "summary.json", "report.html")]


def tell_row(row: Row) -> None:
    """The start or a round in a line of the table."""
    columns = [("proxy", "reward"), ("gold", "gold"), ("KL to the anchor", "kl_anchor"), ("tokens", "length")]
    columns += [("distinct", "distinct"), ("wins", "win_rate")]
    cells = [f"{word} {row[name][0]:.3f}" for word, name in columns if row[name] is not None]
    each = [f"{one[0]:.3f}" for one in row["kl_each"] if one is not None]
    cells += [f"KL to each reference {', '.join(each)}"] if each else []
    logger.info("%s: %s", f"round {row['round']}" if row["round"] else "start", "; ".join(cells))


def tell(summary: Row, run_dir: Path) -> None:
    """Why it ended, and where things are."""
    logger.info("%d labels and %d tokens in all; anchor: %s", summary["labels"], summary["tokens"], summary["anchor"])
    warn_of_judges(summary)
    if unscored := summary["rounds"][-1]["unscored"]:
        of = "the KL leaves out %d completions that a reference gives no probability or cannot read, and is too small"
        logger.warning(of, unscored)
    if (stop := summary["stop"]) is not None:
        kept = f"round {stop['keep']}" if stop["keep"] else "the start"
        logger.warning("ended after round %d of %d: %s", stop["at"], summary["asked_rounds"], stop["why"])
        logger.warning("the final policy is that of %s, the last before it", kept)
    logger.info("the policy is in %s, the page in %s", run_dir / "model", run_dir / "report.html")
