"""The benchmark of drawing: its bookkeeping, and its quick run."""

from __future__ import annotations

import argparse
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
def sampling() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("sampling")


def test_ratios_are_of_tokens_a_second_turn_by_turn(sampling: ModuleType) -> None:
    timings = {
        "engine": [{"seconds": 1.0, "tokens": 300, "completions": 10}, {"seconds": 4.0, "tokens": 400, "completions": 10}],
        "generate": [{"seconds": 2.0, "tokens": 300, "completions": 10}, {"seconds": 8.0, "tokens": 200, "completions": 10}],
    }
    found = sampling.summary(timings)
    assert found["ratio"] == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert found["contestants"]["engine"]["tokens_per_second"] == {"median": 200.0, "low": 100.0, "high": 300.0}
    assert found["contestants"]["generate"]["mean_tokens"] == 25 and found["contestants"]["generate"]["seconds"] == 10


def test_both_contestants_count_completions_with_their_end(sampling: ModuleType) -> None:
    arguments = argparse.Namespace(n=8, batch_size=16, max_new_tokens=60)
    model, tokenizer, prompts = sampling.tiny(6)
    means = []
    for contestant in (sampling.engine, sampling.plain):
        lengths = contestant(model, tokenizer, arguments)(prompts, 0)
        assert len(lengths) == 48 and min(lengths) >= 1 and max(lengths) == 60
        means.append(sum(lengths) / 48)
    assert abs(means[0] - means[1]) < 12, "of one law"


@pytest.mark.slow
@pytest.mark.ci
def test_the_quick_run_writes_its_result(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "sampling.py"), "--quick", "--threads", "1", "--steps", "2"]
    subprocess.run([*command, "--output_dir", str(tmp_path)], capture_output=True, check=True)
    result = json.loads((tmp_path / "sampling.json").read_text())
    assert result["ratio"]["median"] > 1 and result["machine"]["threads"] == 1
    assert set(result["contestants"]) == {"engine", "generate"} and result["steps"] == 2
