"""What a run depends on beyond its configuration, by the words that a refusal uses for it: checksums of data and models."""

from __future__ import annotations

from collections.abc import Sequence

from polyref.data.records import record_to_row
from polyref.data.tokenize import tokenizer_fingerprint
from polyref.references.reference_set import ReferenceSet
from polyref.references.score import own_tokenizer
from polyref.scoring.models import (
    ModelSource,
    adapter_fingerprint,
    check_config,
    load_config,
    load_tokenizer,
    weights_fingerprint,
)
from polyref.stages import content_digest
from polyref.types import PreferenceRecord


def common_inputs(
    source: ModelSource, who: str, records: Sequence[PreferenceRecord], held_out: Sequence[PreferenceRecord]
) -> dict[str, str]:
    """What any training on pairs depends on; `who` is the model at `source` that is trained."""
    return {
        "training pairs": content_digest([record_to_row(record) for record in records]),
        "held-out pairs": content_digest([record_to_row(record) for record in held_out]),
        **model_inputs(source, who),
    }


def model_inputs(source: ModelSource, who: str) -> dict[str, str]:
    """The tokenizer and the weights of the model at `source`. ModelError unless it is a causal language model."""
    check_config(load_config(source), source.model)
    return {"tokenizer": tokenizer_fingerprint(load_tokenizer(source)), f"weights of the {who}": weights_fingerprint(source)}


def reference_inputs(references: ReferenceSet | None, what: str, tokenizer: str) -> dict[str, str]:
    """The weights of each of `references`, and its tokenizer where its fingerprint is not `tokenizer`."""
    inputs = {}
    for number, member in enumerate(references.members if references else (), 1):
        check_config(load_config(member.source), member.label)
        adapter = adapter_fingerprint(str(member.adapter) if member.adapter else None)
        inputs[f"weights of {what} {number}"] = weights_fingerprint(member.source) + adapter
        if (own := tokenizer_fingerprint(own_tokenizer(member))) != tokenizer:
            inputs[f"tokenizer of {what} {number}"] = own
    return inputs
