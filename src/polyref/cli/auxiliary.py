"""`polyref auxiliary`: preference pairs in; the same pairs out, with auxiliary pairs and what a preference model says of all.

Three stages: draw (auxiliary pairs of every prompt, in chunks that are kept), score (g of every pair) and write.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from polyref.cli.auxiliary_settings import MAY_CHANGE, AuxiliarySettings
from polyref.cli.auxiliary_stages import draw, score
from polyref.cli.auxiliary_summary import Totals, agreement, drawing_summary, tell
from polyref.cli.preference_source import PreferenceSource, fresh
from polyref.cli.settings import DataSettings
from polyref.cli.training_run import pick
from polyref.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch

    from polyref.samplers.auxiliary import Pair
    from polyref.stages import RunFolder
    from polyref.types import PreferenceRecord

    Records = list[PreferenceRecord]

logger = logging.getLogger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """The verb's settings: data, the sampling policy, and the preference model."""
    parser.add_class_arguments(AuxiliarySettings)
    parser.add_class_arguments(PreferenceSource)
    parser.add_class_arguments(DataSettings)


def run(settings: Namespace) -> None:
    """Draw, score and write; a killed run goes on with the same command."""
    values = vars(settings)
    own = AuxiliarySettings(**pick(values, AuxiliarySettings))
    source = PreferenceSource(**pick(values, PreferenceSource))
    data = DataSettings(**pick(values, DataSettings))
    _check(own, source, data)
    make_auxiliary(own, source, data, {k: v for k, v in values.items() if k not in ("config", "output_dir")})


def make_auxiliary(
    own: AuxiliarySettings, source: PreferenceSource, data: DataSettings, config: dict[str, Any]
) -> dict[str, Any]:
    """One resumable run in `own.output_dir`; returns its summary, which is also in summary.json."""
    from polyref.rewards.auxiliary_columns import comparisons
    from polyref.stages import RunFolder

    run_dir = Path(own.output_dir)
    with RunFolder(run_dir, config, seeds={"seed": own.seed}, may_change=MAY_CHANGE) as folder:
        complete = _complete(folder, own)
        records, held_out = data.load(own.prompt_format)
        votes = data.read(source.votes, own.prompt_format) if source.votes is not None else []
        _check_shares(votes)
        inputs = _inputs(own, source, records, held_out, votes)
        folder.refuse_changed(inputs, "write")
        kept = _with_room(own, records)
        if not complete:
            _prepare(own, source, kept)
        auxiliary, totals, drawn = _drawn(folder, own, kept, votes, inputs)
        again = {"tries": str(source.judge.tries)} if source.judge is not None else {}
        stage, pairs = folder.stage("score", inputs | drawn | again), comparisons(kept, auxiliary)
        options: dict[str, Any] = {"at_once": own.prompts_at_once * (1 + own.pairs), "seed": own.seed, "inputs": inputs}
        probabilities = score(stage, source, kept, votes, pairs, **options)
        writing = folder.stage("write", inputs | stage.outputs)
        if writing.done:
            logger.info("%s is complete; nothing to do", run_dir)
        else:
            ready = _judged(own, kept, auxiliary, probabilities)
            summary = _summary(own, source, ready, totals, {"prompt too long": len(records) - len(kept)}, len(kept))
            names = _write(folder, own, ready, held_out, summary)
            writing.finish([run_dir / name for name in names], info={"depends_on": inputs})
        result: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
        tell(result, run_dir)
        return result


def _check(own: AuxiliarySettings, source: PreferenceSource, data: DataSettings) -> None:
    """What the settings cannot mean together."""
    from polyref.samplers.references import check_mixture

    if source.kind == "votes" and own.sampling_policy is not None:
        what = "votes are on pairs that exist, and a sampling_policy would draw others"
        raise ConfigError(what, fix="leave sampling_policy out, or take another preference model")
    if source.kind == "votes" and own.of_drawing:
        raise ConfigError(f"{own.of_drawing[0]} has no effect with votes, as nothing is drawn", fix="leave it out")
    if source.votes is not None and Path(source.votes).resolve() == Path(data.data).resolve():
        what = "votes and data are one source, and g would hold the labels that it corrects"
        raise ConfigError(what, where=source.votes, fix="give the votes of other annotators")
    if source.kind != "votes" and own.sampling_policy is None:
        raise ConfigError("there is no sampling_policy", fix="name what the completions of the data were drawn from")
    if own.sampling_policy is not None:
        check_mixture(own.sampling_policy)
        if own.member_per == "pair" and sum(own.sampling_policy.needed()) == 1:
            raise ConfigError("member_per has no effect with a sampling_policy of one member", fix="leave it out")


def _check_shares(votes: Records) -> None:
    """RowError for a vote without a share: read as a label, it would be a g that is sure."""
    from polyref.data.records import RowError

    for vote in votes:
        if vote.chosen_probability is None:
            fix = "give the share of the annotators who preferred chosen"
            raise RowError("is missing", source=vote.source, row=vote.row, column="chosen_probability", fix=fix)


def _complete(folder: RunFolder, own: AuxiliarySettings) -> bool:
    """Whether the run has ended already. A file that no run of ours wrote stays as it is: ConfigError."""
    entry = json.loads((folder.path / "manifest.json").read_text())["stages"].get("write")
    for name in (own.file_name, own.held_out_name):
        if entry is None and (folder.path / name).exists():
            raise ConfigError("is there already", where=str(folder.path / name), fix="name another file_name or output_dir")
    return entry is not None and entry["state"] == "done"


def _inputs(
    own: AuxiliarySettings, source: PreferenceSource, records: Records, held_out: Records, votes: Records
) -> dict[str, str]:
    """What the run depends on beyond its configuration, by the words that a refusal uses for it."""
    from polyref.data.records import record_to_row
    from polyref.data.tokenize import tokenizer_fingerprint
    from polyref.references.score import own_tokenizer
    from polyref.scoring.models import adapter_fingerprint, weights_fingerprint
    from polyref.stages import content_digest

    inputs = {}
    for what, some in (("training pairs", records), ("held-out pairs", held_out), ("votes", votes)):
        inputs[what] = content_digest([record_to_row(record) for record in some])
    for number, member in enumerate(own.sampling_policy.members if own.sampling_policy else (), 1):
        adapter = adapter_fingerprint(str(member.adapter) if member.adapter else None)
        inputs[f"weights of sampling policy {number}"] = weights_fingerprint(member.source) + adapter
        inputs[f"tokenizer of sampling policy {number}"] = tokenizer_fingerprint(own_tokenizer(member))
    return inputs | source.inputs()


def _with_room(own: AuxiliarySettings, records: Records) -> Records:
    """The records whose prompts leave room for completions. DataError where others may not be left out, or all would be."""
    from polyref.samplers.references import refuse_long, without_room

    if own.sampling_policy is None:
        return records
    long = without_room(records, own.sampling_policy, own.max_new_tokens)
    if not own.leave_out or len(long) == len(records):
        refuse_long(records, long, own.max_new_tokens)
    dropped = set(long)
    return [record for i, record in enumerate(records) if i not in dropped]


def _prepare(own: AuxiliarySettings, source: PreferenceSource, records: Records) -> None:
    """Say how much work there is, once what can be refused has been: drawing may take hours."""
    from tempfile import TemporaryDirectory

    from polyref.data.records import RowError
    from polyref.data.sources import by_prompt
    from polyref.rewards.cross_fit import prompt_folds
    from polyref.rewards.judge import Judge

    for record in records:
        if record.margin:
            place: dict[str, Any] = {"source": record.source, "row": record.row, "column": "margin"}
            raise RowError("has no counterpart for auxiliary pairs", fix="leave the column out", **place)
    work = f"g of {len(records) * (1 + own.pairs)} pairs"
    if (encoder := source.cross_encoder) is not None:
        prompt_folds(records, folds=encoder.folds, seed=own.seed)
        fresh(encoder, own.seed)
        each = len(records) - len(records) // encoder.folds
        work += f" after {encoder.folds} fits to about {each} pairs, {encoder.epochs} times each"
    for part in source.rewards:
        part.load()
    if source.judge is not None:
        with TemporaryDirectory() as unused, Judge(source.judge, Path(unused) / "judge.jsonl"):
            pass
    if own.sampling_policy is not None:
        count = 2 * own.pairs * len(records)
        most = f"{count} completions of at most {own.max_new_tokens} tokens, {count * own.max_new_tokens} in all"
        work = f"{most}; then {work}"
    logger.info("%d pairs of %d prompts: %s", len(records), len(by_prompt(records)), work)


def _drawn(
    folder: RunFolder, own: AuxiliarySettings, records: Records, votes: Records, inputs: dict[str, str]
) -> tuple[list[list[Pair]], Totals | None, dict[str, str]]:
    """The auxiliary pairs of each record, drawn or picked among those voted on; what it took; what a later stage rests on."""
    from polyref.samplers.auxiliary import other_pairs

    if own.sampling_policy is None:
        return other_pairs(records, votes, own.pairs, seed=own.seed), None, {}
    stage = folder.stage("draw", inputs | {"pairs drawn for": str(len(records))})
    auxiliary, totals = draw(stage, own.drawing(own.sampling_policy), records)
    return auxiliary, totals, stage.outputs


def _judged(own: AuxiliarySettings, records: Records, auxiliary: list[list[Pair]], probabilities: torch.Tensor) -> Records:
    """The records with their columns, without those that a judge gave no verdict on: ModelError where these must stay."""
    from polyref.rewards.auxiliary_columns import with_auxiliary

    of_record = probabilities.view(len(records), -1)
    judged = of_record.isfinite().all(1)
    rows = judged.nonzero()[:, 0].tolist()
    if len(rows) < len(records) and not (own.leave_out and rows):
        first = records[int((~judged).nonzero()[0])]
        what = f"no verdict on {len(records) - len(rows)} pairs or auxiliary pairs of theirs; this is the first"
        fix = "raise judge.tries, take a judge that keeps to the form, or set leave_out"
        raise ModelError(what, where=f"{first.source}, row {first.row}", fix=fix)
    return with_auxiliary([records[i] for i in rows], [auxiliary[i] for i in rows], of_record[judged].flatten())


def _summary(
    own: AuxiliarySettings,
    source: PreferenceSource,
    ready: Records,
    totals: Totals | None,
    left_out: dict[str, int],
    asked: int,
) -> dict[str, Any]:
    """What was made, of what, and the numbers that say how far to believe it."""
    from polyref.data.sources import by_prompt

    found: dict[str, Any] = {
        "pairs": len(ready),
        "prompts": len(by_prompt(ready)),
        "left_out": left_out | {"no verdict": asked - len(ready)},
        "auxiliary_pairs_each": own.pairs,
    }
    if (policy := own.sampling_policy) is not None:
        labels = [member.label for member in policy.members]
        found |= {"sampling_policy": labels, "weights": list(policy.weights or ()), "member_per": own.member_per}
    return found | drawing_summary(ready, totals) | {"preference_model": {"kind": source.kind} | agreement(ready)}


def _write(folder: RunFolder, own: AuxiliarySettings, ready: Records, held_out: Records, summary: dict[str, Any]) -> list[str]:
    """The files and summary.json; their names."""
    from polyref.data.write import write_preferences
    from polyref.files import write_bytes
    from polyref.training.auxiliary import plain_records

    names = [own.file_name]
    write_preferences(folder.path / own.file_name, ready)
    if held_out:
        names.append(own.held_out_name)
        write_preferences(folder.path / own.held_out_name, plain_records(held_out))
    summary |= {"held_out_pairs": len(held_out), "files": names}
    write_bytes(folder.path / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    return [*names, "summary.json"]
