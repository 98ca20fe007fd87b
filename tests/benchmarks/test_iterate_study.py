"""The study of training in rounds: every kind of arm on tiny models, at equal labels, and its sums."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fakes import byte_tokenizer, saved_llama

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
WORDS = ("yes", "no thank you", "ask a doctor", "why", "I will not say", "maybe", "of course", "it is late", "go on", "hm")


class LengthGold:
    """Gold by the length of a completion."""

    def __init__(self, folder: str) -> None:
        self.weights = np.zeros(1)

    def __call__(self, prompts: Any, completions: Any) -> torch.Tensor:
        return torch.tensor([float(len(one[0]["content"])) for one in completions]) * float(self.weights[0])


@pytest.fixture(scope="module")
def study() -> Iterator[SimpleNamespace]:
    """The modules, which find each other as they do when one of them is run as a script."""
    names = {"main": "iterate_study", "report": "iterate_study_report", "steps": "multistep_study", "data": "robust_data"}
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        found = SimpleNamespace(**{name: importlib.import_module(module) for name, module in names.items()})
        patch.setattr(found.steps, "GoldReward", LengthGold)
        yield found
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(study: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A study of three random models with its preparations, ready to run."""
    root = tmp_path_factory.mktemp("iterate")
    models = [str(saved_llama(root / str(seed), byte_tokenizer(), seed=seed, initializer_range=0.02)) for seed in range(3)]
    generator = np.random.default_rng(0)
    pairs = [[[WORDS[i], WORDS[j]] for i, j in generator.permutation(10).reshape(5, 2)] for _ in range(12)]
    lengths = np.array([[[float(len(text)) for text in pair] for pair in row] for row in pairs])
    asked = [({"role": "user", "content": f"question {i}"},) for i in range(12)]
    for name in ("prepared", "own"):
        (root / name).mkdir()
    study.data.save_pool(study.data.Pool(asked, pairs, lengths / 3, lengths), root / "prepared" / "pool.json")
    (root / "prepared" / "held_out.json").write_text(json.dumps(asked[9:]))
    (root / "prepared" / "gold.json").write_text(json.dumps({"weights": [1.0]}))
    references = tuple((name, model, None) for name, model in zip("abc", models, strict=True))
    made = study.main.Study(models[0], references, "", str(root / "prepared"), str(root / "own"), 8, 3, 2, 4, 2, 4, 4, 1e-3, 4)
    study.steps.prepare(made, SimpleNamespace())
    return made


@pytest.mark.slow
@pytest.mark.ci
def test_arms_are_compared_at_equal_labels(
    study: SimpleNamespace, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(study.report, "RESULTS", tmp_path)
    cells = {("offline", 3, 0.3): tiny, ("rounds", 3, 0.3): tiny, ("rounds, enhancer", 3, 0.3): replace(tiny, lora_layers=1)}
    cells |= {("rounds", 1, 0.3): tiny}
    for cell, settings in cells.items():
        study.main.run(settings, *cell, 0)
    study.report.write("pocket", tiny.settings(), {(*cell, 0): tiny.run_folder(*cell, 0) for cell in cells})
    found = json.loads((tmp_path / "iterate_study_pocket.json").read_text())
    alone, offline, rounds, enhanced = found["cells"]
    assert [row["rounds"][-1]["labels"] for row in found["cells"]] == [16.0] * 4, "8 prompts, two labels each"
    assert [len(row["rounds"]) for row in found["cells"]] == [3, 2, 3, 3]
    assert offline["over_offline"][0] == 0.5 and offline["goal_less_offline"] == [0.0, 0.0, 0.0]
    assert rounds["rounds"][0] == offline["rounds"][0] == enhanced["rounds"][0] | {"labels": 0.0}, "one start"
    assert alone["rounds"][0]["kl"] == alone["rounds"][0]["kl_start"], "its anchor is the start"
    assert abs(alone["rounds"][0]["kl"][0]) < 1e-4 and rounds["rounds"][0]["kl"] != rounds["rounds"][0]["kl_start"]
    assert alone["over_offline"] is None and alone["goal_less_offline"] is None
    assert study.report.markdown(found) in capsys.readouterr().out
    assert (tmp_path / "iterate_study_pocket.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.ci
def test_the_first_round_is_offline_training_on_fewer_labels(study: SimpleNamespace, tiny: Any, tmp_path: Path) -> None:
    half = replace(tiny, folder=str(tmp_path), prompts=4, updates=2)
    study.steps.prepare(half, SimpleNamespace())
    study.main.run(tiny, "rounds", 1, 0.3, 1)
    study.main.run(half, "offline", 1, 0.3, 1)
    first = study.report.judged(tiny.run_folder("rounds", 1, 0.3, 1), 1)
    offline = study.report.judged(half.run_folder("offline", 1, 0.3, 1), 1)
    assert all(np.array_equal(first[name], offline[name]) for name in first)


def test_the_goal_is_compared_prompt_by_prompt(study: SimpleNamespace) -> None:
    before = {"reward": np.array([[0.0, 2.0], [4.0, 4.0]]), "kl": np.array([[1.0, 1.0], [2.0, 0.0]])}
    after = {"reward": before["reward"] + 3.0, "kl": before["kl"] + 2.0}
    assert study.report.difference([after], [before], 0.5) == pytest.approx([2.0, 2.0, 2.0])


def test_the_sentiment_is_scaled(study: SimpleNamespace) -> None:
    pytest.importorskip("vaderSentiment")
    reward = study.main.sentiment(3.0)
    good, bad = (study.data.message(text) for text in ("I love it, wonderful", "I hate it, terrible"))
    values = reward(["how is it?"] * 2, [good, bad]).tolist()
    assert 1.5 < values[0] <= 3 and -3 <= values[1] < -1.5
    assert reward.fingerprint != study.main.sentiment(2.0).fingerprint
