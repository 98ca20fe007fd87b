"""The benchmark of a round: its clock, its shares, and its quick run."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def loop() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("loop")


def test_no_second_counts_twice(loop: ModuleType) -> None:
    now = [0.0]

    def taking(seconds: float) -> None:
        now[0] += seconds

    clock = loop.Clock(lambda: now[0])
    forward = clock.timed("forward", taking)

    def step(seconds: float) -> None:
        taking(1.0)
        forward(seconds)
        raise ValueError

    taking(3.0)
    with pytest.raises(ValueError):
        clock.timed("backward", step)(5.0)
    clock.turn()
    clock.stage = "train-1"
    taking(2.0)
    clock.turn()
    assert clock.seconds == {
        ("before", "other"): 3.0,
        ("before", "backward"): 1.0,
        ("before", "forward"): 5.0,
        ("train-1", "other"): 2.0,
    }


def test_shares_are_of_the_rounds_after_the_first(loop: ModuleType) -> None:
    seconds = {("evaluate-0", "forward"): 50.0, ("before", "other"): 9.0, ("generate-1", "loading"): 7.0}
    for number, outside in ((2, 1.0), (3, 3.0)):
        seconds |= {(f"generate-{number}", "forward"): 4.0, (f"generate-{number}", "disk"): outside}
        seconds |= {(f"train-{number}", "backward"): 2.0, (f"train-{number}", "optimiser"): 1.0}
    found = loop.summary(seconds)
    assert [row["round"] for row in found["rounds_measured"]] == [1, 2, 3]
    assert found["outside"] == pytest.approx((2 / 8 + 4 / 10) / 2)
    assert found["outside_but_optimiser"] == pytest.approx((1 / 8 + 3 / 10) / 2)
    generate = found["stages"]["generate"]
    assert generate["seconds"] == 6.0 and generate["by_kind"]["disk"] == 2.0 and generate["outside"] == pytest.approx(1 / 3)
    assert found["stages"]["train"]["optimiser"] == pytest.approx(1 / 3)
    assert "generate" in loop.table(found) and "round 3: 10.0 s, 40.0% outside" in loop.table(found)


@pytest.mark.slow
@pytest.mark.ci
def test_the_quick_run_writes_its_result(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "loop.py"), "--quick", "--threads", "1", "--rounds", "2", "--prompts", "4"]
    subprocess.run([*command, "--held_out", "2", "--output_dir", str(tmp_path)], capture_output=True, check=True)
    result = json.loads((tmp_path / "loop_quick.json").read_text())
    assert 0 < result["outside"] < 1 and result["target"] == 0.05
    assert set(result["stages"]) == {"generate", "enhance", "pair", "train", "evaluate"}
    for name, row in result["stages"].items():
        assert sum(row["by_kind"].values()) == pytest.approx(row["seconds"]), name
    assert result["stages"]["train"]["by_kind"]["backward"] > 0 and result["stages"]["train"]["by_kind"]["optimiser"] > 0
    assert result["stages"]["generate"]["by_kind"]["forward"] > 0 and result["stages"]["pair"]["by_kind"]["forward"] == 0
