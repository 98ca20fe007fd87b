"""The page: complete in itself, the same bytes every time, and safe with whatever text a data set or a model brings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyref.errors import ConfigError, RunFolderError
from polyref.report.figures import Bars, Figure, Line, bar_chart, line_chart
from polyref.report.page import KeyNumber, Section, SideBySide, Table, write_page

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)> \x1b[31mred\x1b]0;title\x07 {{ 7 * 7 }} {% raw %} $\\frac{$ "
    "\"'--> ]]> </svg></style> \u202egnp.exe \ud800 \x00 &amp; javascript:alert(1)"
)
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Outline(HTMLParser):
    """Tags in order, attributes, visible text; fails on a tag closed out of turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def outline(path: Path) -> Outline:
    parser = Outline()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == []
    return parser


def sample(path: Path, text: str = "plain words") -> Path:
    lines = [Line(text, [0, 1, 2], [0.5, 0.6, 0.7], [0.4, 0.5, 0.6], [0.6, 0.7, 0.8]), Line("other", [0, 2], [0.5, 0.6])]
    bars = [Bars(text, [0.5, 0.7], [0.4, 0.6], [0.6, 0.8]), Bars("after", [0.6, float("nan")])]
    figures = [
        line_chart(lines, title=text, x_label=text, y_label=text, baseline=0.5, caption=text),
        bar_chart([text, "second"], bars, title=text, x_label=text, baseline=0.5, caption=text),
    ]
    rows: list[list[Any]] = [[text, (0.6604, 0.5, 0.81), 1200], [text, None, np.int64(3)]]
    table = Table([text, "mean", "n"], rows, text)
    sections = [
        Section(text, [text], figures, [table], [SideBySide(text, [("before", text), (text, "line one\nline two")])]),
        Section("Second"),
        Section("Third"),
    ]
    numbers = [KeyNumber(text, (0.66, 0.5, 0.81), text), KeyNumber("pairs", 48), KeyNumber("model", text)]
    return write_page(path, title=text, summary=[text, "In short."], sections=sections, key_numbers=numbers)


def test_the_page_is_complete_in_itself(tmp_path: Path) -> None:
    page = outline(sample(tmp_path / "report.html"))
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {name for name in names if name.startswith("on") or name in {"src", "srcset", "background", "action"}}
    links = {value for name, value in page.attributes if name.endswith("href")}
    assert links and all(value and value.startswith("#") for value in links)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"'\s]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in text and set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path) -> None:
    page = outline(sample(tmp_path / "report.html", HOSTILE))
    plain = outline(sample(tmp_path / "plain.html"))
    assert set(page.tags) == set(plain.tags) and page.tags.count("section") == plain.tags.count("section")
    assert {name for name, _ in page.attributes} == {name for name, _ in plain.attributes}
    raw = (tmp_path / "report.html").read_bytes()
    assert not re.search(rb"[\x00-\x08\x0b-\x1f\x7f]", raw) and "\u202e".encode() not in raw
    shown = "".join(page.text)
    assert "<script>alert(1)</script>" in shown and "{{ 7 * 7 }}" in shown and "\\x1b[31mred" in shown and "\\u202e" in shown
    assert shown.count("&amp;") > 5


def test_replies_keep_their_lines_and_their_letters(tmp_path: Path) -> None:
    text = "first\n\tsecond é 日本語 👩\u200d💻 مرحبا"
    section = Section("Replies", comparisons=[SideBySide("p", [("a", text)])])
    page = write_page(tmp_path / "page.html", title="t", summary=[], sections=[section])
    assert text in page.read_text(encoding="utf-8")


def test_numbers_are_set_as_a_reader_expects(tmp_path: Path) -> None:
    cells: list[Any] = [
        (0.6604, -0.5, 0.81),
        1200,
        1234567.0,
        0.0,
        1.5e-7,
        float("nan"),
        np.float32(0.25),
        None,
        "0.1 <b>",
        True,
    ]
    table = Table([str(i) for i in range(len(cells))], [cells])
    page = write_page(tmp_path / "page.html", title="t", summary=[], sections=[Section("s", tables=[table])])
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"<td[^>]*>(.*?)</td>", text)
    expected = ["0.660 [−0.500, 0.810]", "1,200", "1.23e+06", "0.000", "1.50e−07", "nan", "0.250", "–", "0.1 &lt;b&gt;", "True"]
    assert found == expected
    assert text.count('<td class="number">') == len(cells) - 1


def test_the_same_numbers_give_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_page import sample; from pathlib import Path; "
        "sample(Path(sys.argv[2]))"
    )
    pages = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path / f"{seed}.html")]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
        pages.append((tmp_path / f"{seed}.html").read_bytes())
    assert pages[0] == pages[1]
    assert not re.search(rb"20\d\d-\d\d-\d\d", pages[0])


def test_a_readers_own_matplotlib_settings_change_nothing() -> None:
    import matplotlib as mpl

    lines = [Line("a", [0, 1], [1, 2])]
    before = line_chart(lines, title="t").svg
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert line_chart(lines, title="t").svg == before


def elements(figure: Figure, kind: str) -> list[ET.Element]:
    return ET.fromstring(figure.svg).findall(f".//{{http://www.w3.org/2000/svg}}{kind}")  # noqa: S314


def test_a_line_chart_draws_each_line_and_its_band() -> None:
    x = np.arange(100.0)
    bare = line_chart([Line("a", x, x)], title="t")
    banded = line_chart([Line("a", x, x, x - 1, x + 1)], title="t")
    assert "var(--series-1)" in bare.svg and "var(--ink)" in bare.svg and "#0000" not in bare.svg
    assert banded.svg.count("fill-opacity: 0.18") == bare.svg.count("fill-opacity: 0.18") + 1
    assert {"a", "b"} <= {text.text for text in elements(line_chart([Line("a", x, x), Line("b", x, -x)], title="t"), "text")}


def test_a_bar_chart_draws_intervals_and_values() -> None:
    figure = bar_chart(["one", "two"], [Bars("a", [0.25, 0.5], [0.2, 0.4], [0.3, 0.6])], title="t", baseline=0.5)
    words = {text.text for text in elements(figure, "text")}
    assert {"one", "two", "0.25", "0.5"} <= words
    bare = bar_chart(["one", "two"], [Bars("a", [0.25, 0.5])], title="t", baseline=0.5)
    assert len(elements(figure, "use")) > len(elements(bare, "use"))


@pytest.mark.parametrize("values", [[], [float("nan")], [float("inf"), 1.0], [0.0], [1e300, -1e300]])
def test_odd_numbers_still_make_a_chart(values: list[float]) -> None:
    assert line_chart([Line("a", range(len(values)), values)], title="t").svg.startswith("<svg")
    assert bar_chart([str(i) for i in range(len(values))], [Bars("a", values)], title="t").svg.startswith("<svg")
    assert line_chart([], title="t").svg and bar_chart([], [], title="t").svg


def test_series_of_unequal_length_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="chart series 'a': a value is missing or too many"):
        line_chart([Line("a", [1, 2], [1])], title="t")
    with pytest.raises(ConfigError, match="chart series 'b'"):
        bar_chart(["g"], [Bars("b", [1], low=[0, 0])], title="t")


def test_a_page_that_cannot_be_written_is_one_line_and_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sample(tmp_path / "report.html")
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match="No space left on device; free some space"):
        sample(path, "new words")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["report.html"]
