"""`polyref label`: preference pairs in, a person's votes on them, and the pairs labelled by these out.

Votes are on disk before they are confirmed: a run that is killed or left goes on with the same command.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from polyref.cli.label_settings import MAY_CHANGE, LabelSettings, PairSettings
from polyref.cli.training_run import pick
from polyref.errors import ConfigError, DataError

if TYPE_CHECKING:
    from polyref.labelling.desk import Desk
    from polyref.labelling.votes import Vote
    from polyref.stages import RunFolder
    from polyref.types import PreferenceRecord

logger = logging.getLogger(__name__)

GRACE = 5.0
"""Seconds in which the last vote on the page can be taken back."""


def add_arguments(parser: ArgumentParser) -> None:
    """The verb's settings, and the pairs."""
    parser.add_class_arguments(LabelSettings)
    parser.add_class_arguments(PairSettings)


def run(settings: Namespace) -> None:
    """Ask, and write once all have been asked; the same command goes on."""
    values = vars(settings)
    own, source = LabelSettings(**pick(values, LabelSettings)), PairSettings(**pick(values, PairSettings))
    label(own, source, {k: v for k, v in values.items() if k not in ("config", "output_dir")})


def label(own: LabelSettings, source: PairSettings, config: dict[str, Any]) -> dict[str, Any] | None:
    """One resumable run in `own.output_dir`; returns its summary, which is also in summary.json, or None while votes lack."""
    from polyref.labelling import Desk, Votes, pairs_of
    from polyref.stages import RunFolder

    run_dir = Path(own.output_dir)
    with RunFolder(run_dir, config, seeds={"seed": own.seed}, may_change=MAY_CHANGE) as folder:
        records = source.load()
        _refuse_existing(folder, own)
        with Votes(run_dir / "votes.jsonl") as votes:
            desk = Desk(pairs_of(records), votes, seed=own.seed, annotator=own.annotator, question=own.question)
            if not own.finish:
                ask(desk, own.how, run_dir / own.sheet_name, own.port)
            if (missing := desk.missing()) and not own.finish:
                logger.info("%d of %d pairs still lack a vote", len(missing), desk.total)
                return None
            counted = [vote for vote in votes.all() if vote.id in desk.pairs]
        return _finish(folder, own, records, counted)


def ask(desk: Desk, how: str, file: Path, port: int) -> str:
    """Ask about what lacks a vote, on the page or in `file`, which is read whenever it is there; says what is to be done next.

    Where every vote there is is a skip, these pairs are asked about again.
    """
    if how == "page" or not file.exists():
        desk.ask_again()
    if missing := desk.missing():
        logger.info("%d of %d pairs have a vote", desk.total - len(missing), desk.total)
    if how == "file":
        if missing or file.exists():
            ask_in_file(desk, file)
        return f"vote in {file} and run the same command again"
    if missing:
        ask_on_page(desk, port)
    return "run the same command again, and vote"


def ask_on_page(desk: Desk, port: int) -> None:
    """Serve the page until every pair has a vote."""
    from polyref.cli.progress import Meter
    from polyref.labelling import served

    with served(desk, port=port, grace=GRACE) as address:
        logger.info("vote at %s", address)
        logger.info("every vote is kept at once; Ctrl-C leaves, and the same command goes on")
        with Meter("pairs") as meter:
            desk.wait(lambda done, total: meter("voted", done, total), grace=GRACE)
    logger.info("all %d pairs have a vote; the page has ended", desk.total)


def ask_in_file(desk: Desk, path: Path) -> None:
    """Take the votes in the file `path`, or write it for them."""
    from polyref.labelling import read_sheet, write_sheet

    if path.exists():
        before = desk.votes.of(desk.annotator)
        given = read_sheet(path, desk.pairs.values(), seed=desk.seed, annotator=desk.annotator)
        for vote in given:
            if before.get(vote.id) != vote:
                desk.votes.cast(vote)
        logger.info("%s: %d votes", path, len(given))
        if missing := desk.missing():
            logger.info("fill in column vote of the others (A, B, tie or skip) and run the same command again;")
            logger.info("if %d rows have gone from the file, remove it: what lacks a vote is written anew", len(missing))
    else:
        write_sheet(path, desk.missing(), seed=desk.seed)
        logger.info("wrote %s; fill in its column vote (A, B, tie or skip) and run the same command again", path)


def _refuse_existing(folder: RunFolder, own: LabelSettings) -> None:
    """ConfigError for a file that no run of ours wrote: it stays as it is."""
    entry = json.loads((folder.path / "manifest.json").read_text())["stages"].get("write")
    if entry is None and (folder.path / own.file_name).exists():
        raise ConfigError(
            "is there already", where=str(folder.path / own.file_name), fix="name another file_name or output_dir"
        )


def _finish(folder: RunFolder, own: LabelSettings, records: list[PreferenceRecord], votes: list[Vote]) -> dict[str, Any]:
    """The labelled pairs and summary.json, which is returned. DataError where no pair has a label."""
    from polyref.data.write import write_preferences
    from polyref.files import write_bytes
    from polyref.labelling import label_records
    from polyref.stages import content_digest, plain

    labelled, missing = label_records(records, votes)
    if not labelled:
        what = f"no pair has a label: {len(votes)} votes, all of them skips" if votes else "no pair has a vote"
        fix = f"run it again without finish, and vote on the page or in {own.sheet_name}"
        raise DataError(what, where=str(folder.path / "votes.jsonl"), fix=fix)
    inputs = {"pairs": content_digest(plain(records)), "votes": content_digest(plain(votes))}
    stage, names = folder.stage("write", inputs), [own.file_name, "summary.json"]
    if stage.done:
        logger.info("%s is complete; nothing to do", folder.path)
    else:
        write_preferences(folder.path / own.file_name, labelled)
        summary = _summary(labelled, missing, votes) | {"files": names}
        write_bytes(folder.path / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        stage.finish([folder.path / name for name in names])
    result: dict[str, Any] = json.loads((folder.path / "summary.json").read_text())
    logger.info("%d pairs labelled, %d without a label: %s", len(labelled), missing, folder.path / own.file_name)
    return result


def _summary(labelled: list[PreferenceRecord], missing: int, votes: list[Vote]) -> dict[str, Any]:
    """Counts, and the share of decided votes for what was shown on the left: far from 1/2, a place was voted for."""
    from polyref.labelling.votes import CHOICES

    decided = [vote for vote in votes if vote.choice in ("first", "second")]
    return {
        "labelled": len(labelled),
        "unlabelled": missing,
        "ties": sum(record.chosen_probability == 1 / 2 for record in labelled),
        "votes": {choice: sum(vote.choice == choice for vote in votes) for choice in CHOICES},
        "annotators": len({vote.annotator for vote in votes}),
        "left_preferred": sum(vote.choice == vote.left for vote in decided) / len(decided) if decided else None,
    }
