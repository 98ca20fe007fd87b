"""The study of multi-step rejection sampling: its proxy reward, its sums, and every kind of arm on tiny models."""

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


@pytest.fixture(scope="module")
def study() -> Iterator[SimpleNamespace]:
    """The modules, which find each other as they do when one of them is run as a script."""
    names = {"main": "multistep_study", "report": "multistep_study_report", "data": "robust_data"}
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield SimpleNamespace(**{name: importlib.import_module(module) for name, module in names.items()})
    torch.set_num_threads(threads)


def make_pool(study: SimpleNamespace, prompts: int) -> Any:
    """The same ten completions of every prompt, in another order each; gold is their length, three letters a nat."""
    generator = np.random.default_rng(0)
    texts = [[WORDS[i] for i in generator.permutation(10)] for _ in range(prompts)]
    pairs = [[row[i : i + 2] for i in range(0, 10, 2)] for row in texts]
    lengths = np.array([[[float(len(text)) for text in pair] for pair in row] for row in pairs])
    asked = [({"role": "system", "content": "Be brief."}, {"role": "user", "content": f"question {i}"}) for i in range(prompts)]
    return study.data.Pool(asked, pairs, lengths / 3, lengths)


@pytest.fixture(scope="module")
def tiny(study: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A study of three random models with its preparations."""
    root = tmp_path_factory.mktemp("multistep")
    models = [str(saved_llama(root / str(seed), byte_tokenizer(), seed=seed, initializer_range=0.02)) for seed in range(3)]
    pool = make_pool(study, 12)
    for name in ("prepared", "own"):
        (root / name).mkdir()
    study.data.save_pool(pool, root / "prepared" / "pool.json")
    (root / "prepared" / "held_out.json").write_text(json.dumps(pool.prompts[9:]))
    (root / "prepared" / "gold.json").write_text(json.dumps({"weights": [1.0]}))
    references = (("a", models[1], None), ("b", models[2], None))
    folders = (str(root / "prepared"), str(root / "own"))
    return study.main.Study(models[0], references, "", *folders, 4, 3, 8, 4, 2, 4, 1e-3, 4, beta=1.0, draws_judged=2)


def test_the_proxy_follows_gold_and_has_unit_scale(study: SimpleNamespace, tiny: Any) -> None:
    pool = make_pool(study, 300)
    records = study.main.gold_labelled(pool, seed=0)
    longer = [len(r.chosen[0]["content"]) > len(r.rejected[0]["content"]) for r in records]
    assert len(records) == 1500 and 0.6 < np.mean(longer) < 0.98, "labels are drawn from gold's probability"
    reward = study.main.proxy(tiny)
    asked = [study.data.message(word) for word in WORDS]
    values = reward([()] * 10, asked)
    assert float(values.std(correction=0)) == pytest.approx(1, abs=0.02)
    assert reward.fingerprint == study.main.proxy(tiny).fingerprint


def test_the_prompts_have_no_system_message(study: SimpleNamespace, tiny: Any) -> None:
    study.main.prepare(tiny, SimpleNamespace())
    rows = [json.loads(line) for line in (Path(tiny.folder) / "prompts.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all([turn["role"] for turn in row["prompt"]] == ["user"] for row in rows)
    assert len((Path(tiny.folder) / "held_out.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
@pytest.mark.ci
def test_arms_train_at_equal_proposals_and_are_compared(
    study: SimpleNamespace, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    class LengthGold:
        def __init__(self, folder: str) -> None:
            self.weights = np.zeros(1)

        def __call__(self, prompts: Any, completions: Any) -> torch.Tensor:
            return torch.tensor([float(len(c[0]["content"])) for c in completions]) * float(self.weights[0])

    monkeypatch.setattr(study.main, "GoldReward", LengthGold)
    monkeypatch.setattr(study.report, "RESULTS", tmp_path)
    study.main.prepare(tiny, SimpleNamespace())
    own = {("RSO", 0): tiny, ("2 steps", 0): replace(tiny, lora_layers=1), ("adapted", 0): tiny}
    for (arm, seed), settings in own.items():
        study.main.run(settings, arm, seed)
    runs = {one: tiny.run_folder(*one) for one in own}
    study.report.write("pocket", tiny.settings(), runs)
    found = json.loads((tmp_path / "multistep_study_pocket.json").read_text())
    arms = found["arms"]
    assert arms["RSO"]["scored"] == arms["2 steps"]["scored"] == 4 * 8
    assert arms["RSO"]["betas"] == [[1.0]] and arms["2 steps"]["betas"] == [[2.0, 1.0]]
    assert arms["RSO"]["over_rso"][0] == 0.5 and arms["RSO"]["gold_less_rso"] == [0.0, 0.0, 0.0]
    assert len(arms["2 steps"]["steps"]) == 3 and arms["adapted"]["scored"] <= 4 * 8
    assert arms["2 steps"]["steps"][0] == arms["RSO"]["steps"][0], "one start"
    assert study.report.markdown(found) in capsys.readouterr().out
    assert (tmp_path / "multistep_study_pocket.png").stat().st_size > 1000
