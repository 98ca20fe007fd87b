"""`polyref validate`: what preference data holds, and every row of it that cannot be used."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

from polyref.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class ValidateSettings:
    """What to check, and how it will be read.

    Args:
        data: hub id, folder saved by datasets, .jsonl, .jsonl.gz, .json or .parquet file. The same as DATA without a flag.
        eval_data: held-out pairs, in the same forms; prompts that are in both are counted.
        split: split of a hub id or saved folder, or several, as in train,test.
        columns: other column names, as in {prompt: question}.
        prompt_format: as_is, chat (strings become one user and one assistant turn), or transcript (Human/Assistant turns).
        model: hub id or folder whose tokenizer measures lengths in tokens; without it they are in characters.
        gguf_file: a GGUF file inside model.
        revision: revision of a hub model.
        trust_remote_code: run code that comes with the model's tokenizer.
        max_length: with a model, also count the pairs that this many tokens would cut or drop.
        truncation_mode: which end of a sequence that is too long is kept.
        data_revision: revision of a hub data set.
    """

    data: str | None = None
    eval_data: str | None = None
    split: str = "train"
    columns: dict[str, str] | None = None
    prompt_format: Literal["as_is", "chat", "transcript"] = "as_is"
    model: str | None = None
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    max_length: int | None = None
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"
    data_revision: str | None = None


def add_arguments(parser: ArgumentParser) -> None:
    """The verb's settings, and the data as words without a flag."""
    parser.add_argument(
        "sources", nargs="*", default=[], metavar="DATA", help="What to check; several are checked against one another."
    )
    parser.add_class_arguments(ValidateSettings)


def run(settings: Namespace) -> None:
    """Write the report to standard output. DataError, with counts, where any row cannot be used."""
    from polyref.cli.training_run import pick
    from polyref.data.validate import validate_preferences
    from polyref.data.validation_text import render_report

    own = ValidateSettings(**pick(vars(settings), ValidateSettings))
    sources = _sources(settings.sources, own)
    tokenizer = _tokenizer(own)
    report = validate_preferences(
        sources[0] if len(sources) == 1 else _by_name(sources),
        splits=own.split.split(","),
        prompt_format=own.prompt_format,
        columns=own.columns,
        tokenizer=tokenizer,
        max_length=own.max_length,
        truncation_mode=own.truncation_mode,
        revision=own.data_revision,
    )
    sys.stdout.write(render_report(report))
    sys.stdout.flush()
    if report.problems:
        what = f"{report.bad_rows} of {sum(report.rows.values())} rows cannot be used"
        raise DataError(what, where=", ".join(sources), fix="mend or remove the rows that the report names")


def _tokenizer(own: ValidateSettings) -> PreTrainedTokenizerBase | None:
    """The tokenizer of `model`. ConfigError for settings that are about a model where there is none."""
    from polyref.scoring.models import ModelSource, load_tokenizer

    if own.model is not None:
        source = ModelSource(own.model, own.gguf_file, revision=own.revision, trust_remote_code=own.trust_remote_code)
        return load_tokenizer(source)
    if own.max_length is not None:
        raise ConfigError("max_length is in tokens, and no model says whose", fix="give --model, or leave max_length out")
    for name in ("gguf_file", "revision", "trust_remote_code"):
        if getattr(own, name):
            raise ConfigError(f"{name} is of a model, and there is none", fix=f"give --model, or leave {name} out")
    return None


def _sources(words: Sequence[str], settings: ValidateSettings) -> list[str]:
    """All that is to be read, in order: words win over `data`."""
    data = [settings.data] if settings.data is not None else []
    held_out = [settings.eval_data] if settings.eval_data is not None else []
    sources = list(dict.fromkeys([*(words or data), *held_out]))
    if not sources:
        raise ConfigError(
            "there is no data to check", where="polyref validate", fix="name it, as in polyref validate pairs.jsonl"
        )
    return sources


def _by_name(sources: Sequence[str]) -> Mapping[str, str]:
    return {source: source for source in sources}
