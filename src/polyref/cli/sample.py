"""`polyref sample`: prompts in; samples of a model, of a composition, or of its tilt by a reward out, and pairs made of them.

Two stages: draw (in chunks of prompts that are kept) and write.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from polyref.cli.sample_settings import MAY_CHANGE, PromptSettings, SampleSettings
from polyref.cli.sample_stages import draw, load_reward, make_pairs_of
from polyref.cli.sample_summary import summary_of, tell
from polyref.cli.training_run import pick
from polyref.errors import ConfigError

if TYPE_CHECKING:
    from polyref.data.prompt_rows import PromptRow
    from polyref.references.reference_set import ReferenceSet
    from polyref.stages import RunFolder

logger = logging.getLogger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """The verb's settings: prompts, what to draw from, and the reward."""
    parser.add_class_arguments(SampleSettings)
    parser.add_class_arguments(PromptSettings)


def run(settings: Namespace) -> None:
    """Draw and write; a killed run goes on with the same command."""
    values = vars(settings)
    own, prompts = SampleSettings(**pick(values, SampleSettings)), PromptSettings(**pick(values, PromptSettings))
    make_samples(own, prompts, {k: v for k, v in values.items() if k not in ("config", "output_dir")})


def make_samples(own: SampleSettings, source: PromptSettings, config: dict[str, Any]) -> dict[str, Any]:
    """One resumable run in `own.output_dir`; returns its summary, which is also in summary.json."""
    from polyref.samplers.sampled import pooled
    from polyref.stages import RunFolder

    run_dir = Path(own.output_dir)
    with RunFolder(run_dir, config, seeds={"seed": own.seed}, may_change=MAY_CHANGE) as folder:
        _refuse_existing(folder, own)
        prompts = source.load()
        references = pooled(own.references, prompts)
        inputs = _inputs(own, references, prompts)
        folder.refuse_changed(inputs, "write")
        kept = _with_room(own, references, prompts)
        stage = folder.stage("draw", inputs | {"prompts drawn for": str(len(kept))})
        reward = None if own.reward is None or stage.done else load_reward(own.reward)
        how = own.drawing
        most = f"{len(kept) * how.draws} completions of at most {own.max_new_tokens} tokens"
        logger.info("%d prompts: %s%s", len(kept), most, ", as far as the budget goes" if own.budget else "")
        found = draw(stage, own, kept, reward)
        writing = folder.stage("write", inputs | stage.outputs | {"pairs made": own.pairs_made})
        if writing.done:
            logger.info("%s is complete; nothing to do", run_dir)
        else:
            names = _write(folder, own, kept, found, len(prompts) - len(kept))
            writing.finish([run_dir / name for name in names], info={"depends_on": inputs})
        result: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
        tell(result, run_dir)
        return result


def _refuse_existing(folder: RunFolder, own: SampleSettings) -> None:
    """ConfigError for a file that no run of ours wrote: it stays as it is."""
    entry = json.loads((folder.path / "manifest.json").read_text())["stages"].get("write")
    names = (own.file_name, own.prompts_name, *([own.pairs_name] if own.pairing else []))
    for name in names if entry is None else ():
        if (folder.path / name).exists():
            raise ConfigError("is there already", where=str(folder.path / name), fix="name another file_name or output_dir")


def _inputs(own: SampleSettings, references: ReferenceSet, prompts: list[PromptRow]) -> dict[str, str]:
    """What the run depends on beyond its configuration, by the words that a refusal uses for it."""
    from polyref.data.tokenize import tokenizer_fingerprint
    from polyref.references.score import own_tokenizer
    from polyref.scoring.models import adapter_fingerprint, weights_fingerprint
    from polyref.stages import content_digest, plain

    inputs = {"prompts": content_digest([plain(row) for row in prompts])}
    for number, (member, needed) in enumerate(zip(references.members, references.needed(), strict=True), 1):
        if needed:
            adapter = adapter_fingerprint(str(member.adapter) if member.adapter else None)
            inputs[f"weights of reference {number}"] = weights_fingerprint(member.source) + adapter
            inputs[f"tokenizer of reference {number}"] = tokenizer_fingerprint(own_tokenizer(member))
    return inputs | ({"weights of the reward": own.reward.fingerprint} if own.reward is not None else {})


def _with_room(own: SampleSettings, references: ReferenceSet, prompts: list[PromptRow]) -> list[PromptRow]:
    """The prompts that leave room for completions. DataError where others may not be left out, or all would be."""
    from polyref.samplers.references import refuse_long, without_room

    long = without_room(prompts, references, own.max_new_tokens)
    if not own.leave_out or len(long) == len(prompts):
        refuse_long(prompts, long, own.max_new_tokens)
    dropped = set(long)
    return [row for i, row in enumerate(prompts) if i not in dropped]


def _write(
    folder: RunFolder, own: SampleSettings, prompts: list[PromptRow], found: list[tuple[Any, Any]], too_long: int
) -> list[str]:
    """The files, summary.json and the page; their names."""
    from polyref.data.write import write_preferences, write_rows
    from polyref.files import write_bytes
    from polyref.report.sample import write_sample_page

    paired = make_pairs_of(prompts, found, own) if own.pairing else None
    summary = summary_of(own, found, too_long, paired)
    names = [own.file_name, own.prompts_name]
    write_rows(folder.path / own.file_name, [row for _, samples in found for row in samples])
    write_rows(folder.path / own.prompts_name, [row for row, _ in found])
    if paired is not None:
        names.append(own.pairs_name)
        write_preferences(folder.path / own.pairs_name, paired.records)
    summary["files"] = names
    write_bytes(folder.path / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    write_sample_page(folder.path / "report.html", folder.path.name, summary, [row for row, _ in found])
    return [*names, "summary.json", "report.html"]
