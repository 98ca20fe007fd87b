"""The lab's figures and words: real PNG and SVG, the same bytes twice, nothing lost in CSV, awkward data drawn all the same."""

from __future__ import annotations

import csv
import io
import math
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import numpy as np
import pytest

from polyref.report.lab import COLOURS, draw
from polyref.report.lab_page import as_csv, as_markdown, as_text, shown, write_lab_page
from polyref.theory.regression import SlopeFit
from polyref.theory.results import Agreement, Cell, Curve, Estimate, ExperimentResult, Guide, Panel, Table

SIZES = [100.0 * 2**k for k in range(7)]


def curve(name: str, level: float, sizes: list[float] = SIZES) -> Curve:
    y = level / np.asarray(sizes)
    return Curve(name, sizes, y, 0.8 * y, 1.25 * y)


def result(*panels: Panel, title: str = "A gap & its <rate>") -> ExperimentResult:
    rows: tuple[tuple[Cell, ...], ...] = ((100, "a|b", Estimate(0.5, 0.25, 1.0)), (1600, None, Estimate(math.nan, 0.0, 1.0)))
    return ExperimentResult(
        "some-gap",
        title,
        "How fast?",
        "As 1/n.",
        "Measured: -1.",
        "agrees",
        panels or (Panel("left", "pairs", "gap", (curve("mean", 3.0), curve("q90", 9.0)), (Guide(-1.0, "claimed: 1/n"),)),),
        Table(("pairs", "which", "gap"), rows),
        (
            SlopeFit("gap", "mean", -1.0, -1.1, -0.9, 0.0, (100.0, 200.0), -1.0),
            SlopeFit("sign", "mean", math.nan, math.nan, math.nan, math.nan, (1.0,), None, "no slope: an interval holds zero"),
        ),
        {"replicates": 9, "seed": 4},
        ("With a note.",),
    )


def texts(svg: bytes) -> str:
    return " ".join(text for text in ElementTree.fromstring(svg).itertext() if text.strip())


def test_a_figure_says_what_it_shows_and_repeats_byte_for_byte() -> None:
    drawn = draw(result())
    assert drawn == draw(result())
    words = texts(drawn["svg"])
    for word in ("A gap & its <rate>", "left", "pairs", "mean", "q90", "claimed: 1/n", "1,600"):
        assert word in words, word
    assert "\\mathdefault" not in words and "1e-" not in words
    assert all(colour in drawn["svg"].decode() for colour in COLOURS[:2])
    assert drawn["svg"].count(b"@media screen and (prefers-color-scheme: dark) {svg {filter: invert(") == 1
    assert drawn["png"].startswith(b"\x89PNG")
    width, height = struct.unpack(">II", drawn["png"][16:24])
    assert width > 600 and height > 400
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_the_guide_has_the_claimed_slope() -> None:
    """Two guides of one figure, read back from the SVG: the steeper falls further."""
    falls = []
    for slope in (-0.5, -1.0):
        drawn = draw(result(Panel("p", "x", "y", (curve("mean", 3.0),), (Guide(slope, "claimed", (400.0, 3 / 400)),))))
        svg = drawn["svg"].decode()
        dashed = next(line for line in svg.split("<path")[1:] if "#333333" in line)
        points = [tuple(map(float, part.split()[:2])) for part in dashed.split('d="')[1].split('"')[0].split("\n") if part[1:]
                  for part in [part.lstrip("ML ")] if part]  # fmt: skip
        (x0, y0), (x1, y1) = points[0], points[-1]
        falls.append((y1 - y0) / (x1 - x0))
    assert falls[1] == pytest.approx(2 * falls[0], rel=0.15) and falls[0] > 0


@pytest.mark.parametrize(
    "panel",
    [
        Panel("holes", "x", "y", (Curve("c", SIZES, [math.nan, -1.0, 0.0, 1.0, 2.0, 3.0, math.inf], [-1.0] * 7, [4.0] * 7),)),
        Panel("long", "x", "y", (Curve("c", range(1, 60), [math.nan, *range(1, 50), *[math.nan] * 9]),)),
        Panel("nothing", "x", "y", (Curve("c", [1.0, 2.0], [math.nan, -1.0]),), (Guide(-1.0, "g"),)),
        Panel("no curve", "x", "y", ()),
        Panel("few", "x", "y", (curve("c", 1.0, [1.0, 2.0]),)),
        Panel("one", "x", "y", (curve("c", 1.0, [1.0]),), (Guide(-1.0, "g"),)),
        Panel(
            "signed", "x", "y", (Curve("c", SIZES, np.linspace(-1, 1, 7)),), (Guide(0.0, "level", (100.0, 0.0)),), log_y=False
        ),
        Panel("linear", "x", "y", (Curve("c", [0.0, 1.0, 2.0], [3.0, 2.0, 1.0]),), (Guide(-1.0, "g"),), log_x=False),
        Panel("many", "x", "y", tuple(curve(f"curve number {k}", k + 1.0) for k in range(9))),
        Panel(
            "named",
            "x",
            "y",
            (Curve("a", [0.0, 1.0], [1.0, 2.0], [0.5, 1.5], [1.5, 2.5]), Curve("b", [0.0, 1.0], [2.0, 1.0])),
            log_y=False,
            categories=("first kind", "second kind"),
        ),
    ],
    ids=lambda panel: panel.title,
)
def test_awkward_panels_are_drawn(panel: Panel) -> None:
    drawn = draw(result(panel))
    words = texts(drawn["svg"])
    assert panel.title in words and all(name in words for name in panel.categories)
    assert draw(result(panel, panel, panel))["png"] != drawn["png"]


def test_text_shows_intervals_slopes_and_the_finding() -> None:
    text = as_text(result())
    assert "0.5 [0.25, 1]" in text and "1,600" in text and "none [0, 1]" in text
    assert "-1 [-1.1, -0.9]" in text and "an interval holds zero" in text
    assert text.endswith("AGREES: Measured: -1.\nnote: With a note.\n")
    assert shown(None) == "" and shown(12345) == "12,345" and shown("x") == "x" and shown(True) == "True"


def test_every_agreement_is_shown_as_it_is() -> None:
    for agreement in get_args(Agreement):
        one = replace(result(), agreement=agreement)
        assert f"{agreement.upper()}: Measured" in as_text(one)
        words = as_markdown([one], {})
        assert f"| {agreement} | Measured" in words and f"**The finding ({agreement}).**" in words


def test_csv_holds_each_number_in_a_column() -> None:
    rows = list(csv.reader(io.StringIO(as_csv(result()).decode())))
    assert rows[0] == ["pairs", "which", "gap", "gap low", "gap high"]
    assert rows[1] == ["100", "a|b", "0.5", "0.25", "1.0"] and rows[2] == ["1600", "", "nan", "0.0", "1.0"]


def test_markdown_and_page_hold_everything(tmp_path: Path) -> None:
    words = as_markdown([result()], {"some-gap": 1.25})
    assert "polyref lab some-gap --replicates 9 --seed 4" in words and "![A gap & its \\<rate\\>](some-gap.svg)" in words
    assert "| 100 | a\\|b | 0.5 [0.25, 1] |" in words and "(#some-gap)" in words and "1.2 s" in words
    assert all(len(set(map(_bars, block.splitlines()))) == 1 for block in words.split("\n\n") if block.startswith("|"))
    svgs = {"some-gap": draw(result())["svg"]}
    page = write_lab_page(tmp_path / "lab.html", [result()], svgs, {"some-gap": None}).read_text(encoding="utf-8")
    assert page.count("<svg") == 1 and "A gap &amp; its &lt;rate&gt;" in page and "Measured: -1." in page
    assert '<svg style="--ink: #222222;' in page and 'id="figure_1"' not in page
    assert "(prefers-color-scheme: dark) {svg {filter: invert(" in page
    assert "<?xml" not in page and "--replicates 9 --seed 4" in page


def _bars(line: str) -> int:
    return line.replace("\\|", "").count("|")
