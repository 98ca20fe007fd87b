"""The benchmark of what variance reduction costs: its model of operations, its bookkeeping, and its quick run."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def cost() -> Iterator[ModuleType]:
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("variance_reduced_cost")
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


@pytest.fixture
def case(cost: ModuleType) -> Any:
    return cost.Case("tiny", 32, 64, 3, 4, 2, 128, batch=2, rounds=2, prompt=24, completion=10, every=(0, 1, 3))


@pytest.mark.parametrize("pairs", [0, 3])
def test_modelled_operations_are_those_that_run(cost: ModuleType, case: Any, pairs: int) -> None:
    counted, model = cost.step_cost.alone(case, pairs), cost.operations(case, pairs)
    last = 2 * case.vocabulary * case.hidden * case.batch  # the model's own head is called for one position a row
    assert counted["step_operations"] == model["step"] + last
    assert counted["score_operations"] == model["score"] + last
    assert model["tokens"] == 2 * (24 + (2 + 2 * pairs) * 10)
    assert counted["peak_mib"] >= counted["held_mib"] > 0
    assert case.parameters == sum(p.numel() for p in cost.step_cost.make_model(case, seed=0).parameters())


def test_modelled_operations_of_a_lora_are_near_those_that_run(cost: ModuleType, case: Any) -> None:
    adapted = cost.replace(case, hidden=128, intermediate=384, lora_layers=2)
    plain, reduced = (cost.step_cost.alone(adapted, pairs)["step_operations"] for pairs in (0, 3))
    models = [cost.operations(adapted, pairs)["step"] for pairs in (0, 3)]
    assert plain < cost.operations(cost.replace(adapted, lora_layers=0), 0)["step"]
    assert reduced / plain == pytest.approx(models[1] / models[0], rel=0.05)


def test_every_number_of_pairs_takes_its_turns(cost: ModuleType, case: Any) -> None:
    timings = cost.step_cost.in_turn(case)
    assert {pairs: len(turns) for pairs, turns in timings.items()} == {0: 2, 1: 2, 3: 2}
    assert all(value > 0 for turns in timings.values() for turn in turns for value in turn.values())


def test_ratios_are_to_the_plain_step_of_the_same_turn(cost: ModuleType, case: Any, tmp_path: Path) -> None:
    peaks = {
        pairs: {"held_mib": 100.0, "peak_mib": 200.0 + 50 * pairs, "reference_mib": 10.0, "step_operations": 8.0 + pairs}
        | {"score_operations": 3.0}
        for pairs in case.every
    }
    timings = {
        pairs: [{"score": slow * (1 + pairs), "step": slow * (4 + 4 * pairs), "cache": 0.5} for slow in (1.0, 3.0)]
        for pairs in case.every
    }
    rows = cost.summary(case, peaks, timings)
    ratios = rows["3"]["ratios"]
    assert ratios["seconds"] == {"median": 4.0, "low": 4.0, "high": 4.0, "count": 2}  # though one turn was 3 times as slow
    assert ratios["seconds_uncached"]["median"] == 5.0
    assert (ratios["memory"], ratios["memory_uncached"]) == (2.5, 2.6)
    assert ratios["counted"] == 11 / 8 and ratios["tokens"] == 104 / 44
    assert rows["3"]["one_off_epochs"]["median"] == 0.75  # scoring the auxiliary completions: 3 beside a plain step's 4
    assert rows["3"]["paid_after_epochs"] == 1 + 0.5 / 8
    result = {"cases": {"tiny": cost.asdict(case) | {"parameters": case.parameters, "steps": rows}}}
    assert "| tiny | 3 | 2.36 |" in cost.markdown(result)
    cost.draw(result, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_the_full_run_is_estimated_within_its_limit_on_the_machine_of_the_documents(cost: ModuleType) -> None:
    assert cost.estimate(cost.CASES, rate=8e10) < 600
    assert cost.estimate(cost.QUICK, rate=8e10) < 60


@pytest.mark.slow
@pytest.mark.ci
def test_the_quick_run_writes_its_results_and_prints_them_again(tmp_path: Path) -> None:
    def run(option: str) -> str:
        command = [sys.executable, str(BENCHMARKS / "variance_reduced_cost.py"), option, "--output_dir", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    printed = run("--quick")
    assert printed.startswith("about ")
    result = json.loads((tmp_path / "variance_reduced_cost.json").read_text())
    assert set(result) == {"command", "machine", "versions", "minutes", "cases"} and result["machine"]["threads"] == 1
    assert [list(case["steps"]) for case in result["cases"].values()] == [["0", "1", "4"]] * 2
    assert all(case["steps"]["4"]["ratios"]["memory"] > 1 for case in result["cases"].values())
    assert (tmp_path / "variance_reduced_cost.png").exists()
    assert printed.endswith(run("--markdown"))
