"""The page of a training says what its summary holds, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polyref.report.training import write_training_page


def a_summary(**changes: Any) -> dict[str, Any]:
    report = {"pairs": 4, "prompts": 3, "accuracy": [0.75, 0.6, 0.9], "margin": [-0.2, -0.5, 0.1]}
    return {
        "model": "tiny",
        "references": ["one", "two"],
        "weights": [0.5, 0.5],
        "composition": "geometric",
        "divergence": "reverse",
        "loss_type": "sigmoid",
        "beta": 0.1,
        "train_pairs": 7,
        "compatibility": [],
        "shared_prompts": 0,
        "before": report,
        "after": report,
    } | changes


@pytest.mark.parametrize(
    ("shared", "says"), [(0, "3 prompts, none of them trained on"), (2, "3 prompts, 2 of them trained on")]
)
def test_the_page_says_how_many_held_out_prompts_were_trained_on(shared: int, says: str, tmp_path: Path) -> None:
    page = write_training_page(tmp_path / "page.html", "a run", a_summary(shared_prompts=shared), []).read_text()
    assert says in page and "the 95% interval, 60% to 90%, is above chance" in page
    assert not any(word in page for word in ("people", "human"))


def test_without_an_interval_there_are_dashes(tmp_path: Path) -> None:
    report = {"pairs": 4, "prompts": 1, "accuracy": [0.75, None, None], "margin": [-0.2, None, None]}
    page = write_training_page(tmp_path / "page.html", "a run", a_summary(before=report, after=report), []).read_text()
    assert "0.750 [–, –]" in page and "−0.200 [–, –]" in page and "one prompt gives no interval" in page


def test_without_held_out_pairs_there_is_no_evidence(tmp_path: Path) -> None:
    page = write_training_page(tmp_path / "page.html", "a run", a_summary(before=None, after=None), []).read_text()
    assert "Held-out evidence" not in page and "7 preference pairs" in page
