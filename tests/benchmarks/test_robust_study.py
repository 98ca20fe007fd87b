"""The study of wrong preference labels: what the corruptions do, what each arm is given, and that every kind of arm runs."""

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
WORDS = (
    "yes",
    "no thank you",
    "ask a doctor",
    "why",
    "I will not say",
    "maybe tomorrow",
    "of course",
    "it is late",
    "go on",
    "hm",
)


@pytest.fixture(scope="module")
def study() -> Iterator[SimpleNamespace]:
    """The modules, which find each other as they do when one of them is run as a script."""
    names = ("robust_auxiliary", "robust_data", "robust_runs", "robust_report", "robust_study")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    torch.set_num_threads(threads)


def make_pool(study: SimpleNamespace, prompts: int = 12, seed: int = 0) -> Any:
    """Prompts with the same ten completions in another order each; gold is how many letters a completion has, centred."""
    generator = np.random.default_rng(seed)
    texts = [[WORDS[i] for i in generator.permutation(10)] for _ in range(prompts)]
    pairs = [[row[i : i + 2] for i in range(0, 10, 2)] for row in texts]
    lengths = np.array([[[float(len(text)) for text in pair] for pair in row] for row in pairs])
    asked = [({"role": "user", "content": f"question {i}"},) for i in range(prompts)]
    return study.robust_data.Pool(asked, pairs, (lengths - lengths.mean()) / 3, lengths)


def test_every_corruption_is_antisymmetric(study: SimpleNamespace) -> None:
    pool = make_pool(study)
    turned = pool._replace(gold=pool.gold[..., ::-1], lengths=pool.lengths[..., ::-1])
    for name, probability in study.robust_data.CORRUPTIONS.items():
        np.testing.assert_allclose(probability(pool) + probability(turned), 1, atol=1e-12, err_msg=name)


def test_the_intransitive_annotator_prefers_in_a_circle(study: SimpleNamespace) -> None:
    lengths = np.array([[[1.0, 5.0], [5.5, 9.0], [9.5, 1.2], [8.0, 8.5], [5.7, 1.4]]])
    level = study.robust_data.Pool([()], [[["a", "b"]] * 5], np.zeros_like(lengths), lengths)
    found = study.robust_data.intransitive(level)[0]
    assert (found[:3] > 0.85).all() and found[3] == 0.5 and found[4] < 0.15


def test_lapses_pull_labels_towards_a_coin(study: SimpleNamespace) -> None:
    data, pool = study.robust_data, make_pool(study, prompts=3000)
    clean = data.CORRUPTIONS["clean"](pool)[:, 0]
    for name, rate in (("clean", 0.0), ("lapses 40%", 0.4)):
        records = data.labelled(pool, name, seed=3)
        first = np.array([r.chosen == data.message(p[0][0]) for r, p in zip(records, pool.texts, strict=True)])
        assert abs(first.mean() - ((1 - rate) * clean + rate / 2).mean()) < 0.03
        agree = np.where(pool.gold[:, 0, 0] > pool.gold[:, 0, 1], first, ~first).mean()
        assert abs(agree - ((1 - rate) * np.maximum(clean, 1 - clean) + rate / 2).mean()) < 0.03
    again = data.labelled(pool, "clean", seed=3)
    assert again == data.labelled(pool, "clean", seed=3) != data.labelled(pool, "clean", seed=4)


def test_g_of_a_pair_is_of_its_chosen_completion(study: SimpleNamespace) -> None:
    data, pool = study.robust_data, make_pool(study)
    g = data.CORRUPTIONS["clean"](pool)
    records = study.robust_runs._with_g(data.labelled(pool, "lapses 40%", 0), pool, g)
    turned = 0
    for record, pairs, own in zip(records, pool.texts, g, strict=True):
        is_first = record.chosen == data.message(pairs[0][0])
        turned += not is_first
        assert record.predicted_probability == pytest.approx(own[0] if is_first else 1 - own[0])
        assert record.auxiliary_1 == tuple(data.message(pair[0]) for pair in pairs[1:])
        assert record.auxiliary_probability == pytest.approx(tuple(own[1:]))
    assert 0 < turned < len(records)


def test_rejection_keeps_the_better_and_orders_by_the_reward(study: SimpleNamespace) -> None:
    pool = make_pool(study, prompts=400)
    records = study.robust_runs._rejection_sampled(pool, pool.gold, seed=0)
    gold_of = {text: value for row, values in zip(pool.texts, pool.gold, strict=True) for pair, both in zip(row, values, strict=True) for text, value in zip(pair, both, strict=True)}  # noqa: E501  # fmt: skip
    chosen, rejected = (np.array([gold_of[getattr(r, name)[0]["content"]] for r in records]) for name in ("chosen", "rejected"))
    assert (chosen >= rejected).all() and all(r.chosen != r.rejected for r in records)
    assert chosen.mean() > pool.gold.mean() + 1


def test_outcomes_compare_no_draws_that_share_randomness(study: SimpleNamespace) -> None:
    assert study.robust_report.outcomes([[1.0, 3.0]], [[0.0, 3.0]]).tolist() == [(0 + 1) / 2]
    assert study.robust_report.outcomes([[1.0, 3.0, 2.0]], [[1.0, 2.0, 3.0]]).tolist() == [(0 + 0 + 1 + 0.5 + 1 + 0.5) / 6]


def test_the_learnt_g_predicts_labels_of_other_prompts(study: SimpleNamespace) -> None:
    data, pool = study.robust_data, make_pool(study, prompts=300)
    records = data.labelled(pool, "clean", 0)
    reward = study.robust_auxiliary.TokenCountReward(byte_tokenizer(), records[:200], seed=0)
    h = reward([], [r.chosen for r in records[200:]]) - reward([], [r.rejected for r in records[200:]])
    assert float(torch.nn.functional.softplus(-h).mean()) < 0.5


@pytest.mark.parametrize("arm", ["Dr-DPO", "RSO-style hinge", "variance-reduced", "doubly robust"])
def test_every_kind_of_arm_trains_and_is_judged(
    study: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    class LengthGold:
        def __init__(self, folder: str) -> None:
            self.weights = np.zeros(1)

        def __call__(self, prompts: Any, completions: Any) -> torch.Tensor:
            return torch.tensor([float(len(c[0]["content"])) for c in completions]) * float(self.weights[0])

    monkeypatch.setattr(study.robust_runs, "GoldReward", LengthGold)
    policy, folder = str(saved_llama(tmp_path / "policy", byte_tokenizer())), tmp_path / "study"
    pool = make_pool(study, prompts=8)
    folder.mkdir()
    study.robust_data.save_pool(pool, folder / "pool.json")
    (folder / "held_out.json").write_text(json.dumps(pool.prompts[:3]))
    (folder / "gold.json").write_text(json.dumps({"weights": [2.0]}))
    layers = 1 if arm == "variance-reduced" else None
    tier = study.robust_runs.Tier(policy, policy, "", str(folder), 1, 1e-3, 4, 5, 20, lora_layers=layers)
    study.robust_runs.judge_start(tier, 0)
    start = json.loads(tier.file("start", 0).read_text())
    assert np.abs(start["log_ratio"]).max() < 1e-4, "drawn and scored by one model"
    for name in ("sigmoid", arm):
        study.robust_runs.fit_auxiliary(tier, "clean", 0)
        study.robust_runs.train_policy(tier, name, "clean", 0)
    found = json.loads(tier.file("policy", arm, "clean", 0).read_text())
    assert np.shape(found["gold"]) == np.shape(found["log_ratio"]) == np.shape(found["tokens"]) == (3, study.robust_runs.DRAWS)
    assert 0 < np.abs(found["log_ratio"]).max() < 2, "one step away from the start"
    row = study.robust_report.row_of(tier, pool.prompts[:3], arm, "clean", [0])
    assert 0 <= row["win_rate_over_plain"][0] <= 1 and ("dr/ess" in row["logs"]) == (arm == "doubly robust")
    plain = study.robust_report.row_of(tier, pool.prompts[:3], "sigmoid", "clean", [0])
    assert plain["win_rate_over_plain"][0] == 0.5
    table = study.robust_report.markdown([plain, row], ["clean"], ["sigmoid", arm])
    assert table.count("\n") == 3 and arm in table
    study.robust_report.figure([plain, row], ["clean"], ["sigmoid", arm], tmp_path / "figure.png")
    study.robust_report.frontier([plain, row], ["clean"], tmp_path / "frontier.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in ("figure", "frontier"))


def test_a_folder_holds_runs_of_one_set_of_settings(study: SimpleNamespace, tmp_path: Path) -> None:
    tier = study.robust_runs.Tier("policy", "policy", "gold", str(tmp_path), 1, 1e-3, 4, 5, 20)
    study.robust_study.refuse_other_settings(tier)
    study.robust_study.refuse_other_settings(replace(tier, policy="moved elsewhere"))
    with pytest.raises(SystemExit, match="another epochs, learning_rate: name another --output_dir"):
        study.robust_study.refuse_other_settings(replace(tier, epochs=2, learning_rate=1e-4))
