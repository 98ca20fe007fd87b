"""What a round trains on, and the pairs that people, models and uncertainty make of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from polyref.data.sources import load_preferences
from polyref.errors import ConfigError, DataError, ModelError
from polyref.labelling import Desk, Vote
from polyref.labelling.pairs import left_of
from polyref.loops.label import Labeller, Paused, by_model, by_person, label
from polyref.loops.measure import distinct_bigrams, distinct_share
from polyref.loops.replay import Replay, mixed
from polyref.loops.uncertain import feature_distances
from polyref.samplers.pairs import Scored
from polyref.stages import RunFolder
from polyref.types import PreferenceRecord, Text


def records(source: str, count: int) -> list[PreferenceRecord]:
    ends = {"chosen_ended": False, "rejected_ended": True}
    return [PreferenceRecord(f"q{i}", f" good {i}", f" bad {i}", **ends, source=source, row=i) for i in range(1, count + 1)]


def ends_of(some: Sequence[PreferenceRecord]) -> list[tuple[bool | None, bool | None]]:
    return [(one.chosen_ended, one.rejected_ended) for one in some]


def test_all_rounds_and_all_offline_pairs_are_replayed_unless_told_otherwise() -> None:
    rounds, offline = [records("one", 3), records("two", 3), records("three", 4)], records("offline", 20)
    every = mixed(rounds, offline, Replay(), seed=0)
    assert [one.source for one in every] == ["offline"] * 20 + ["one"] * 3 + ["two"] * 3 + ["three"] * 4
    assert ends_of(every) == [(False, True)] * 30
    assert [one.source for one in mixed(rounds, offline, Replay(1, 0.3), seed=0)].count("offline") == 3
    assert {one.source for one in mixed(rounds, offline, Replay(0), seed=0)} == {"offline", "three"}
    halves = [mixed(rounds, offline, Replay(None, 0.5), seed=seed)[:10] for seed in (0, 0, 1)]
    assert halves[0] == halves[1] != halves[2] and len({one.row for one in halves[0]}) == 10
    assert len(mixed(rounds, offline, Replay(None, 0.9), seed=0)) == 30, "at most all there are"
    for given in ({"rounds": -1}, {"offline_share": 0.0}, {"offline_share": 1.0}):
        with pytest.raises(ConfigError):
            Replay(**given)  # type: ignore[arg-type]


def test_a_models_labels_turn_sides_and_ends_and_leave_out_what_it_does_not_know(tmp_path: Path) -> None:
    some = records("file", 3)
    with RunFolder(tmp_path / "run", {}) as folder:
        labeller = by_model(lambda pairs: torch.tensor([0.25, 0.75, math.nan], dtype=torch.float64), "three")
        found, counts = label(folder.stage("label-1"), some, labeller, 1)
        assert [(one.chosen, one.chosen_probability) for one in found] == [(" bad 1", 0.75), (" good 2", 0.75)]
        assert ends_of(found) == [(True, False), (False, True)] and counts == {"pairs": 2, "ties": 0, "unlabelled": 1}
        again = label(folder.stage("label-1"), some, lambda *_: pytest.fail("done already"), 1)
        assert again == (found, counts)
        with pytest.raises(DataError, match="none of 3 pairs of round 2 has a label"):
            label(folder.stage("label-2"), some, lambda *_: [], 2)


def test_a_model_that_fails_is_named_and_a_mended_one_goes_on(tmp_path: Path) -> None:
    some, says = records("file", 2), "asker: failed on 2 pairs: {}; mend it; the same command goes on from here"

    def asking(error: Exception) -> Labeller:
        def ask(pairs: object) -> torch.Tensor:
            raise error

        return by_model(ask, "asker")

    with RunFolder(tmp_path / "run", {}) as folder:
        with pytest.raises(ModelError, match=f"^{says.format('RuntimeError: server down for now')}$"):
            label(folder.stage("label-1"), some, asking(RuntimeError("server down\nfor now")), 1)
        with pytest.raises(ModelError, match="asker: failed on 2 pairs: ValueError: zip"):
            label(folder.stage("label-1"), some, by_model(lambda pairs: torch.ones(1), "asker"), 1)
        with pytest.raises(DataError, match="^ours, as it is$"):
            label(folder.stage("label-1"), some, asking(DataError("ours, as it is")), 1)
        found, _ = label(folder.stage("label-1"), some, by_model(lambda pairs: torch.ones(len(pairs)), "asker"), 1)
    assert [one.chosen_probability for one in found] == [1.0, 1.0]


def test_people_are_asked_until_all_have_a_vote_and_no_vote_is_lost(tmp_path: Path) -> None:
    some, asked = records("file", 2), list[int]()

    def ask(desk: Desk, number: int) -> str:
        asked.append(len(desk.missing()))
        pair = desk.missing()[0]
        desk.votes.cast(Vote(pair.id, "first", left_of(pair, desk.seed), desk.annotator))
        return "there"

    labeller = by_person(tmp_path, ask, seed=0, annotator="ann", question="?")
    with RunFolder(tmp_path / "run", {}) as folder:
        with pytest.raises(Paused, match="1 of 2 pairs of round 1 still lack a vote: there"):
            label(folder.stage("label-1"), some, labeller, 1)
        found, _ = label(folder.stage("label-1"), some, labeller, 1)
    assert asked == [2, 1] and [one.chosen for one in found] == [" bad 1", " bad 2"], "what sorts first"
    assert ends_of(found) == [(True, False)] * 2 and [one.chosen_probability for one in found] == [1.0, 1.0]
    assert load_preferences(tmp_path / "run/stages/label-1/labelled.jsonl") == found


class TwoFeatures:
    """The numbers of a's and of b's."""

    name = "two"

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> torch.Tensor:
        return torch.zeros(len(prompts), dtype=torch.float64)

    def features(self, prompts: Sequence[Text], completions: Sequence[Text]) -> torch.Tensor:
        return torch.tensor([[str(one).count("a"), str(one).count("b")] for one in completions], dtype=torch.float64)


def test_pairs_are_far_apart_where_earlier_pairs_say_little() -> None:
    scored = [Scored("p", ["", "aa", "b"], [0.0, 0.0, 0.0])]
    (apart,) = feature_distances(TwoFeatures(), [], 1.0)(scored)
    assert apart[0].tolist() == pytest.approx([0, 2, 1]) and apart[1, 2] == pytest.approx(math.sqrt(5))
    earlier = [PreferenceRecord("p", "aaaa", "")] * 6  # S = diag(1 + 96, 1)
    (apart,) = feature_distances(TwoFeatures(), earlier, 1.0)(scored)
    assert apart[0].tolist() == pytest.approx([0, 2 / math.sqrt(97), 1])
    broken = TwoFeatures()
    broken.features = lambda prompts, completions: torch.full((len(prompts), 2), math.nan)  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="not finite"):
        feature_distances(broken, [], 1.0)(scored)
    broken.features = lambda prompts, completions: [][1]  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="failed on the features of 3 completions: IndexError"):
        feature_distances(broken, [], 1.0)(scored)


def test_diversity_counts_different_texts_and_neighbours() -> None:
    assert distinct_share(["a b", "a b", "c"]) == pytest.approx(2 / 3) and math.isnan(distinct_share([]))
    assert distinct_bigrams(["a b a b", "a b"]) == pytest.approx(2 / 4) and math.isnan(distinct_bigrams(["a", ""]))
