"""The page of an iterative run: what it says of rounds, rails and anchors, and that texts of others stay texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polyref.report.iterate import write_iterate_page

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} \x1b[31m \u202e & \"'"


def a_row(number: int, **changes: Any) -> dict[str, Any]:
    def near(value: float) -> list[float]:
        return [value, value - 0.1, value + 0.1]

    row: dict[str, Any] = {"round": number, "reward": near(1.0 + number), "gold": near(2.0 - number), "kl": near(0.5 * number)}
    row |= {"kl_each": [near(0.4 * number), None], "kl_anchor": near(0.5 * number), "length": near(12.0), "win_rate": near(0.5)}
    row |= {"distinct": near(0.9), "distinct_bigrams": near(0.8), "unscored": 0, "share_ended": 0.5}
    if number:
        row |= {"completions": 64, "tokens": 1200, "pairs": 8, "ties": 1, "prompts_without_pairs": 2}
        row |= {"train_pairs": 8 * number, "train_loss": 0.6}
    return row | changes


def a_summary(**changes: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "references": ["one", "two"],
        "weights": [0.5, 0.5],
        "composition": "geometric",
        "anchor": "the original references, in every round",
        "dtypes": {"policy": "float32", "references": ["float32", "float32"]},
        "reward": "rule:length",
        "pessimism": 0.0,
        "gold": "rule:sentiment",
        "label": "soft",
        "pairing": "best_worst",
        "enhancer": None,
        "loss_type": "sigmoid",
        "beta": 0.1,
        "replay": "all rounds",
        "from_start": False,
        "prompts": 16,
        "shared_prompts": 0,
        "offline_pairs": 0,
        "offline_left_out": 0,
        "judged_on": "8 held-out prompts",
        "labels": 16,
        "tokens": 2400,
        "asked_rounds": 3,
        "stop": None,
        "final_round": 2,
        "rounds": [a_row(0), a_row(1), a_row(2)],
    } | changes


def test_a_rail_that_ended_the_run_is_told_with_the_round_that_is_kept(tmp_path: Path) -> None:
    stop = {"rail": "over-optimisation", "at": 2, "keep": 0, "why": "over-optimisation: gold fell"}
    page = write_iterate_page(tmp_path / "page.html", "a run", a_summary(stop=stop, final_round=0)).read_text()
    assert "It ended after round 2 of 3: over-optimisation: gold fell." in page
    assert "The final policy is that of the start, the last before it." in page
    assert "The mean reward of the final policy, that of the start, is 1.000" in page
    assert "KL to the references, nats" not in page.replace(">KL to the references, nats</text>", ""), "it is the anchor's"


def test_an_anchor_that_moves_has_its_own_column(tmp_path: Path) -> None:
    rows = [a_row(number, kl_anchor=[0.1, 0.0, 0.2]) for number in range(3)]
    page = write_iterate_page(tmp_path / "page.html", "a run", a_summary(rounds=rows)).read_text()
    assert "<th" in page and page.count("KL to the references, nats") > page.count("KL to the anchor, nats")
    assert "from_start" in page and ">no<" in page and ">none<" in page


def test_texts_of_others_stay_texts(tmp_path: Path) -> None:
    enhancer = {"who": HOSTILE, "system_prompt": HOSTILE}
    stop = {"rail": "KL budget", "at": 2, "keep": 1, "why": HOSTILE}
    changes = {name: HOSTILE for name in ("model", "reward", "gold", "anchor", "judged_on", "label")}
    summary = a_summary(**changes, references=[HOSTILE, "two"], enhancer=enhancer, stop=stop)
    page = write_iterate_page(tmp_path / "page.html", HOSTILE, summary).read_text()
    body = page[page.index("<body") :]
    assert "<script" not in body and "<img" not in body and "\x1b" not in page and "\u202e" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in body and "{{ 7 * 7 }}" in body


def test_without_gold_and_with_one_prompt_there_are_dashes(tmp_path: Path) -> None:
    rows = [a_row(number, gold=None, reward=[1.0, None, None], win_rate=[0.5, None, None]) for number in range(3)]
    page = write_iterate_page(tmp_path / "page.html", "a run", a_summary(rounds=rows, gold=None)).read_text()
    assert "Gold reward against KL" not in page and "1.000 [–, –]" in page and "by the reward, against the start" in page
