"""Charts as inline SVG: the same bytes for the same numbers, legible on paper white and in the dark, intervals always drawn.

Colours leave matplotlib as marker values and become CSS variables (`--ink`, `--grid`, `--series-1` ...), so that the page's
style decides how they look and a chart follows the reader's dark mode without a script.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from polyref.errors import ConfigError, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Numbers = Sequence[float] | NDArray[Any]

SERIES_COLOURS = 6
_WIDTH = 5.0  # inches: narrow, so that text stays legible when a phone shows it at full width
_INK, _GRID = "#000001", "#000002"
_SERIES = [f"#0000{index + 16:02x}" for index in range(SERIES_COLOURS)]
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--grid)"} | {c: f"var(--series-{i + 1})" for i, c in enumerate(_SERIES)}
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_MARKED_POINTS = 12
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}
"""How charts look, by matplotlib's own names; its colours are markers, to be replaced where a chart leaves the page."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart for a page. `svg` comes from the functions below and enters the page as it is; the words are escaped there."""

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: `y` over `x`, and the ends `low` and `high` of its interval at each point where there is one."""

    name: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None


@dataclass(frozen=True, slots=True)
class Bars:
    """One bar a group: `values`, and the ends `low` and `high` of the interval of each."""

    name: str
    values: Numbers
    low: Numbers | None = None
    high: Numbers | None = None


def line_chart(
    lines: Sequence[Line], *, title: str, x_label: str = "", y_label: str = "", baseline: float | None = None, caption: str = ""
) -> Figure:
    """Curves with their intervals as bands; `baseline` draws a dashed level, such as 0.5 for a coin flip.

    Raises:
        ConfigError: sequences of one line differ in length.
    """
    for line in lines:
        _same_length(line.name, line.x, line.y, line.low, line.high)
    with _axes(title, height=3.0) as (axes, svg):
        for index, line in enumerate(lines):
            colour = _SERIES[index % SERIES_COLOURS]
            marker = "o" if len(line.x) <= _MARKED_POINTS else None
            dashes = _DASHES[index % len(_DASHES)]
            name, x, y = one_line(line.name, 60), _finite(line.x), _finite(line.y)
            axes.plot(x, y, color=colour, linestyle=dashes, marker=marker, markersize=4, label=name)
            if line.low is not None and line.high is not None:
                axes.fill_between(x, _finite(line.low), _finite(line.high), color=colour, alpha=0.18, linewidth=0)
        if baseline is not None:
            axes.axhline(baseline, color=_INK, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.6)
        axes.grid(visible=False, axis="x")
        axes.margins(x=0.02)
        _finish(axes, x_label, y_label, named=len(lines) > 1)
    return Figure(title, svg[0], caption)


def bar_chart(
    groups: Sequence[str],
    bars: Sequence[Bars],
    *,
    title: str,
    x_label: str = "",
    baseline: float | None = None,
    caption: str = "",
) -> Figure:
    """Horizontal bars by group, each with its interval as an error bar and its value written at the end.

    Raises:
        ConfigError: a series has not one value a group.
    """
    for series in bars:
        _same_length(series.name, groups, series.values, series.low, series.high)
    thickness = 0.8 / max(len(bars), 1)
    with _axes(title, height=0.9 + max(len(groups) * len(bars), 1) * 0.24 + len(groups) * 0.12) as (axes, svg):
        for index, series in enumerate(bars):
            values = _finite(series.values)
            low = values if series.low is None else _finite(series.low)
            high = values if series.high is None else _finite(series.high)
            places = np.arange(len(groups)) + (index - (len(bars) - 1) / 2) * thickness
            axes.barh(places, values, thickness * 0.86, color=_SERIES[index % SERIES_COLOURS], label=one_line(series.name, 60))
            if series.low is not None or series.high is not None:
                spread = np.clip([values - low, high - values], 0, None)
                axes.errorbar(values, places, xerr=spread, fmt="none", ecolor=_INK, elinewidth=1.1, capsize=2.5)
            for place, value, end in zip(places, values, np.fmax(np.fmax(values, high), 0), strict=True):
                if np.isfinite(value):
                    axes.annotate(f"{value:.3g}", (end, place), (4, 0), textcoords="offset points", va="center", size=8)
        if baseline is not None:
            axes.axvline(baseline, color=_INK, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.6)
        axes.set_yticks(range(len(groups)), [one_line(group, 34) for group in groups])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.1)
        _finish(axes, x_label, "", named=len(bars) > 1)
    return Figure(title, svg[0], caption)


@contextmanager
def _axes(title: str, height: float) -> Iterator[tuple[Axes, list[str]]]:
    """Axes to draw on; after the block the list holds the SVG. No pyplot, so no global state and no display."""
    import matplotlib.figure
    import matplotlib.style

    svg: list[str] = []
    with (
        matplotlib.style.context(["default", STYLE | {"svg.hashsalt": f"polyref {one_line(title)}"}]),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # the reader's browser has its own fonts
        figure = matplotlib.figure.Figure(figsize=(_WIDTH, height), layout="constrained")
        yield figure.subplots(), svg
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    svg.append(_for_a_page(buffer.getvalue()))


def _finish(axes: Axes, x_label: str, y_label: str, *, named: bool) -> None:
    axes.set_xlabel(one_line(x_label, 50))
    axes.set_ylabel(one_line(y_label, 36))
    if named:
        longest = max(len(label) for label in axes.get_legend_handles_labels()[1])
        columns = 3 if longest <= 18 else 2 if longest <= 30 else 1
        axes.figure.legend(loc="outside upper left", ncols=columns, handlelength=2.4, columnspacing=1.4, borderaxespad=0.2)


def _for_a_page(document: str) -> str:
    """The `<svg>` element alone, sized by the page, its colours as CSS variables, its sequence numbers (not unique) removed."""
    svg = document[document.index("<svg") :].strip()
    svg = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    svg = re.sub(r' id="[a-z]+[\d_.]*_\d+"', "", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r"#0000[0-9a-f]{2}\b", lambda match: _VARIABLES.get(match.group(), match.group()), svg)


def _finite(values: Numbers) -> NDArray[Any]:
    """`values` with nothing drawn where one is not finite."""
    array = np.asarray(values, dtype=float)
    return np.where(np.isfinite(array), array, np.nan)


def _same_length(name: str, first: Sequence[Any] | Numbers, *others: Numbers | None) -> None:
    if any(len(other) != len(first) for other in others if other is not None):
        raise ConfigError("a value is missing or too many", where=f"chart series {name!r}", fix="give one value a point")
