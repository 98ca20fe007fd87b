"""The study of drawing from compositions: its sums, and every method of it on tiny models."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fakes import byte_tokenizer, saved_llama

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def study() -> Iterator[SimpleNamespace]:
    """The modules, which find each other as they do when one of them is run as a script."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield SimpleNamespace(
            main=importlib.import_module("composed_study"), report=importlib.import_module("composed_study_report")
        )
    torch.set_num_threads(threads)


def cell(method: str, samples: list[int], mass: list[list[float]], calls: int = 100) -> dict[str, Any]:
    alike = {"method": method, "proposals": 16, "calls": calls, "tokens": 9}
    prompts = [alike | {"samples": k, "distinct": k, "ess": float(k), "mass": f} for k, f in zip(samples, mass, strict=True)]
    return {"members": 2, "method": method, "seconds": 3.0, "prompts": prompts}


def test_a_method_is_summed_up_beside_rejection_and_the_long_run(study: SimpleNamespace) -> None:
    cells = {
        "rejection": cell("rejection", [8, 0], [[0.5, 0.25, 0.75], [0.0, 0.0, 0.2]]),
        "tokens": cell("tokens", [4, 2], [[0.25, 0.1, 0.2], [0.125, 0.1, 0.3]], calls=60),
        "long": cell("smc", [16, 16], [[0.15, 0.1, 0.2], [0.05, 0.0, 0.1]]),
    }
    found = study.report.summary(cells)
    assert set(found) == {"rejection", "tokens"}
    assert found["rejection"]["acceptance"][0] == 0.25 and found["rejection"]["without"] == 1
    assert found["rejection"]["calls_a_sample"] == 25 and found["rejection"]["seconds_a_sample"] == 3 / 8
    assert found["rejection"]["log_mass"][1] == [None, None, math.log(0.2)]
    assert found["tokens"]["calls_an_effective"] == 20 and found["tokens"]["less_rejection"][0] == pytest.approx(-0.0625)
    assert found["tokens"]["overlap"] == 0.5, "0.2 < 0.25 of the first prompt"
    assert found["tokens"]["covered"] == 0.5 and found["rejection"]["covered"] == 0.5


@pytest.fixture(scope="module")
def drawn(study: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every method on three prompts, by three random models that share little."""
    folder = tmp_path_factory.mktemp("composed")
    tokenizer = byte_tokenizer()
    models = tuple(str(saved_llama(folder / str(seed), tokenizer, seed=seed, initializer_range=0.02)) for seed in range(3))
    own = study.main.Study(models, ("a", "b", "c"), (None, "Be kind.", None), str(folder))
    (folder / "prompts.json").write_text(json.dumps({"prompts": ["one", "two", "one"], "left_out": 1}))
    cells = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study.main, "TOKENS", 4)
        for method in study.main.METHODS:
            study.main.draw(own, 2, method)
            cells[method] = json.loads(own.file(2, method).read_text())
        study.main.draw(own, 3, "tokens")
    return cells


def test_methods_make_as_many_proposals_and_agree(study: SimpleNamespace, drawn: dict[str, Any]) -> None:
    for method in ("mixture", "rejection", "tokens", "smc"):
        assert [prompt["proposals"] for prompt in drawn[method]["prompts"]] == [16] * 3
    found = study.report.summary(drawn)
    assert found["mixture"]["acceptance"] == [1.0, 1.0, 1.0] and found["mixture"]["calls"] == found["rejection"]["calls"]
    assert all(prompt["calls"] <= 16 * 2 * 4 for prompt in drawn["auto"]["prompts"])
    assert all(np.isfinite(found[method]["mass"][0]) for method in ("rejection", "tokens", "smc"))
    assert all(row["covered"] > 0.6 for method, row in found.items() if method in ("rejection", "tokens"))


def test_the_result_has_tables_and_a_figure(
    study: SimpleNamespace, drawn: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(study.report, "RESULTS", tmp_path)
    cells = {f"{count} {method}": found | {"members": count} for count in (2, 3) for method, found in drawn.items()}
    study.report.write("pocket", {"max_new_tokens": 4}, 3, 1, cells)
    assert (tmp_path / "composed_study_pocket.png").stat().st_size > 1000
    result = json.loads((tmp_path / "composed_study_pocket.json").read_text())
    assert study.report.markdown(result) == capsys.readouterr().out.rstrip("\n")
    assert study.report.markdown(result).count("| tokens |") == 2


def test_prompts_without_room_are_left_out(study: SimpleNamespace, tmp_path: Path) -> None:
    model = str(saved_llama(tmp_path / "model", byte_tokenizer(), max_position_embeddings=200))
    own = study.main.Study((model, model), ("a", "b"), (None, "Be kind."), str(tmp_path))
    prompts, left_out = study.main.chosen_prompts(own, 5)
    assert len(prompts) == 5 and 0 < left_out < 158
    assert study.main.chosen_prompts(own, 5) == (prompts, left_out)
