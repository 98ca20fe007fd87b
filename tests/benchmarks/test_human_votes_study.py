"""The study of human votes: what a vote says, which pairs are auxiliary, what g is, and that all of it runs and resumes."""

from __future__ import annotations

import gzip
import importlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fakes import saved_llama
from polyref.cli.main import main as polyref
from polyref.data.sources import prompt_key
from polyref.objectives.pairwise import sigmoid
from polyref.objectives.variance_reduced import variance_reduced
from polyref.types import PreferenceRecord

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def study() -> Iterator[SimpleNamespace]:
    """The four modules, which find each other as they do when one of them is run as a script."""
    names = ("human_votes", "human_votes_measures", "human_votes_study", "surface_preferences")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    torch.set_num_threads(threads)


def row(prompt: str, chosen: str, rejected: str, votes: list[int], models: str = "a_b", position: int = 1) -> dict[str, Any]:
    texts = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return texts | {"votes": votes, "cmp_key": models, "chosen_position": position}


def tie(prompt: str, first: str, second: str, votes: list[int], models: str = "a_b") -> dict[str, Any]:
    return {"prompt": prompt, "response1": first, "response2": second, "votes": votes, "cmp_key": models}


def text(reply: Any) -> str:
    return reply[0]["content"]


def test_a_tie_is_half_a_vote_and_writers_follow_chosen(study: SimpleNamespace) -> None:
    as_vote = study.human_votes.as_vote
    split = as_vote(row("p", "good", "bad", [2, 2, 1], "left_right", position=2))
    assert split.record.chosen_probability == pytest.approx(2 / 3)
    assert split.majority == 1 and split.writers == ("right", "left")
    assert as_vote(row("p", "good", "bad", [0, 1, 1])).record.chosen_probability == pytest.approx(5 / 6)
    assert as_vote(row("p", "good", "bad", [1, 1, 1])).writers == ("a", "b")
    tied = as_vote(tie("p", "one", "other", [0, 0, 2]))
    assert text(tied.record.chosen) == "one" and tied.record.chosen_probability == pytest.approx(1 / 3)
    assert tied.majority == 0.5 and study.human_votes.by_majority(tied).chosen_probability == 0.5
    plain = as_vote({"prompt": "p", "chosen": "x", "rejected": "y", "chosen_position": 2})
    assert plain.record.chosen_probability == 1 and plain.writers is None


def write(data: Path, name: str, rows: list[dict[str, Any]], ties: list[dict[str, Any]] | None = None) -> None:
    (data / name).mkdir(parents=True)
    for file, lines in (("pairs", rows), ("ties", ties)):
        if lines is not None:
            with gzip.open(data / name / f"{file}.jsonl.gz", "wt") as out:
                out.writelines(json.dumps(line) + "\n" for line in lines)


def some_data(data: Path) -> Path:
    """10 prompts with the replies of three models, the longest preferred, and ties, two on a prompt of their own."""
    replies = {"a": "yes", "b": "yes, it is", "c": "yes, it is so."}
    rows = [
        row(f"question {i}?", replies[better], replies[worse], [1, 1, 1 + (i % 2)], f"{better}_{worse}")
        for i in range(10)
        for better, worse in (("b", "a"), ("c", "b"), ("c", "a"))
    ]
    ties = [tie(f"question {i}?", f"perhaps {i}", "yes", [0, 0, 1], "d_a") for i in (*range(10), 98, 99)]
    write(data, "pandalm-human", rows, ties)
    bare = [{name: r[name] for name in ("prompt", "chosen", "rejected", "chosen_position")} for r in rows]
    write(data, "mt-bench-human", bare)
    return data


def test_ties_go_where_their_prompt_goes(study: SimpleNamespace, tmp_path: Path) -> None:
    train, held_out = study.human_votes.load_votes(some_data(tmp_path), "pandalm-human")
    sides = [{prompt_key(vote.record.prompt) for vote in side} for side in (train, held_out)]
    assert not sides[0] & sides[1] and [len(side) for side in sides] == [10, 2]
    assert len(train) == 8 * 4 + 2 and len(held_out) == 2 * 4
    assert not any("98" in prompt or "99" in prompt for prompt in sides[1])


def test_the_split_is_that_of_the_pocket_policy(
    study: SimpleNamespace, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_corpora, sources = (study.human_votes.POCKET[name] for name in ("load_corpora", "SOURCES"))
    monkeypatch.setitem(load_corpora.__globals__, "SOURCES", {name: sources[name] for name in study.human_votes_study.SETS})
    corpora = load_corpora(shared_data)
    for name in study.human_votes_study.SETS:
        train, held_out = study.human_votes.load_votes(shared_data, name)
        prompts = {prompt_key(vote.record.prompt) for vote in held_out}
        assert prompts == {prompt_key(record.prompt) for record in corpora[name][1]}
        assert not prompts & {prompt_key(vote.record.prompt) for vote in train}


def test_a_pool_pairs_different_replies_of_different_models(study: SimpleNamespace) -> None:
    rows = [row("p", "1", "2", [1, 1, 1], "a_b"), row("p", "2", "3", [1, 1, 1], "c_a"), row("q", "x", "y", [1, 1, 1])]
    votes = [study.human_votes.as_vote(each) for each in rows]
    found = study.human_votes.pools(votes)
    pairs = Counter(frozenset(map(text, pair)) for pair in found[prompt_key(votes[0].record.prompt)])
    # a wrote 1 and 3, b and c wrote 2: not (1, 3), of one model; not (2, 2); (1, 2) and (2, 3) once for each writer of 2
    assert pairs == {frozenset("12"): 2, frozenset("23"): 2}
    unknown = [vote._replace(writers=None) for vote in votes]
    pairs = Counter(frozenset(map(text, pair)) for pair in study.human_votes.pools(unknown)[prompt_key(votes[0].record.prompt)])
    assert pairs == {frozenset("12"): 1, frozenset("23"): 1, frozenset("13"): 1}


@pytest.mark.parametrize(("replies", "count"), [(5, 4), (3, 4)])
def test_auxiliary_pairs_are_uniform_over_the_pool(study: SimpleNamespace, replies: int, count: int) -> None:
    """In every place; without repetition from a pool that is large enough, as evenly as can be from another."""
    votes = [study.human_votes.as_vote(row("p", str(i), str(i + 1), [1, 1, 1], f"m{i}_m{i + 1}")) for i in range(replies - 1)]
    size, draws = replies * (replies - 1) // 2, 3000
    seen: list[Counter[frozenset[str]]] = [Counter() for _ in range(count)]
    for seed in range(draws // len(votes)):
        for drawn in study.human_votes.auxiliary_pairs(votes, count, seed=seed):
            pairs = [frozenset(map(text, pair)) for pair in drawn]
            assert Counter(pairs).most_common()[0][1] == math.ceil(count / size)
            for place, pair in zip(seen, pairs, strict=True):
                place[pair] += 1
    for place in seen:
        expected = draws / size
        assert len(place) == size and sum((n - expected) ** 2 / expected for n in place.values()) < 30  # p = 0.0004 at 9


def test_a_pool_of_one_pair_leaves_the_plain_loss(study: SimpleNamespace) -> None:
    vote = study.human_votes.as_vote(row("p", "good", "bad", [1, 1, 1]))
    ((pairs),) = study.human_votes.auxiliary_pairs([vote], 4, seed=0)
    assert [tuple(map(text, pair)) for pair in pairs] == [("good", "bad")] * 4
    h, g, z = torch.tensor([0.7]).double(), torch.tensor([0.8]).double(), torch.tensor([1.0]).double()
    terms = variance_reduced(h, z, g, h.expand(1, 4), g.expand(1, 4), sigmoid)
    torch.testing.assert_close(terms.loss, sigmoid(h))


def test_surface_preferences_are_antisymmetric_and_learn_and_are_no_reward(study: SimpleNamespace) -> None:
    generator = np.random.default_rng(0)
    records = []
    for _ in range(120):
        short, long = (" ".join(generator.choice(list("abcdefgh"), size)) for size in generator.choice(20, 2, replace=False))
        records.append(PreferenceRecord("a b?", *((long, short) if len(long) > len(short) else (short, long)), 0.9))
    g = study.surface_preferences.fit_surface_preferences(records, ridge=0.01)
    asked = [r.prompt for r in records], [r.chosen for r in records], [r.rejected for r in records]
    forth, back = g(*asked), g(asked[0], asked[2], asked[1])
    assert torch.equal(forth, 1 - back) and (forth > 0.5).float().mean() > 0.95
    x, y, z = "a", "b c d d.", "e a f a a h"
    around = torch.logit(g(["a b?"] * 3, [x, y, z], [y, z, x])).sum()
    assert abs(around) > 1e-3  # rewards would cancel around a cycle
    bare = study.surface_preferences.features("How is it?", [{"role": "assistant", "content": ""}])
    assert bare == [0.0, 1.0, 0.0, 0.0, 0.0]


def a_side(study: SimpleNamespace) -> Any:
    """Three prompts of two votes each, one of them a tie, with random g."""
    rows = [row(f"p{i // 2}", f"good {i}", f"bad {i}", [1, 1, 1]) for i in range(5)] + [tie("p2", "x", "y", [0, 0, 1])]
    votes = [study.human_votes.as_vote(each) for each in rows]
    g = torch.rand(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return study.human_votes.Side(votes, study.human_votes.auxiliary_pairs(votes, 4, seed=0), g)


def test_ties_count_in_the_log_loss_but_not_in_the_agreement(study: SimpleNamespace) -> None:
    side, h = a_side(study), np.array([[1.0, 1.0, 1.0, 1.0, -1.0, 2.0], [1.0, 0.0, 1.0, 1.0, 1.0, 2.0]])
    found = study.human_votes_measures.per_vote(h, side)
    assert found["agreement"][0].tolist()[:5] == [1, 1, 1, 1, 0] and found["agreement"][1, 1] == 0.5
    assert np.isnan(found["agreement"][:, 5]).all()
    share = 2 / 3
    assert found["log loss"][0, 5] == pytest.approx(
        -share * math.log(1 / (1 + math.exp(-2))) + (1 - share) * math.log1p(math.e**2)
    )
    assert found["log loss at best temperature"].mean() <= min(found["log loss"].mean(), math.log(2)) + 1e-9
    assert study.human_votes_measures.interval(found["agreement"], side)[0] == pytest.approx(8.5 / 10)


def test_the_factor_is_the_ratio_of_variances(study: SimpleNamespace) -> None:
    side = a_side(study)
    h = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ratio, low, high = study.human_votes_measures.factor(h.numpy(), side, "majority", 1.0)
    z = torch.tensor([1, 1, 1, 1, 1, 0.5]).double()
    g = side.g
    plain = z * sigmoid(h[..., 0]) + (1 - z) * sigmoid(-h[..., 0])
    mean = g * sigmoid(h) + (1 - g) * sigmoid(-h)
    reduced = plain - mean[..., 0] + mean[..., 1:].mean(-1)
    assert ratio == pytest.approx((plain.var() / reduced.var()).item()) and low <= ratio <= high
    assert study.human_votes_measures.factor(h.numpy(), side, "share", 0.0) == pytest.approx([1, 1, 1])


@pytest.mark.slow
@pytest.mark.ci
def test_the_study_runs_resumes_and_says_what_it_found(
    study: SimpleNamespace,
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    main, arms = study.human_votes_study, ("sigmoid, majority", "variance reduced, shares")
    monkeypatch.setenv("POLYREF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(main, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(main, "SETS", {"pandalm-human": arms})
    monkeypatch.setattr(main, "TRAIN_PAIRS", 10)
    monkeypatch.setattr(main, "FOLDS", 2)
    monkeypatch.setattr(main, "train", lambda run: polyref(["train", "--config", str(run.folder / "settings.yaml")]) == 0)
    saved_llama(tmp_path / "pocket" / "base", tiny_tokenizer)
    words = ["--pocket", str(tmp_path / "pocket"), "--data", str(some_data(tmp_path / "data"))]
    words += ["--output_dir", str(tmp_path / "runs"), "--processes", "1", "--seeds", "0"]
    main.main(words)
    assert "2 of 2 runs to do" in capsys.readouterr().out

    written = (tmp_path / "results" / "human_votes_study.json").read_text()
    assert str(tmp_path) not in written and (tmp_path / "results" / "human_votes_study.png").stat().st_size > 1000
    found = json.loads(written)["sets"]["pandalm-human"]
    assert found["training"]["pairs"] == 34 and found["held out"]["pairs"] == 8 and found["held out"]["ties"] == 2
    assert found["held out"]["longer reply"][0] == 1 and found["training"]["pairs whose pool is one pair"] == 2
    assert found["training"]["p of uniform pairs of models"] == pytest.approx(0.950, abs=1e-3)  # 8, 8, 8 and 10 pairs
    assert set(found["arms"]) == set(arms) and found["arms"][arms[1]]["factor"]["c = 1"][0] > 0
    (summary,) = (tmp_path / "runs" / "pandalm-human").glob("sigmoid-majority-seed0/summary.json")
    after = np.array(json.loads(summary.read_text())["after"]["h"])
    agreement = ((after > 0) + 0.5 * (after == 0))[:6]  # the ties come last
    assert found["arms"][arms[0]]["agreement"][0] == pytest.approx(agreement.mean())

    main.main(words)
    assert "0 of 2 runs to do" in capsys.readouterr().out
    assert (tmp_path / "results" / "human_votes_study.json").read_text() == written
