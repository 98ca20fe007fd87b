"""No vote that was confirmed is lost: not to a kill, a full disk, a second process, threads, or a change of mind."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from labelling_world import some_pairs
from polyref.errors import ConfigError, RunFolderError
from polyref.labelling import Desk
from polyref.labelling.votes import Vote, Votes, check_annotator


def filled(path: Path) -> list[Vote]:
    """Three votes, one of them changed and one taken back."""
    with Votes(path) as votes:
        for vote in (Vote("p1", "first", "first"), Vote("p2", "tie", "second"), Vote("p3", "skip", "first", "ann")):
            votes.cast(vote)
        votes.cast(Vote("p1", "second", "first"))
        votes.take_back(Vote("p2", "tie", "second"))
        return votes.all()


def test_the_last_vote_counts_and_all_are_there_again(tmp_path: Path) -> None:
    kept = filled(tmp_path / "votes.jsonl")
    assert kept == [Vote("p3", "skip", "first", "ann"), Vote("p1", "second", "first")]
    with Votes(tmp_path / "votes.jsonl") as votes:
        assert votes.all() == kept and list(votes.of("")) == ["p1"] and list(votes.of("ann")) == ["p3"]
        assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 5, "what was changed stays on record"


def test_a_line_torn_anywhere_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    kept, whole = filled(path), path.read_bytes()
    last = b'{"id": "p9", "choice": "first", "left": "first", "annotator": ""}\n'
    for cut in range(len(last) + 1):
        path.write_bytes(whole + last[:cut])
        with Votes(path) as votes:
            added = [Vote("p9", "first", "first")] if cut >= len(last) - 1 else []
            assert votes.all() == kept + added
            votes.cast(Vote("p4", "tie", "first"))
        with Votes(path) as votes:
            assert votes.all() == [*kept, *added, Vote("p4", "tie", "first")]


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "7",
        "[",
        '{"id": "p", "choice": "left", "left": "first"}',
        '{"id": "p", "choice": "tie", "left": "A"}',
        '{"id": 1, "choice": "tie", "left": "first"}',
        "",
    ],
)
def test_a_line_that_is_no_vote_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    filled(path)
    damaged = path.read_bytes() + line.encode() + b"\n"
    path.write_bytes(damaged)
    with pytest.raises(RunFolderError, match=r"votes\.jsonl, line 6: is no vote; mend or remove the line"):
        Votes(path)
    assert path.read_bytes() == damaged
    path.write_bytes(damaged[: -len(line) - 1])
    Votes(path).close()


def test_a_vote_that_cannot_be_written_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "votes.jsonl"
    kept, content = filled(path), path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with Votes(path) as votes:
        with monkeypatch.context() as broken:
            broken.setattr(os, "fsync", full)
            with pytest.raises(RunFolderError, match="No space left on device; free some space"):
                votes.cast(Vote("p5", "first", "first"))
        assert votes.all() == kept and path.read_bytes() == content
        votes.cast(Vote("p5", "first", "first"))
        assert "p5" in votes.of("")


def test_one_process_at_a_time_and_none_after_the_end(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    with Votes(path) as votes, pytest.raises(RunFolderError, match="is in use by another process"):
        Votes(path)
    assert not list(tmp_path.iterdir()), "no votes, no file"
    with pytest.raises(RunFolderError, match="is closed"):
        votes.cast(Vote("p", "tie", "first"))
    votes.close()


def test_threads_lose_nothing(tmp_path: Path) -> None:
    given = [Vote(f"p{i}", "first", "first", f"a{i % 3}") for i in range(60)]
    with Votes(tmp_path / "votes.jsonl") as votes, ThreadPoolExecutor(8) as pool:
        list(pool.map(votes.cast, given))
    with Votes(tmp_path / "votes.jsonl") as votes:
        assert sorted(map(repr, votes.all())) == sorted(map(repr, given))


def test_skipped_pairs_are_asked_about_again_only_where_nothing_at_all_has_a_label(tmp_path: Path) -> None:
    with Votes(tmp_path / "votes.jsonl") as votes:
        first, second = pairs = some_pairs(2)
        ann, bob = (Desk(pairs, votes, seed=0, annotator=name) for name in ("ann", "bob"))
        votes.cast(Vote("gone", "first", "first", "ann"))  # of a pair that the data no longer holds
        bob.vote(first.id, "skip")
        ann.vote(first.id, "skip")
        ann.ask_again()
        assert ann.missing() == [second], "half-way through nothing is asked again"
        ann.vote(second.id, "skip")
        ann.ask_again()
        assert ann.missing() == pairs and bob.missing() == [second] and "gone" in votes.of("ann")
        ann.vote(first.id, "tie")
        ann.vote(second.id, "skip")
        ann.ask_again()
        assert ann.missing() == []


@pytest.mark.parametrize("name", ["a/b", "..", ".", "a b", "é", "x" * 65, "-a", "a\n"])
def test_an_annotators_name_can_name_a_file(name: str) -> None:
    with pytest.raises(ConfigError, match="annotator is .*; give at most 64 letters"):
        check_annotator(name)
    check_annotator("")
    check_annotator("ann-2.b")
