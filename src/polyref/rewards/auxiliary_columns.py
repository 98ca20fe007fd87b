"""What an auxiliary preference model says, put into the records that train with it.

auxiliary = [[("13.", "It is 14."), ...] for record in records]       # M pairs a record, drawn as its own pair was
pairs = comparisons(records, auxiliary)
g = cross_fit(records, fit, pairs=pairs, seed=0).probability          # or model(*zip(*pairs))
ready = with_auxiliary(records, auxiliary, g)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from polyref.data.auxiliary import check_auxiliary
from polyref.data.fields import Refusal
from polyref.data.records import RowError
from polyref.errors import DataError
from polyref.rewards.cross_fit import Comparison
from polyref.rewards.protocols import check_probabilities
from polyref.types import PreferenceRecord, Text

AuxiliaryPairs = Sequence[Sequence[tuple[Text, Text]]]
"""For each record, M pairs of completions of its prompt."""


def comparisons(records: Sequence[PreferenceRecord], auxiliary: AuxiliaryPairs) -> list[Comparison]:
    """For each record (chosen, rejected) and then its auxiliary pairs: the order in which `with_auxiliary` wants g of them."""
    _check_counts(records, auxiliary)
    return [
        Comparison(record.prompt, first, second)
        for record, pairs in zip(records, auxiliary, strict=True)
        for first, second in ((record.chosen, record.rejected), *pairs)
    ]


def with_auxiliary(
    records: Sequence[PreferenceRecord], auxiliary: AuxiliaryPairs, probabilities: Tensor
) -> list[PreferenceRecord]:
    """`records` with `auxiliary` and g of `comparisons(records, auxiliary)`, in [0, 1]: ready to train, or to be written.

    What was there of an earlier g is replaced. DataError where records have different numbers of auxiliary pairs, or none;
    RowError for a pair that data could not hold; ModelError for what is no probability, or another number of them.
    """
    _check_counts(records, auxiliary)
    values = check_probabilities(probabilities, sum(1 + len(pairs) for pairs in auxiliary), "with_auxiliary").tolist()
    found, start = [], 0
    for record, pairs in zip(records, auxiliary, strict=True):
        own, *others = values[start : start + 1 + len(pairs)]
        start += 1 + len(pairs)
        fields = {
            "predicted_probability": own,
            "auxiliary_1": tuple(first for first, _ in pairs),
            "auxiliary_2": tuple(second for _, second in pairs),
            "auxiliary_probability": tuple(others),
        }
        try:
            check_auxiliary(fields | {"prompt": record.prompt, "chosen": record.chosen})
        except Refusal as refusal:
            place = {"source": record.source, "row": record.row, "column": refusal.field}
            raise RowError(refusal.what, fix=refusal.fix, **place) from None  # type: ignore[arg-type]
        found.append(replace(record, **fields))
    return found


def _check_counts(records: Sequence[PreferenceRecord], auxiliary: AuxiliaryPairs) -> None:
    if len(auxiliary) != len(records):
        what = f"{len(auxiliary)} lists of auxiliary pairs for {len(records)} records"
        raise DataError(what, where="auxiliary", fix="give one list a record")
    counts = {len(pairs) for pairs in auxiliary}
    if len(counts) > 1 or 0 in counts:
        what = f"records have {', '.join(map(str, sorted(counts)))} auxiliary pairs"
        raise DataError(what, where="auxiliary", fix="give every record the same number, at least one")
