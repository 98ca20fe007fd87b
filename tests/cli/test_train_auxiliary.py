"""`polyref train` with an auxiliary preference model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cli_world import World, assert_one_line
from fakes import auxiliary_columns, byte_tokenizer, pair_rows, saved_llama


def sampling(world: World) -> dict[str, Any]:
    return {"members": [{"model": str(world.model)}]}


@pytest.mark.parametrize("objective", ["variance_reduced", "doubly_robust"])
def test_a_run_says_which_objective_it_had_and_shows_its_curves(objective: str, world: World) -> None:
    world.pairs(*pair_rows(8, **auxiliary_columns(3)))
    own: dict[str, Any] = {
        "variance_reduced": {"control_coefficient": "estimated", "loss_type": "ipo"},
        "doubly_robust": {"sampling_policy": sampling(world), "importance_clip": 5},
    }[objective]
    words = world.train(objective=objective, held_out=2, logging_steps=1, **own)
    outcome = world.run(words)
    assert outcome.code == 0, outcome.err
    run = world.path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["objective"], summary["auxiliary_pairs"]) == (objective, 3)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = {"variance_reduced": {"vr/data", "vr/factor", "vr/coefficient"}, "doubly_robust": {"dr/value", "dr/ess"}}[
        objective
    ]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 2 and wanted <= steps[1].keys() and not {"vr/factor"} & steps[0].keys(), "every h is 0 at first"
    assert all(math.isfinite(value) for line in lines for value in line.values())
    page = (run / "report.html").read_text()
    title = {"variance_reduced": "Variance of the plain loss", "doubly_robust": "Win rate over the sampling policy"}[objective]
    assert title in page and objective in page
    manifest = (run / "manifest.json").read_text()
    assert ("weights of sampling policy 1" in manifest) == (objective == "doubly_robust")
    assert world.run(words).code == 0, "complete, and known to be"


def test_score_takes_held_out_rows_without_such_columns_and_writes_them_after_the_others(world: World) -> None:
    world.pairs(*pair_rows(8, **auxiliary_columns(2)))
    held_out = world.pairs(*pair_rows(3), name="held_out.jsonl")
    table = world.path / "scores.parquet"
    outcome = world.run(world.score(eval_data=held_out, output=table))
    assert outcome.code == 0, outcome.err
    rows = pq.read_table(table).to_pylist()
    assert [(Path(row["source"]).name, row["row"]) for row in rows[6:10]] == [
        ("pairs.jsonl", 7),
        ("pairs.jsonl", 8),
        ("held_out.jsonl", 1),
        ("held_out.jsonl", 2),
    ]
    assert len(rows) == 11 and rows[0]["ref_chosen_logps"] == rows[8]["ref_chosen_logps"], "one pair in both files"


def test_another_sampling_policy_is_another_run(world: World) -> None:
    world.pairs(*pair_rows(4, **auxiliary_columns(1)))
    sampler = saved_llama(world.path / "sampler", byte_tokenizer(), seed=5)
    words = world.train(objective="doubly_robust", sampling_policy={"members": [{"model": str(sampler)}]})
    assert world.run(words).code == 0
    saved_llama(world.path / "sampler", byte_tokenizer(), seed=6)
    assert_one_line(world.run(words), ["has changed since", "weights of sampling policy 1", "name a new run folder"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"objective": "variance_reduced"},
            ["row 1, column auxiliary_1", "is missing, and objective variance_reduced needs it"],
        ),
        ({"objective": "doubly_robust"}, ["needs a sampling_policy", "name what the completions were drawn from"]),
        ({"objective": "variance_reduced", "control_coefficient": -1}, ["control_coefficient is -1"]),
        ({"control_coefficient": "most"}, ["control_coefficient"]),
        ({"objective": "bestest"}, ["objective"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_meant_is_one_line(settings: dict[str, Any], says: list[str], world: World) -> None:
    outcome = world.run(world.train(**settings))
    assert_one_line(outcome, says)


def test_validate_names_the_row_of_a_probability_that_is_none(world: World) -> None:
    rows = pair_rows(3, **auxiliary_columns(2))
    rows[1]["auxiliary_probability"] = [0.5, 1.5]
    rows[2]["predicted_probability"] = None
    outcome = world.run(world.validate(data=world.pairs(*rows)))
    assert outcome.code == 2
    for text in ("row 2, column auxiliary_probability: entry 2 is 1.5", "row 3, column predicted_probability: is missing"):
        assert text in outcome.out.replace("\n", " "), outcome.out
