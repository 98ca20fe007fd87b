"""The benchmark of exact geometric draws: its bookkeeping, and turns of both methods on a tiny model."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def stopping() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("early_stopping")


def test_ratios_are_of_proposals_turn_by_turn_and_of_samples_over_all(stopping: ModuleType) -> None:
    turns = {
        "tokens": [
            {"seconds": 1.0, "proposals": 10, "accepted": 2, "calls": 60},
            {"seconds": 2.0, "proposals": 10, "accepted": 4, "calls": 60},
        ],
        "rejection": [
            {"seconds": 2.0, "proposals": 10, "accepted": 1, "calls": 80},
            {"seconds": 2.0, "proposals": 10, "accepted": 2, "calls": 80},
        ],
    }
    found = stopping.summary(turns)
    assert found["proposals"] == {"median": 1.5, "low": 1.0, "high": 2.0}
    assert found["samples"] == pytest.approx((6 / 3) / (3 / 4))
    assert found["methods"]["tokens"]["calls_a_proposal"] == 6 and found["methods"]["rejection"]["acceptance"] == 0.15
    for turn in turns["rejection"]:
        turn["accepted"] = 0
    assert stopping.summary(turns)["samples"] is None


def test_token_proposals_need_fewer_calls_the_further_members_are_apart(stopping: ModuleType) -> None:
    model, tokenizer, prompts = stopping.tiny(2)
    arguments = argparse.Namespace(n=16, max_new_tokens=10, batch_size=64)
    calls, acceptance = [], []
    for references in stopping.noisy(model, tokenizer).values():
        found = stopping.summary(stopping.in_turn(stopping.drawing(references, prompts, arguments), 1))
        rejection, tokens = (found["methods"][method] for method in ("rejection", "tokens"))
        assert tokens["calls_a_proposal"] <= rejection["calls_a_proposal"]
        calls.append(tokens["calls_a_proposal"])
        acceptance.append(tokens["acceptance"])
    assert calls == sorted(calls, reverse=True) and acceptance == sorted(acceptance, reverse=True)
    assert calls[-1] < 0.7 * calls[0]
