"""The settings of `polyref label`, checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from polyref.cli import checks
from polyref.data.write import check_written
from polyref.errors import ConfigError

if TYPE_CHECKING:
    from polyref.types import PreferenceRecord

MAY_CHANGE = ("how", "finish", "annotator", "port", "sheet")
"""What changes neither the pairs nor how they are shown: one run may be voted on by several people, in several ways."""


@dataclass
class PairSettings:
    """Where pairs come from.

    Args:
        data: hub id, folder saved by datasets, .jsonl, .jsonl.gz, .json or .parquet file. Its own labels are not shown or kept.
        split: split of a hub id or saved folder.
        columns: other column names, as in {prompt: question}.
        limit: use only so many pairs, the first ones.
        data_revision: revision of a hub data set.
        prompt_format: as_is, chat (strings become one user and one assistant turn), or transcript (Human/Assistant turns).
    """

    data: str
    split: str = "train"
    columns: dict[str, str] | None = None
    limit: int | None = None
    data_revision: str | None = None
    prompt_format: Literal["as_is", "chat", "transcript"] = "as_is"

    def load(self) -> list[PreferenceRecord]:
        """The pairs, with the labels that they came with."""
        from polyref.data.sources import load_preferences

        return load_preferences(
            self.data,
            split=self.split,
            prompt_format=self.prompt_format,
            columns=self.columns,
            limit=self.limit,
            revision=self.data_revision,
        )


@dataclass
class LabelSettings:
    """Who is asked, how, and where the labels go.

    Args:
        output_dir: the run folder.
        how: page serves a page to vote on in a browser; file writes a file to vote in, and reads it once it is there.
        question: what the annotator is asked about two completions.
        annotator: the name that votes are kept under; each annotator is asked about every pair.
        finish: take the votes that there are, and ask for none.
        port: of the page; by default any that is free.
        sheet: what the file to vote in is, csv or jsonl.
        seed: of which completion is shown on the left, or as A.
        file_name: the file of labelled pairs in the run folder: .jsonl, .jsonl.gz or .parquet.
    """

    output_dir: str
    how: Literal["page", "file"] = "page"
    question: str = "Which completion is better?"
    annotator: str = ""
    finish: bool = False
    port: int = 0
    sheet: Literal["csv", "jsonl"] = "csv"
    seed: int = 0
    file_name: str = "labelled.jsonl"

    def __post_init__(self) -> None:
        from polyref.labelling.votes import check_annotator

        checks.named(self.output_dir)
        if not self.question.strip():
            raise ConfigError("question is empty", fix="say what the annotator is to decide")
        check_annotator(self.annotator)
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port is {self.port}", fix="give a port below 65536, or 0 for any that is free")
        checks.whole("seed", self.seed)
        check_written(self.file_name)
        checks.own_file(self.file_name, ("votes.jsonl", "metrics.jsonl", self.sheet_name))

    @property
    def sheet_name(self) -> str:
        """The file to vote in, one an annotator."""
        return f"annotate{'-' if self.annotator else ''}{self.annotator}.{self.sheet}"
