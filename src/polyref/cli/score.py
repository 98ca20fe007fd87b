"""`polyref score`: preference pairs under K references, into the cache that `polyref train` reads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

from polyref.cli.settings import DataSettings
from polyref.references.reference_set import ReferenceSet

if TYPE_CHECKING:
    from polyref.references.score import ReferenceScores
    from polyref.types import PreferenceRecord

logger = logging.getLogger(__name__)


@dataclass
class ScoreSettings:
    """What to score, and how.

    Args:
        model: hub id or folder of the policy, whose tokenizer makes the token ids.
        references: the references that score.
        gguf_file: a GGUF file inside model.
        revision: revision of a hub model.
        trust_remote_code: run code that comes with the model's tokenizer.
        max_length: longest prompt + completion in tokens; use the one you will train with.
        truncation_mode: which end of a sequence that is too long is kept.
        prompt_format: as_is, chat (strings become one user and one assistant turn), or transcript (Human/Assistant turns).
        batch_size: prompts scored at once.
        cache_dir: folder of the cache; by default $POLYREF_CACHE or ~/.cache/polyref.
        output: also write one row a pair, with the log-probs of chosen and rejected under every reference, to this
            .parquet file.
    """

    model: str
    references: ReferenceSet
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    max_length: int | None = 1024
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"
    prompt_format: Literal["as_is", "chat", "transcript"] = "as_is"
    batch_size: int = 8
    cache_dir: str | None = None
    output: str | None = None


def add_arguments(parser: ArgumentParser) -> None:
    """The verb's settings."""
    parser.add_class_arguments(ScoreSettings)
    parser.add_class_arguments(DataSettings)


def run(settings: Namespace) -> None:
    """Score, and say how much was found in the cache and how fast the rest went."""
    from polyref.cli.progress import Meter
    from polyref.cli.training_run import pick
    from polyref.data.tokenize import tokenize_records
    from polyref.references.score import score_references
    from polyref.scoring.models import ModelSource, cache_home, load_tokenizer
    from polyref.training.auxiliary import plain_records

    values = vars(settings)
    own, data = ScoreSettings(**pick(values, ScoreSettings)), DataSettings(**pick(values, DataSettings))
    source = ModelSource(own.model, own.gguf_file, revision=own.revision, trust_remote_code=own.trust_remote_code)
    tokenizer = load_tokenizer(source)
    train, held_out = data.load(own.prompt_format)
    parts = [
        tokenize_records(records, tokenizer, max_length=own.max_length, truncation_mode=own.truncation_mode)
        for records in (train, plain_records(held_out))  # apart, as training scores them
        if records
    ]
    for tokens in parts:
        logger.info("%s", tokens.report)
    cache = Path(own.cache_dir) if own.cache_dir else cache_home() / "logprobs"
    with Meter("tokens") as meter:
        scores = [
            score_references(tokens, own.references, tokenizer, cache_dir=cache, batch_size=own.batch_size, progress=meter)
            for tokens in parts
        ]
    hits, misses = sum(part.hits for part in scores), sum(part.misses for part in scores)
    seconds = sum(part.seconds for part in scores)
    rate = f"{sum(part.tokens for part in scores) / seconds:.0f} tokens a second" if seconds else "nothing to score"
    share = 100 * hits / max(hits + misses, 1)
    logger.info("%d completions scored, %d found in the cache (hit rate %.1f%%); %s", misses, hits, share, rate)
    if own.output is not None:
        _write(Path(own.output), [record for tokens in parts for record in tokens.records], scores, own.references)


def _write(
    path: Path, records: Sequence[PreferenceRecord], scores: Sequence[ReferenceScores], references: ReferenceSet
) -> None:
    """One row a pair: where it came from, and its log-probs by reference, in nats."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from polyref.files import atomic_write

    table = pa.table(
        {
            "source": [record.source for record in records],
            "row": [record.row for record in records],
            "ref_chosen_logps": [row for part in scores for row in part.chosen.tolist()],
            "ref_rejected_logps": [row for part in scores for row in part.rejected.tolist()],
        },
        metadata={"references": repr([member.label for member in references.members])},
    )
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary)
    logger.info("wrote %s", path)
