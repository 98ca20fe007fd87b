"""Votes become shares by content, whatever label the data came with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from labelling_world import some_records
from polyref.labelling.labels import label_records, shares
from polyref.labelling.pairs import pair_of
from polyref.labelling.votes import Vote
from polyref.types import PreferenceRecord


def votes_on(record: PreferenceRecord, *choices: str) -> list[Vote]:
    return [Vote(pair_of(record).id, choice, "first", f"a{i}") for i, choice in enumerate(choices)]


@pytest.mark.parametrize(
    ("choices", "share"),
    [
        (["first"], 1.0),
        (["second"], 0.0),
        (["tie"], 0.5),
        (["first", "skip"], 1.0),
        (["first", "second", "tie"], 0.5),
        (["first", "first", "second"], 2 / 3),
        (["second", "tie"], 0.25),
    ],
)
def test_a_share_is_over_annotators(choices: list[str], share: float) -> None:
    (record,) = some_records(1)
    pair, votes = pair_of(record), votes_on(record, *choices)
    assert shares(votes) == {pair.id: share}
    ((labelled,), missing) = label_records([record], votes)
    assert missing == 0 and labelled.chosen_probability == pytest.approx(max(share, 1 - share))
    assert labelled.chosen == (pair.first if share >= 0.5 else pair.second) != labelled.rejected
    assert labelled.margin is None and (labelled.prompt, labelled.row) == (record.prompt, record.row)


def test_labels_of_the_data_make_no_difference() -> None:
    said = {"predicted_probability": 0.75, "chosen_ended": False, "rejected_ended": True}
    records = [replace(record, **said) for record in some_records()]
    other = {"chosen_probability": 0.1, "predicted_probability": 0.25, "chosen_ended": True, "rejected_ended": False}
    turned = [replace(r, chosen=r.rejected, rejected=r.chosen, **other) for r in records]
    votes = [vote for i, record in enumerate(records) for vote in votes_on(record, ("first", "second", "tie")[i % 3])]
    assert label_records(records, votes) == label_records(turned, votes)
    for labelled in label_records(records, votes)[0]:
        of_better = 0.75 if records[labelled.row].chosen == labelled.chosen else 0.25
        assert labelled.predicted_probability == of_better
        assert (labelled.chosen_ended, labelled.rejected_ended) == (of_better == 0.25, of_better == 0.75)


def test_what_nobody_decided_is_left_out_and_counted() -> None:
    records = some_records(4)
    votes = [*votes_on(records[0], "first"), *votes_on(records[1], "skip", "skip"), Vote("p-of-other-data", "first", "first")]
    labelled, missing = label_records([*records, records[0]], votes)
    assert [record.row for record in labelled] == [0, 0] and missing == 3
