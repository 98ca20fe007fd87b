"""What an auxiliary preference model needs of the data and of the sampling policy, checked before anything is scored."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from polyref.data.auxiliary import AUXILIARY_FIELDS, check_auxiliary
from polyref.data.fields import READERS, Refusal
from polyref.data.records import RowError
from polyref.data.sources import check_alike
from polyref.data.tokenize import TokenizedPreferences, tokenize_for_reference
from polyref.errors import ConfigError, ReferenceSetError
from polyref.references.reference_set import ReferenceSet
from polyref.references.score import own_tokenizer
from polyref.types import PreferenceRecord

logger = logging.getLogger(__name__)


def auxiliary_records(records: Sequence[PreferenceRecord], objective: str) -> list[PreferenceRecord]:
    """`records`, each with all auxiliary columns, as many auxiliary pairs as the first, and no margin; DataError otherwise.

    Columns are read as those of a file are, for records made in memory: finite probabilities in [0, 1], one pair at least.
    A margin would enter the loss of data pairs alone, and auxiliary pairs would no longer stand for them.
    """
    for record in records:
        try:
            if all(getattr(record, name) is None for name in AUXILIARY_FIELDS):
                fix = f"give training rows {', '.join(AUXILIARY_FIELDS)}, or set objective to plain"
                raise Refusal(f"is missing, and objective {objective} needs it", fix, "auxiliary_1")
            if record.margin:
                raise Refusal(f"has no counterpart for auxiliary pairs under {objective}", "leave the column out", "margin")
            values: dict[str, Any] = {"prompt": record.prompt, "chosen": record.chosen}
            for name in AUXILIARY_FIELDS:
                values[name] = READERS[name](getattr(record, name))
            check_auxiliary(values)
        except Refusal as refusal:
            column = refusal.field or name
            raise RowError(refusal.what, source=record.source, row=record.row, column=column, fix=refusal.fix) from None
        check_alike(record, records[0], "auxiliary_1")
    return list(records)


def plain_records(records: Sequence[PreferenceRecord]) -> list[PreferenceRecord]:
    """`records` without auxiliary columns, so that nothing is computed for what is not used."""
    if all(getattr(record, name) is None for record in records for name in AUXILIARY_FIELDS):
        return list(records)
    logger.info("the auxiliary columns are not used: objective is plain, or the rows are for evaluation")
    bare: dict[str, Any] = dict.fromkeys(AUXILIARY_FIELDS)
    return [replace(record, **bare) for record in records]


def check_same_tokens(
    sampling_policy: ReferenceSet, data: TokenizedPreferences, policy_tokenizer: PreTrainedTokenizerBase
) -> None:
    """ReferenceSetError where a member of positive weight would score other tokens than those of `data`, the policy's.

    Its probability would be that of another event, and no denominator of an importance ratio. Templates and special tokens
    may differ, as long as the tokens of every completion are the same.
    """
    members = [member for member, counts in zip(sampling_policy.members, sampling_policy.needed(), strict=True) if counts]
    for member in members:
        own = own_tokenizer(member)
        scored = tokenize_for_reference(data.records, data.pairs, policy_tokenizer, own, system_prompt=member.system_prompt)
        for record, pair, other in zip(data.records, data.pairs, scored, strict=True):
            if other.completions != pair.completions:
                raise ReferenceSetError(
                    f"sampling policy {member.label} reads completions as other tokens than the policy does",
                    where=f"{record.source}, row {record.row}",
                    fix="give one with the policy's tokenizer: importance ratios are of token sequences",
                )


def check_sampling_policy(objective: str, sampling_policy: ReferenceSet | None) -> None:
    """ConfigError unless `sampling_policy` is there exactly where the objective weighs by it, and its law is normalised."""
    if (objective == "doubly_robust") != (sampling_policy is not None):
        if sampling_policy is None:
            raise ConfigError(
                "objective doubly_robust needs a sampling_policy", fix="name what the completions were drawn from"
            )
        raise ConfigError(f"sampling_policy has no effect with objective {objective}", fix="leave it out")
    if sampling_policy is not None and sampling_policy.composition == "geometric" and len(sampling_policy) > 1:
        what = "a geometric sampling_policy of several members is known up to a factor only"
        raise ConfigError(what, fix="draw from one model, or from an arithmetic set")
