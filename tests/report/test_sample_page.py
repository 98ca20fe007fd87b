"""The pictures of a sampling: what is drawn over what, in which order, with which ends; and that the page holds them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from polyref.report import sample
from polyref.report.figures import Figure, Line, line_chart
from polyref.report.sample import write_sample_page

ROWS: list[dict[str, Any]] = [
    {
        "prompt": "often",
        "acceptance": 0.5,
        "ess": 4.0,
        "samples": 4,
        "proposals": 8,
        "accepted": 4,
        "log_f": [-0.7, None, -0.1],
    },
    {
        "prompt": "never",
        "acceptance": None,
        "ess": 0.0,
        "samples": 0,
        "proposals": 0,
        "accepted": 0,
        "log_f": [-3.0, -4.0, -2.0],
    },
    {"prompt": "always", "acceptance": 1.0, "ess": 1.0, "samples": 4, "proposals": 4, "accepted": 4, "log_f": [0.0, -0.5, 0.0]},
]
SUMMARY: dict[str, Any] = {
    "references": ["one", "other"],
    "composition": "geometric",
    "samples": 8,
    "prompts": 3,
    "ess": 5.0,
    "proposals": 12,
    "acceptance": 8 / 12,
    "exact_prompts": 2,
    "log_f": {"lowest": -3.0, "median": -0.7, "highest": 0.0},
}
NAN = pytest.approx(math.nan, nan_ok=True)


def drawn(path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> dict[str, tuple[list[Line], Figure, Any]]:
    """Each figure of the page of `rows` by its title: its lines, what came of them, and how its axes are called."""
    found = {}

    def chart(lines: list[Line], **options: Any) -> Figure:
        figure = line_chart(lines, **options)
        found[options["title"]] = lines, figure, (options["x_label"], options["y_label"])
        return figure

    whole = [row | {"method": "tokens", "calls": 9, "note": "", "tilt_acceptance": row.get("tilt_acceptance")} for row in rows]
    with monkeypatch.context() as patch:
        patch.setattr(sample, "line_chart", chart)
        page = write_sample_page(path, "drawn", SUMMARY, whole).read_text()
    assert all(figure.svg in page for _, figure, _ in found.values())
    return found


def test_the_curves_are_those_of_the_rows_in_the_order_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(tmp_path / "a.html", monkeypatch, ROWS)
    (accepted, effective), _, axes = figures["Acceptance and effective size"]
    assert axes == ("prompts, by acceptance", "share") and [accepted.name, effective.name] == ["accepted", "effective size"]
    assert accepted.x == [1, 2, 3] and accepted.y == [1.0, 0.5, NAN] and effective.y == [0.25, 1.0, NAN]
    ((log_f,), _, axes) = figures["How much the references agree"]
    assert axes == ("prompts, by log F", "log F, nats") and log_f.y == [0.0, -0.7, -3.0]
    assert (log_f.low, log_f.high) == ([-0.5, NAN, -4.0], [0.0, -0.1, -2.0])
    lines, _, axes = figures["Proposals against what was kept"]
    assert axes == ("prompts, by proposals", "completions") and [line.name for line in lines] == [
        "proposed",
        "accepted",
        "samples",
    ]
    assert [line.y for line in lines] == [[0, 4, 8], [0, 4, 4], [0, 4, 4]]


def test_a_tilt_has_a_curve_with_its_interval_and_one_model_no_agreement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [[0.2, 0.1, 0.4], None, [0.9, None, 1.0]]
    rows = [row | {"log_f": None, "tilt_acceptance": mine} for row, mine in zip(ROWS, kept, strict=True)]
    figures = drawn(tmp_path / "a.html", monkeypatch, rows)
    (_, tilt, _), _, _ = figures["Acceptance and effective size"]
    assert tilt.name == "kept by the tilt" and tilt.y == [0.9, 0.2, NAN]
    assert (tilt.low, tilt.high) == ([NAN, 0.1, NAN], [1.0, 0.4, NAN])
    assert "How much the references agree" not in figures
    equal = [row | {"log_f": [0.0, 0.0, 0.0]} for row in ROWS]
    assert "How much the references agree" not in drawn(tmp_path / "b.html", monkeypatch, equal), "references that are equal"


def test_each_is_a_picture_that_names_its_axes_and_is_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (drawn(tmp_path / f"{name}.html", monkeypatch, ROWS) for name in "ab")
    assert len(first) == 3
    for title, (lines, figure, axes) in first.items():
        root = ElementTree.fromstring(figure.svg)
        words = "".join(root.itertext())
        assert root.tag.endswith("svg") and all(text in words for text in axes)
        assert len(lines) == 1 or all(line.name in words for line in lines)
        assert figure.svg == second[title][1].svg and "nan" not in figure.svg.lower()
