"""Votes become shares, ties halves; what is no vote is named by its row; and the shared data is read as it is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from polyref import load_preferences
from polyref.errors import DataError
from polyref.rewards.preference_model import from_votes
from polyref.rewards.votes import load_votes, vote_share


@pytest.mark.parametrize(
    ("votes", "chosen", "share"),
    [
        ([1, 1, 1], 1, 1.0),
        ([2, 2, 0], 2, 5 / 6),
        ([1, 2, 2], 2, 2 / 3),
        ([2, 2, 1], 1, 1 / 3),
        ([0, 0, 0], 1, 0.5),
        ([2], 1, 0.0),
    ],
)
def test_a_share_counts_ties_as_halves(votes: list[int], chosen: int, share: float) -> None:
    assert vote_share(votes, chosen) == share
    swapped = [{0: 0, 1: 2, 2: 1}[vote] for vote in votes]
    assert vote_share(swapped, 3 - chosen) == share


def row(**changes: Any) -> dict[str, Any]:
    return {"prompt": "p", "chosen": "a", "rejected": "b", "votes": [1, 1, 2], "chosen_position": 1} | changes


def test_records_know_their_share_whichever_side_won() -> None:
    rows = [row(), row(prompt="q", chosen_position=2), row(prompt="r", votes=(0, 1), chosen_probability=0.1)]
    records = load_votes(rows, prompt_format="chat")
    assert [record.chosen_probability for record in records] == [2 / 3, 1 / 3, 0.75]
    assert records[0].prompt == ({"role": "user", "content": "p"},)
    ties = [{"prompt": "p", "response1": "a", "response2": "b", "votes": [0, 1, 2]}]
    (tie,) = load_votes(ties, columns={"chosen": "response1", "rejected": "response2"}, chosen_position=1)
    assert (tie.chosen, tie.chosen_probability) == ("a", 0.5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"votes": []}, r"votes are \[\]; give a list of votes, each 1 or 2, or 0 for a tie"),
        ({"votes": None}, "votes are not given; give a list"),
        ({"votes": "112"}, "votes are '112'"),
        ({"votes": [1, 3]}, r"votes are \[1, 3\]"),
        ({"votes": [True, 1]}, r"votes are \[True, 1\]"),
        ({"votes": [1.0]}, r"votes are \[1.0\]"),
        ({"chosen_position": 0}, "the position of the chosen completion is 0; give 1 or 2"),
        ({"chosen_position": None}, "the position of the chosen completion is not given"),
        ({"chosen": 3}, "column chosen: is a number"),
    ],
)
def test_what_is_no_vote_is_refused_with_its_row(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=f"^memory, row 2[:,] ?{says}") as error:
        load_votes([row(), row(**changes)])
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="^memory: there are no rows"):
        load_votes([])


def test_the_votes_of_pandalm_make_a_preference_model(shared_data: Path) -> None:
    """The shares that the packaged copy of this file has, pair by pair, and ties of a majority beside them."""
    records = load_votes(shared_data / "pandalm-human" / "pairs.jsonl.gz")
    assert Counter(round(float(record.chosen_probability or 0), 6) for record in records) == {
        1: 792,
        0.833333: 27,
        0.666667: 69,
    }
    packaged = load_preferences("packaged:pandalm-human")
    for record, other in zip(records, packaged, strict=True):
        assert (record.prompt, record.chosen, record.rejected) == (other.prompt, other.chosen, other.rejected)
        assert record.chosen_probability == pytest.approx(other.chosen_probability, abs=1e-6)
    sides = {"chosen": "response1", "rejected": "response2"}
    ties = load_votes(shared_data / "pandalm-human" / "ties.jsonl.gz", columns=sides, chosen_position=1)
    shares = Counter(record.chosen_probability for record in ties)
    assert len(ties) == 105 and shares.keys() <= {1 / 3, 0.5, 2 / 3, 1 / 6 + 1 / 2}
    g = from_votes([*records, *ties])
    some = [record for record in (*records[::40], *ties[::20]) if record.chosen != record.rejected]
    texts = [r.prompt for r in some], [r.chosen for r in some], [r.rejected for r in some]
    forward, back = g(*texts), g(texts[0], texts[2], texts[1])
    assert (forward + back - 1).abs().max() < 1e-12 and 0.5 < float(forward.mean()) < 1
