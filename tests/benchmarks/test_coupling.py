"""The benchmark of couplings: what it counts, on a tiny model, and what it writes."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from polyref.samplers.tokens import RACE

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def coupling() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("coupling")


def test_a_sequence_is_the_same_if_every_draw_gives_it(coupling: ModuleType) -> None:
    first, other, third = [(1,), (2,), (3, 4), (5,)], [(1,), (2,), (3, 5), (5,)], [(1,), (9,), (3, 4), (5,)]
    found = coupling.agreement([first, other, third])
    assert found == {"sequences": 4, "same": 2, "share": 0.5, "tokens": 5}


def test_shuffled_prompts_are_compared_place_by_place(coupling: ModuleType) -> None:
    model, tokenizer, prompts = coupling.tiny(4)
    arguments = coupling.parse_arguments(["--quick", "--n", "2", "--max_new_tokens", "6", "--batch_sizes", "1", "4"])
    found = coupling.measured(model.double(), tokenizer, prompts, arguments, RACE)
    assert found["share"] == 1.0 and found["sequences"] == 8
    assert set(found["processor_seconds"]) == {"1", "4", "4 shuffled"}


def test_the_quick_run_writes_its_result(
    coupling: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompts", "3", "--n", "2", "--max_new_tokens", "4", "--batch_sizes", "1", "3"]
    monkeypatch.setattr(sys, "argv", ["coupling.py", "--quick", *options, "--output_dir", str(tmp_path)])
    coupling.main()
    result = json.loads((tmp_path / "coupling.json").read_text())
    assert set(result["couplings"]) == {"INVERSE", "RACE"} and result["batch_sizes"] == [1, 3]
    assert all(found["sequences"] == 6 and found["share"] == 1.0 for found in result["couplings"].values())
