"""A run of `polyref iterate` that is killed, interrupted, out of disk, or torn goes on, and ends as an unbroken one does."""

from __future__ import annotations

import csv
import io
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cli_world import World, some_rows
from crash import Ended, Point, Runs, Warm, halve, left_by, spread
from polyref.cli.iterate import make_iterate
from polyref.cli.iterate_settings import IterateSettings
from polyref.cli.loop_settings import LoopPrompts
from polyref.errors import ModelError
from polyref.rewards.functions import NamedReward
from polyref.types import Text

ALL_STAGES: dict[str, Any] = {
    "enhancer": {"temperature": 2.0, "completions": 2},
    "label": "model",
    "labeller": {"reward": {"model": "rule:length:characters"}},
    "gold": {"model": "rule:length"},
    "anchor": "average",
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_steps": 1,
}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def slow(test: Any) -> Any:
    """Not among the tests of every minute."""
    return pytest.mark.slow(pytest.mark.ci(test))


def runs_of(warm: Warm, world: World, **settings: Any) -> Runs:
    return Runs(warm, world.path, lambda name: world.iterate(output_dir=world.path / name / "run", **ALL_STAGES | settings))


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm(os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}) as process:
        yield process


@pytest.fixture(scope="module")
def runs(warm: Warm, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return runs_of(warm, World(tmp_path_factory.mktemp("work"), tiny_model, None))


def assert_last_line(ended: Ended, code: int, *says: str) -> None:
    """It ended with `code` and one line that `says`, after the progress of what was begun, and no traceback."""
    assert ended.code == code and "Traceback" not in ended.err, ended.err
    line = ended.err.splitlines()[-1]
    assert line.startswith("polyref: ") and all(text in line for text in says), line


@pytest.mark.slow
def test_killed_at_twenty_points_a_run_ends_with_the_bytes_of_an_unbroken_one(runs: Runs) -> None:
    points = spread(runs.points, 20, seed=0)
    assert {runs.points[at].stage for at in points} == {point.stage for point in runs.points}
    assert {runs.points[at].kind for at in points} == {"half", "sync", "name", "step"}
    runs.survive_kills(20)


@slow
def test_killed_again_and_again_a_run_with_an_adapter_ends_alike(warm: Warm, world: World) -> None:
    runs = runs_of(warm, world, lora={"r": 2})
    for at in (Point("half", "generate-1"), Point("half", "train-1"), Point("name", "anchor-1"), Point("step", "train-2")):
        runs.kill("killed", at)
    runs.goes_on("killed")


class Voted(Runs):
    """Runs that end where votes lack; a person fills in the sheet, and gives the same command again."""

    def __call__(self, name: str, fault: str = "kill", at: int | Point | None = None) -> Ended:
        passed = list[Point]()
        while True:
            ended = super().__call__(name, fault, at - len(passed) if isinstance(at, int) else at)
            passed += ended.points
            if ended.code or (self.folder(name) / "summary.json").exists():
                return ended._replace(points=passed)
            for sheet in self.folder(name).glob("annotate-*.csv"):
                fill_in(sheet)


def fill_in(sheet: Path) -> None:
    """Vote on every pair, by what its id is."""
    header, *rows = csv.reader(io.StringIO(sheet.read_bytes().decode("utf-8-sig"), newline=""))
    voted = [[*row[:-1], ("A", "B", "tie", "A", "B", "skip")[int(row[0][-4:], 16) % 6]] for row in rows]
    with sheet.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *voted])


@slow
def test_killed_while_a_person_votes_in_files_no_vote_is_lost_and_all_ends_alike(warm: Warm, world: World) -> None:
    settings = {"label": "human", "label_how": "file", "rounds": 1, "prompts_at_once": 32, "eval_completions": 1}
    runs = Voted(warm, world.path, lambda name: world.iterate(output_dir=world.path / name / "run", **settings))
    voting = [number for number, point in enumerate(runs.points) if point.stage.startswith("label-")]
    votes = (runs.folder("unbroken") / "votes-1.jsonl").read_text().splitlines()
    assert {runs.points[at].kind for at in voting} == {"half", "sync", "name"} and len(voting) > 2 * len(votes) >= 4
    for at in voting[::3]:
        runs.kill(f"killed-{at}", at)
        runs.goes_on(f"killed-{at}")


@slow
def test_ctrl_c_is_one_line_and_the_run_goes_on(runs: Runs) -> None:
    for at in spread(runs.points, 4, seed=1):
        ended = runs(f"interrupted-{at}", "interrupt", at)
        assert_last_line(ended, 1, "interrupted; the same command goes on from here")
        runs.goes_on(f"interrupted-{at}")


@slow
def test_a_full_disk_is_one_line_and_the_run_goes_on(runs: Runs) -> None:
    for stage in ("opening", "enhance-1", "train-1", "anchor-1", "write"):
        name = f"full-{stage}"
        assert_last_line(runs(name, "full", Point("half", stage)), 2, "cannot be written", "free some space")
        assert not list(runs.folder(name).rglob("*.tmp"))
        runs.goes_on(name)


@slow
def test_torn_files_are_found_and_made_again(runs: Runs) -> None:
    steps = [number for number, point in enumerate(runs.points) if point == ("step", "train-2")]
    checkpoint, weights = "stages/train-2/checkpoint-2/model.safetensors", "stages/train-1/model/model.safetensors"
    for at, torn in ((steps[2], checkpoint), (steps[3], weights)):
        runs.kill(f"torn-{at}", at)
        folder = runs.folder(f"torn-{at}")
        halve(folder / torn)
        parts = list(folder.parent.glob("cache/**/*.parquet"))
        for part in parts:
            flip(part)
        said = runs.goes_on(f"torn-{at}")
        assert parts and Path(torn).parent.name in said and ".parquet is torn" in said
    for name in ("model/model.safetensors", "stages/pair-1/pairs.jsonl", "stages/evaluate-0/chunk-000000.json", "summary.json"):
        flip(folder / name)
    assert runs.goes_on(f"torn-{at}").count("torn or missing") == 3


def flip(path: Path) -> None:
    """Change a byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@slow
def test_a_second_run_on_one_folder_is_refused_and_the_first_undisturbed(runs: Runs) -> None:
    halted = runs("two", "halt", Point("step", "train-1"))
    assert halted.code == -signal.SIGSTOP
    before = left_by(runs.folder("two"))
    second = runs("two")
    assert_last_line(second, 2, "is in use by another process; wait for it to end or name another run folder")
    assert len(second.err.splitlines()) == 1 and left_by(runs.folder("two")) == before
    first = runs.warm.go_on(halted)
    assert first.code == 0, first.err
    runs.assert_whole("two")


@slow
def test_other_prompts_are_drawn_for_again_and_a_complete_run_refuses_them(warm: Warm, world: World) -> None:
    def words(name: str) -> list[str]:
        return world.iterate(output_dir=world.path / name / "run", rounds=1, held_out=None)

    world.pairs(*some_rows(3))
    early = warm.run(words("early"), "kill", Point("step", "train-1"))
    assert early.code == -signal.SIGKILL, early.err
    world.pairs(*some_rows(4))
    runs = Runs(warm, world.path, words)
    assert "stage generate-1 is done again: its inputs changed" in runs.goes_on("early")
    world.pairs(*some_rows(5))
    assert_last_line(runs("early"), 2, "is complete, and what it was made from has changed since: prompts", "name a new run")
    runs.assert_whole("early")


@slow
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("gives no number", "mine, row 1: gave nan as reward; "),
        ("raises", "mine: failed on 4 completions: RuntimeError: out of memory; mend it; the same command goes on"),
    ],
)
def test_a_reward_that_fails_in_mid_round_is_one_line_and_a_mended_one_goes_on(fault: str, says: str, world: World) -> None:
    calls, broken = list[int](), list[int]()

    def reward(prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        calls.append(len(completions))
        if len(calls) in broken and fault == "raises":
            raise RuntimeError("out of\nmemory")
        return [float("nan") if len(calls) in broken else float(len(str(text))) for text in completions]

    def rounds(name: str) -> Any:
        own = IterateSettings(str(world.path / name / "run"), str(world.model), completions=2, eval_completions=1)
        own.rounds, own.max_new_tokens, own.prompts_at_once = 2, 4, 2
        training = {"per_device_train_batch_size": 8, "num_train_epochs": 1}
        return make_iterate(own, LoopPrompts(str(data), limit=4), training, reward=NamedReward("mine", reward))

    data = world.pairs()
    assert rounds("unbroken") is not None
    broken.append(len(calls) - 3)  # the first chunk that is drawn in the last round
    calls.clear()
    with pytest.raises(ModelError, match=f"^{says}"):
        rounds("broken")
    assert (world.path / "broken/run/stages/train-1/model").is_dir()
    assert rounds("broken") is not None
    assert left_by(world.path / "broken" / "run") == left_by(world.path / "unbroken" / "run")
