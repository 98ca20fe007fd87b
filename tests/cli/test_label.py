"""`polyref label`: votes on a page or in a file become labels, several people's become shares, and a kill costs no vote."""

from __future__ import annotations

import csv
import io
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cli_world import Outcome, World, assert_ends_in_one_line, assert_refused, table
from labelling_world import post, vote_for
from polyref import labelling
from polyref.data.sources import load_preferences


def words(world: World, **settings: Any) -> list[str]:
    """`polyref label` of the world's pairs, whose own labels say yes."""
    pairs = world.path / "pairs.jsonl"
    usual = {"data": pairs if pairs.exists() else world.pairs(), "output_dir": world.path / "labels"} | settings
    return ["label", *(str(word) for name, value in usual.items() for word in (f"--{name}", value))]


@pytest.fixture
def voting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Have somebody vote on every page that is served, for the completions that begin alike."""
    wanted: list[str] = []
    serve = labelling.served

    @contextmanager
    def served(*arguments: Any, **settings: Any) -> Iterator[str]:
        with serve(*arguments, **settings) as address:
            annotator = threading.Thread(target=vote_for, args=(address, wanted[-1]))
            annotator.start()
            yield address
            annotator.join()

    monkeypatch.setattr(labelling, "served", served)
    monkeypatch.setattr("polyref.cli.label.GRACE", 0.2)
    yield wanted.append


def labelled(world: World, name: str = "labelled.jsonl") -> list[tuple[str, float | None]]:
    return [(str(r.chosen)[:3], r.chosen_probability) for r in load_preferences(world.path / "labels" / name)]


def fill_in(path: Path, vote: Callable[[dict[str, str]], str]) -> None:
    rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(row | {"vote": vote(row)} for row in rows)


def said(outcome: Outcome, code: int = 0) -> str:
    assert outcome.code == code, outcome.err
    return outcome.err


def test_a_page_is_served_until_every_pair_has_a_vote(
    world: World, voting: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    voting("no")
    said(world.run(words(world)))
    assert (
        re.search(r"vote at http://127\.0\.0\.1:\d+/[\w-]{20,}/\n", caplog.text) and "all 12 pairs have a vote" in caplog.text
    )
    assert labelled(world) == [("no ", 1.0)] * 12, "whatever the data said"
    summary = json.loads((world.path / "labels" / "summary.json").read_text())
    assert summary["labelled"] == 12 and summary["votes"] == {"first": 12, "second": 0, "tie": 0, "skip": 0}
    assert 0 < summary["left_preferred"] < 1 and summary["annotators"] == 1
    before = world.tree()
    caplog.clear()
    said(world.run(words(world)))
    assert "is complete; nothing to do" in caplog.text and "vote at" not in caplog.text and world.tree() == before


def test_several_annotators_make_shares(world: World, voting: Callable[[str], None]) -> None:
    for name, wanted in (("ann", "no"), ("bob", "yes"), ("eve", "no")):
        voting(wanted)
        said(world.run(words(world, annotator=name)))
    assert labelled(world) == [("no ", pytest.approx(2 / 3))] * 12
    voted = [json.loads(line) for line in (world.path / "labels" / "votes.jsonl").read_text().splitlines()]
    assert len(voted) == 36 and {line["annotator"] for line in voted} == {"ann", "bob", "eve"}


def test_a_file_is_written_filled_in_and_read(world: World, caplog: pytest.LogCaptureFixture) -> None:
    sheet = world.path / "labels" / "annotate.csv"
    said(world.run(words(world, how="file")))
    assert "12 of 12 pairs still lack a vote" in caplog.text and not (world.path / "labels" / "labelled.jsonl").exists()
    fill_in(sheet, lambda row: "" if "0" in row["prompt"] else "A" if row["A"].startswith("yes") else "b")
    said(world.run(words(world, how="file")))
    assert "2 of 12 pairs still lack a vote" in caplog.text
    said(world.run(words(world, how="file", finish="true")))
    assert labelled(world) == [("yes", 1.0)] * 10
    fill_in(sheet, lambda row: "tie" if "0" in row["prompt"] else "skip" if "1" in row["prompt"] else row["vote"])
    said(world.run(words(world, how="file")))
    assert labelled(world) == [("no ", 0.5), *[("yes", 1.0)] * 4] * 2, "the file changed, and so do the labels"
    summary = json.loads((world.path / "labels" / "summary.json").read_text())
    assert (summary["labelled"], summary["unlabelled"], summary["ties"]) == (10, 2, 2)


def test_votes_of_a_page_and_of_a_file_add_up(world: World, voting: Callable[[str], None]) -> None:
    said(world.run(words(world, how="file", sheet="jsonl", annotator="ann")))
    sheet = world.path / "labels" / "annotate-ann.jsonl"
    rows = [json.loads(line) for line in sheet.read_text().splitlines()]
    sheet.write_text("".join(json.dumps(row | {"vote": "tie" if i < 5 else None}) + "\n" for i, row in enumerate(rows)))
    said(world.run(words(world, how="file", sheet="jsonl", annotator="ann")))
    voting("yes")
    said(world.run(words(world, annotator="ann")))
    assert labelled(world)[:6] == [("no ", 0.5)] * 5 + [("yes", 1.0)]


def test_a_file_that_is_there_is_read_though_every_pair_has_a_vote(world: World, voting: Callable[[str], None]) -> None:
    said(world.run(words(world, how="file")))
    voting("yes")
    said(world.run(words(world)))
    assert labelled(world) == [("yes", 1.0)] * 12
    fill_in(world.path / "labels" / "annotate.csv", lambda row: "A" if row["A"].startswith("no") else "B")
    said(world.run(words(world, how="file")))
    assert labelled(world) == [("no ", 1.0)] * 12, "what the file says replaces what was said on the page"


@pytest.mark.parametrize("how", ["page", "file"])
def test_where_all_was_skipped_the_same_command_asks_again(how: str, world: World, voting: Callable[[str], None]) -> None:
    sheet = world.path / "labels" / "annotate.csv"
    said(world.run(words(world, how="file")))
    fill_in(sheet, lambda row: "skip")
    skips = world.run(words(world, how="file"))
    assert_ends_in_one_line(skips, "no pair has a label: 12 votes, all of them skips", "or in annotate.csv")
    sheet.unlink()
    if how == "page":
        voting("yes")
        said(world.run(words(world)))
    else:
        said(world.run(words(world, how="file")))
        fill_in(sheet, lambda row: "A" if row["A"].startswith("yes") else "B")
        said(world.run(words(world, how="file")))
    assert labelled(world) == [("yes", 1.0)] * 12


def test_more_pairs_ask_for_what_is_missing_only(world: World, voting: Callable[[str], None]) -> None:
    rows = [{"prompt": f"question {i}?", "chosen": f"yes, {i}", "rejected": f"no {i}"} for i in range(5)]
    world.pairs(*rows[:3])
    voting("yes")
    said(world.run(words(world)))
    world.pairs(*rows[1:])
    voting("no")
    said(world.run(words(world)))
    assert labelled(world) == [("yes", 1.0)] * 2 + [("no ", 1.0)] * 2


@table(
    {
        "no such data": ({"data": "gone.jsonl"}, "gone.jsonl", "no such file"),
        "no votes to finish with": ({"finish": "true"}, "votes.jsonl", "no pair has a vote", "vote"),
        "an annotator with a slash": ({"annotator": "a/b"}, "annotator is 'a/b'"),
        "a port too high": ({"port": 65536}, "port is 65536"),
        "a kind of file": ({"file_name": "labels.csv"}, "labels.csv", "name one of .jsonl"),
        "the file of votes": ({"file_name": "votes.jsonl"}, "file_name is votes.jsonl"),
        "a way that is none": ({"how": "phone"}, "how", "page"),
        "no question": ({"question": " "}, "question is empty"),
        "no run folder": ({"output_dir": " "}, "output_dir is empty"),
    }
)
def test_bad_settings_are_refused(given: dict[str, Any], says: tuple[str, ...], world: World) -> None:
    world.pairs()
    assert_refused(world, words(world, **given), says)


def test_what_is_wrong_in_a_run_is_refused(world: World, voting: Callable[[str], None]) -> None:
    said(world.run(words(world, how="file")))
    fill_in(world.path / "labels" / "annotate.csv", lambda row: "left" if "3" in row["prompt"] else "A")
    before = world.tree()
    refused = world.run(words(world, how="file"))
    assert_ends_in_one_line(refused, "annotate.csv, row 5, column vote: is 'left'; give A, B, tie or skip")
    assert_ends_in_one_line(world.run(words(world, seed=1)), "was made with another configuration: seed 0 -> 1")
    assert {name for name, content in world.tree().items() if before.get(name) != content} == set()
    fill_in(world.path / "labels" / "annotate.csv", lambda row: "skip")
    assert_ends_in_one_line(world.run(words(world, how="file")), "no pair has a label: 12 votes, all of them skips")
    votes = world.path / "labels" / "votes.jsonl"
    votes.write_text(votes.read_text().replace("skip", "left", 1))
    assert_ends_in_one_line(world.run(words(world)), "votes.jsonl, line 1: is no vote; mend or remove the line")


def test_a_file_of_somebody_else_stays(world: World) -> None:
    (world.path / "labels").mkdir()
    world.file("labels/labelled.jsonl", "mine\n")
    assert_refused(world, words(world), ["labelled.jsonl", "is there already", "name another file_name"])


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_in_the_middle_loses_no_vote(end: signal.Signals, world: World) -> None:
    command = [sys.executable, "-m", "polyref.cli.main", *words(world)]
    confirmed: dict[str, str] = {}
    states = []
    for cast in (5, 4):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=world.environment) as running:
            assert running.stderr
            address = next(line.split()[-1] for line in running.stderr if line.startswith("vote at "))
            state = post(address, "next")[1]
            states.append(state["done"])
            for _ in range(cast):
                pair = state["pair"]
                status, state = post(address, "vote", {"id": pair["id"], "answer": "left"})
                assert status == 200
                confirmed[pair["id"]] = pair["left"]
            running.send_signal(end)
            rest = running.stderr.read()
            assert running.wait(60) == (1 if end == signal.SIGINT else -signal.SIGKILL)
        assert end == signal.SIGKILL or rest.endswith("polyref: interrupted; the same command goes on from here\n")
    assert states == [0, 5] and len(confirmed) == 9
    said(world.run(words(world, finish="true")))
    records = load_preferences(world.path / "labels" / "labelled.jsonl")
    assert sorted(str(record.chosen) for record in records) == sorted(confirmed.values())
