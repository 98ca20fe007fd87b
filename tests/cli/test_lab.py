"""`polyref lab` as a person meets it: the list, one experiment, all of them, a kill in between, and bad input."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from cli_world import World, assert_refused
from polyref import files
from polyref.files import write_bytes
from polyref.theory import experiments
from polyref.theory.experiments import Experiment, Progress
from polyref.theory.planner import load_constants
from polyref.theory.regression import estimates, fit_slope
from polyref.theory.results import Curve, Estimate, ExperimentResult, Guide, Measured, Panel, Table

SIZES = (10.0, 20.0, 40.0)
NAMES = ("reverse-gap", "second", "third")
Ran = list[tuple[str, int, int]]


def quick(name: str, ran: Ran) -> Experiment:
    """An experiment of no time at all, that tells what it was asked."""

    def run(replicates: int, seed: int, progress: Progress) -> ExperimentResult:
        ran.append((name, replicates, seed))
        values = [[(1 + (seed + r) % 5) / n for r in range(replicates)] for n in SIZES]
        progress(replicates, replicates)
        found = estimates(values)
        cells = [Estimate(*one) for one in zip(found.value, found.low, found.high, strict=True)]
        return ExperimentResult(
            name,
            f"Title of {name}",
            "How fast?",
            "As 1/n.",
            f"{name} was measured.",
            "agrees",
            (Panel("p", "pairs", "gap", (Curve.of("mean", SIZES, found),), (Guide(-1.0, "1/n"),)),),
            Table(("pairs", "gap"), tuple(zip(SIZES, cells, strict=True))),
            (fit_slope(SIZES, values, name="gap", claimed=-1.0),),
            {"replicates": replicates, "seed": seed, "pairs": [10, 20, 40], "reward_range": 1.0},
            measured=(Measured(name, 0.9, 1.5, 1.0, 2.0),) if name == "reverse-gap" else (),
        )

    return Experiment(name, f"Title of {name}", run, default_replicates=200, seconds=60.0)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, world: World) -> Ran:
    """What was run, in order, of three quick experiments that stand in for the real ones."""
    monkeypatch.chdir(world.path)
    told: Ran = []
    monkeypatch.setattr(experiments, "EXPERIMENTS", {name: quick(name, told) for name in NAMES})
    return told


def test_the_list_names_titles_and_times(world: World, ran: Ran) -> None:
    shown = world.run(["lab", "list"])
    assert (shown.code, shown.err, ran) == (0, "", [])
    assert [line.split()[0] for line in shown.out.splitlines()] == [*NAMES, "all"]
    assert "60 s  Title of second" in shown.out and "180 s  all of them" in shown.out
    assert world.tree() == {}


def test_one_experiment_prints_and_writes_what_it_found(world: World, ran: Ran) -> None:
    done = world.run(["lab", "second", "--replicates", 400, "--seed", 3, "--output_dir", "here"])
    assert (done.code, done.err, ran) == (0, "", [("second", 400, 3)])
    assert done.out.startswith("1 to run, about 120 s on two processor cores\n")
    assert "AGREES: second was measured." in done.out and "-1 [-1, -1]" in done.out
    here = world.path / "here"
    assert sorted(file.name for file in here.iterdir()) == [
        "lab.json",
        *(f"second.{end}" for end in ("csv", "json", "png", "svg")),
    ]
    kept = json.loads((here / "second.json").read_text(encoding="utf-8"))
    assert kept["asked"]["seed"] == 3 and kept["result"]["slopes"][0]["slope"] == -1.0
    assert "seconds" not in json.dumps(kept)
    rows = list(csv.reader((here / "second.csv").read_text(encoding="utf-8").splitlines()))
    assert rows[0] == ["pairs", "gap", "gap low", "gap high"] and len(rows) == 4
    assert (here / "second.png").read_bytes().startswith(b"\x89PNG") and b"<svg" in (here / "second.svg").read_bytes()


def test_all_goes_on_where_it_was_killed(world: World, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = world.run(["lab", "all", "--output_dir", "whole"])
    assert whole.code == 0 and [name for name, _, _ in ran] == list(NAMES)
    ran.clear()

    broken = quick("second", ran)

    def interrupted(replicates: int, seed: int, progress: Progress) -> ExperimentResult:
        raise KeyboardInterrupt

    stopping = Experiment("second", broken.title, interrupted, 200, 60.0)
    with monkeypatch.context() as patch:
        patch.setattr(experiments, "EXPERIMENTS", dict(experiments.EXPERIMENTS) | {"second": stopping})
        stopped = world.run(["lab", "all", "--output_dir", "parts"])
    assert stopped.code == 1 and "the same command goes on from here" in stopped.err
    assert [name for name, _, _ in ran] == ["reverse-gap"]
    done = world.run(["lab", "all", "--output_dir", "parts"])
    assert done.code == 0 and [name for name, _, _ in ran] == ["reverse-gap", "second", "third"]
    assert "2 to run, about 120 s on two processor cores; 1 found in parts, not run again without --overwrite" in done.out
    assert all(f"{name} was measured" in done.out for name in NAMES)

    for file in (world.path / "whole").iterdir():
        if file.name not in ("lab.json", "lab.md", "lab.html"):  # these tell how long it took
            assert (world.path / "parts" / file.name).read_bytes() == file.read_bytes(), file.name
    index = json.loads((world.path / "parts" / "lab.json").read_text(encoding="utf-8"))
    assert list(index["experiments"]) == list(NAMES) and index["total_seconds"] >= 0
    assert all({"seconds", "replicates", "seed", "finding"} <= entry.keys() for entry in index["experiments"].values())
    page = (world.path / "parts" / "lab.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3 and all(f"{name} was measured" in page for name in NAMES)
    assert "![Title of second](second.svg)" in (world.path / "parts" / "lab.md").read_text(encoding="utf-8")


def _damage(name: str, change: Callable[[bytes], bytes]) -> Callable[[World], None]:
    def damage(world: World) -> None:
        file = world.path / "runs" / "lab" / name
        file.write_bytes(change(file.read_bytes()))

    return damage


AGAIN: Mapping[str, tuple[list[object], Callable[[World], None] | None]] = {
    "other replicates": (["--replicates", 20], None),
    "another seed": (["--seed", 1], None),
    "overwrite": (["--overwrite"], None),
    "a torn file": ([], _damage("second.json", lambda old: old[:100])),
    "another version": ([], _damage("second.json", lambda old: re.sub(rb'"version": "[^"]*"', b'"version": "0"', old))),
    "somebody else's file": ([], _damage("second.json", lambda old: b"[]")),
    "a figure torn": ([], _damage("second.png", lambda old: old[:1])),
    "words of another type": ([], _damage("second.json", lambda old: re.sub(rb'"title": "[^"]*"', b'"title": 5', old))),
    "a figure gone": ([], lambda world: (world.path / "runs" / "lab" / "second.png").unlink()),
}


@pytest.mark.parametrize(("words", "damage"), AGAIN.values(), ids=AGAIN.keys())
def test_what_is_run_again(words: list[object], damage: Callable[[World], None] | None, world: World, ran: Ran) -> None:
    world.run(["lab", "second"])
    assert world.run(["lab", "second", "second"]).code == 0 and len(ran) == 1
    if damage is not None:
        damage(world)
    done = world.run(["lab", "second", *words])
    assert done.code == 0 and len(ran) == 2 and "1 to run" in done.out
    assert world.run(["lab", "second", *words]).code == 0 and len(ran) == 2 + ("--overwrite" in words)


def test_a_damaged_index_is_made_anew(world: World, ran: Ran) -> None:
    world.run(["lab", "second"])
    (world.path / "runs" / "lab" / "lab.json").write_bytes(b"{not json")
    assert world.run(["lab", "all"]).code == 0 and len(ran) == 3
    assert (world.path / "runs" / "lab" / "lab.html").is_file()


@pytest.mark.parametrize("last", ["second.json", "lab.json"])
def test_a_kill_before_either_of_the_last_files_costs_no_line_of_the_index(
    last: str, world: World, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(file: Path, content: bytes) -> None:
        if file.name == last:
            raise KeyboardInterrupt
        write_bytes(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", killed)
        assert world.run(["lab", "second"]).code == 1
    assert world.run(["lab", "second"]).code == 0
    index = json.loads((world.path / "runs" / "lab" / "lab.json").read_text(encoding="utf-8"))
    assert list(index["experiments"]) == ["second"] and index["experiments"]["second"]["agreement"] == "agrees"


def test_few_replicates_are_noted_in_print_and_file(world: World, ran: Ran) -> None:
    few, enough = (world.run(["lab", "second", "--replicates", size]).out for size in (20, 100))
    assert "note: With 20 replicates, fewer than 100, intervals are too narrow" in few and "too narrow" not in enough
    world.run(["lab", "second", "--replicates", 99])
    kept = json.loads((world.path / "runs" / "lab" / "second.json").read_text(encoding="utf-8"))
    assert any("With 99 replicates" in note for note in kept["result"]["notes"])


def test_constants_are_written_for_the_planner(world: World, ran: Ran) -> None:
    done = world.run(["lab", "reverse-gap", "--constants", "mine.json"])
    assert done.code == 0
    text = (world.path / "mine.json").read_text(encoding="utf-8")
    found = load_constants(text)["experiments"]["reverse-gap"]
    assert found["settings"]["replicates"] == 200 and found["constants"][0]["value"] == 1.5
    assert json.loads(text)["command"] == "polyref lab reverse-gap --seed 0 --constants mine.json"
    plan = ["plan", "--gap", 0.01, "--beta", 0.5, "--d", 4, "--coverage", 2, "--confidence", 0.9]
    assert "2,400 [1,600, 3,200]" in world.run([*plan, "--constants", "mine.json"]).out


def test_bad_input_is_one_line(world: World, ran: Ran) -> None:
    world.file("taken", "a file")
    every = ("reverse-gap, second, third",)
    for words, says in {
        (): ("no experiment is named", *every),
        ("nothing",): ("unknown experiment 'nothing'", *every),
        ("second", "nothing"): ("unknown experiment 'nothing'", *every),
        ("all", "second"): ("all and list stand alone",),
        ("list", "second"): ("all and list stand alone",),
        ("list", "--seed", 3): ("list only prints what there is", "takes no --seed", "or name experiments"),
        ("list", "--replicates", 0, "--overwrite"): ("takes no --replicates, --overwrite",),
        ("list", "--constants", "mine.json"): ("takes no --constants",),
        ("list", "--output_dir", "here"): ("takes no --output_dir",),
        ("second", "--replicates", 1): ("replicates is 1", "at least 20"),
        ("second", "--replicates", 0): ("replicates is 0", "at least 20"),
        ("second", "--replicates", "many"): ("replicates: Expected a int",),
        ("second", "--seed", -1): ("seed is -1",),
        ("second", "--replicates", 10**9): ("replicates is 1000000000", "at most 100000"),
        ("second", "--output_dir", ""): ("output_dir is empty",),
        ("reverse-gap", "--constants", "."): ("constants is '.'", "name a .json file"),
        ("reverse-gap", "--constants", ""): ("name a .json file",),
        ("reverse-gap", "--constants", "mine.txt"): ("constants is 'mine.txt'", "name a .json file"),
        ("reverse-gap", "--constants", "taken/mine.json"): ("a part of this path is a file",),
        ("second", "--output_dir", "taken"): ("taken: is a file",),
        ("second", "--output_dir", "taken/below"): ("taken", "cannot be written"),
        ("reverse-gap", "--replicates", 199, "--constants", "mine.json"): ("constants of 199 replicates", "at least 200"),
        ("second", "--constants", "mine.json"): ("no experiment named here measures constants", "reverse-gap"),
    }.items():
        assert_refused(world, ["lab", *words], says)
    assert ran == []
