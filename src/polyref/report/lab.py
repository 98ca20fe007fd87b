"""The theory lab's figures: curves with their intervals, claimed rates as dashed guides; PNG and SVG, always the same bytes.

A PNG is dark on white. So is an SVG by day, and where a dark page shows it, light and dark change places and hues stay.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from polyref.errors import one_line
from polyref.theory.results import Curve, ExperimentResult, Guide, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Okabe and Ito's palette, distinct to colour-blind readers; markers and dashes tell the curves apart without colour."""

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (9, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)))
_PANEL = (4.6, 3.5)  # inches
_COLUMNS = 2
_DPI = 150
_MARKED, _SPACING = 16, 0.06  # a curve of more points has markers this far apart, in diagonals of the panel
_BAND_POINTS = 4  # from here on an interval is a band; below, error bars
_LEGEND_ROWS = 3  # a longer legend stands below its panel, where it covers nothing
_TITLE, _PANEL_TITLE = 56, 50  # characters a line that a panel's width holds
_NIGHT = "@media screen and (prefers-color-scheme: dark) {svg {filter: invert(0.9) hue-rotate(180deg)}}"
_UNDATED = ("Date", "Creator", "Format", "Type")
_TICKS, _MOST_SIZES, _DECADES = 6, 12, 2.5
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.fontsize": 8,
    "legend.framealpha": 0.75,
    "legend.edgecolor": "none",
    "savefig.facecolor": "white",
}


def draw(result: ExperimentResult) -> dict[str, bytes]:
    """The figure of `result` as {"png": ..., "svg": ...}: one chart a panel. No pyplot, so no global state and no display."""
    import matplotlib.figure
    import matplotlib.style

    style: list[Any] = ["default", _STYLE | {"svg.hashsalt": f"polyref lab {result.name}"}]
    with matplotlib.style.context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        columns = min(_COLUMNS, max(1, len(result.panels)))
        rows = max(1, math.ceil(len(result.panels) / columns))
        heights = [max(map(_height, result.panels[columns * row : columns * (row + 1)]), default=1.0) for row in range(rows)]
        lines = len(_wrapped(result.title, _TITLE * columns).splitlines())
        size = (_PANEL[0] * columns + (1.2 if columns == 1 else 0), _PANEL[1] * sum(heights) + 0.2 + 0.2 * lines)
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        figure.suptitle(_wrapped(result.title, _TITLE * columns), x=0.01, ha="left", weight="bold", size=11)
        grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).flatten()
        for axes, panel in zip(grid, result.panels, strict=False):
            _panel(axes, panel)
        for axes in grid[len(result.panels) :]:
            axes.set_axis_off()
        drawn = {"png": _saved(figure, "png", {"Software": None}), "svg": _saved(figure, "svg", dict.fromkeys(_UNDATED))}
        return drawn | {"svg": drawn["svg"].replace(b"</style>", f" {_NIGHT}</style>".encode(), 1)}


def _saved(figure: Figure, form: str, metadata: dict[str, None]) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, dpi=_DPI, metadata=metadata)
    return buffer.getvalue()


def _wrapped(title: str, width: int) -> str:
    return textwrap.fill(one_line(title, 3 * width), width)


def _entries(panel: Panel) -> int:
    return len(panel.curves) + len(panel.guides)


def _height(panel: Panel) -> float:
    """Of a panel, in units of the usual one."""
    below = 0.06 * math.ceil(_entries(panel) / 2) if _entries(panel) > _LEGEND_ROWS else 0.0
    return 1.0 + below + 0.08 * max(0, len(panel.categories) - 8)


def _panel(axes: Axes, panel: Panel) -> None:
    """One chart, its scales set before anything is drawn."""
    if panel.log_x and not panel.categories:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log", nonpositive="mask")
    for index, curve in enumerate(panel.curves):
        (_categories if panel.categories else _curve)(axes, panel, curve, index)
    for index, guide in enumerate(panel.guides):
        _guide(axes, panel, guide, index)
    if panel.categories:
        names = [one_line(name, 24) for name in panel.categories]
        axes.set_xticks(range(len(names)), names, rotation=25 if max(map(len, names)) * len(names) > 44 else 0, ha="center")
        axes.grid(visible=False, axis="x")
        axes.set_xlim(-0.5, len(names) - 0.5)
    _ticks(axes, panel)
    axes.set_title(_wrapped(panel.title, _PANEL_TITLE))
    axes.set_xlabel(one_line(panel.x_label, 60))
    axes.set_ylabel(one_line(panel.y_label, 50))
    if _entries(panel) > _LEGEND_ROWS:
        below = -0.18 - 0.1 * bool(panel.categories)
        axes.legend(loc="upper left", bbox_to_anchor=(0, below), ncols=2, handlelength=2.4, columnspacing=1)
    elif _entries(panel) > 1 or panel.guides:
        axes.legend(loc="best", handlelength=2.6)


def _curve(axes: Axes, panel: Panel, curve: Curve, index: int) -> None:
    """A line with its interval: a band where there are points enough, error bars where there are few."""
    x, y, low, high = _drawable(panel, curve)
    colour = COLOURS[index % len(COLOURS)]
    look: dict[str, Any] = {
        "color": colour,
        "linestyle": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markevery": _SPACING if len(x) > _MARKED else 1,
    }
    axes.plot(x, y, label=one_line(curve.name, 60), **look)
    if low is None or high is None:
        return
    if len(x) >= _BAND_POINTS:
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    else:
        _bars(axes, x, y, low, high, colour)


def _categories(axes: Axes, panel: Panel, curve: Curve, index: int) -> None:
    """Markers with error bars, side by side within each category."""
    x, y, low, high = _drawable(panel, curve)
    colour, spread = COLOURS[index % len(COLOURS)], 0.6 / max(1, len(panel.curves))
    x = x + (index - (len(panel.curves) - 1) / 2) * spread
    axes.plot(x, y, _MARKERS[index % len(_MARKERS)], color=colour, label=one_line(curve.name, 60))
    if low is not None and high is not None:
        _bars(axes, x, y, low, high, colour)


def _bars(axes: Axes, x: Any, y: Any, low: Any, high: Any, colour: str) -> None:
    ends = np.fmax([y - low, high - y], 0)
    axes.errorbar(x, y, yerr=ends, fmt="none", ecolor=colour, elinewidth=1.1, capsize=2.5)


def _drawable(panel: Panel, curve: Curve) -> tuple[Any, Any, Any, Any]:
    """x, y, low and high as arrays; on a logarithmic axis what is not positive is left out, ends of intervals at the foot."""
    y = np.asarray(curve.y, dtype=float)
    x, low, high = (None if v is None else np.asarray(v, dtype=float) for v in (curve.x, curve.low, curve.high))
    if panel.log_y:
        y = np.where(y > 0, y, np.nan)
        if low is not None:
            positive = [one for one in np.concatenate([[*c.y, *(c.low or ())] for c in panel.curves]) if one > 0]
            low = np.where(low > 0, low, min(positive, default=1.0) / 2)
        low, high = (None if end is None else np.where(np.isnan(y), np.nan, end) for end in (low, high))
    return x, y, low, high


def _guide(axes: Axes, panel: Panel, guide: Guide, index: int) -> None:
    """The power law of the claimed rate across the panel, through its point or through the middle of the first curve."""
    ends = [v for curve in panel.curves for v in curve.x if math.isfinite(v) and (v > 0 or not panel.log_x)]
    x0, y0 = guide.through or _middle(panel)
    if not ends or not math.isfinite(y0):
        return
    low, high = (-0.5, len(panel.categories) - 0.5) if panel.categories else (min(ends), max(ends))
    if guide.slope == 0:
        x = np.array([low, high])
        y = np.full(2, y0)
    else:
        x = np.geomspace(max(low, 1e-300), high, 50) if low > 0 else np.linspace(high / 50, high, 50)
        y = y0 * (x / x0) ** guide.slope
    axes.plot(x, y, color="#333333", linewidth=1.1, linestyle=(0, (4 - index % 2 * 2, 3)), label=one_line(guide.label, 60))


def _middle(panel: Panel) -> tuple[float, float]:
    """A point of the first curve near its middle that can be drawn."""
    for curve in panel.curves:
        points = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y) and (y > 0 or not panel.log_y)]
        if points:
            return points[len(points) // 2]
    return 1.0, math.nan


def _ticks(axes: Axes, panel: Panel) -> None:
    """Ticks in plain digits: along x the sizes themselves, at most six of them, where they are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    digits = FuncFormatter(lambda value, _: _digits(value))
    if not panel.categories:
        sizes = sorted({float(x) for curve in panel.curves for x in curve.x if x > 0 or not panel.log_x})
        if 2 <= len(sizes) <= _MOST_SIZES:
            axes.set_xticks(sizes[:: math.ceil(len(sizes) / _TICKS)])
            axes.xaxis.set_minor_locator(NullLocator())
        if panel.log_x:
            axes.xaxis.set_major_formatter(digits)
            axes.xaxis.set_minor_formatter(NullFormatter())
        elif 2 <= len(sizes) <= _MOST_SIZES:
            axes.xaxis.set_major_formatter(digits)
    if panel.log_y:
        low, high = axes.get_ylim()
        decades = math.log10(high / low)
        subs = (1.0,) if decades > _DECADES else (1.0, 3.0) if decades > 1 else (1.0, 2.0, 3.0, 5.0, 7.0)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(digits)
        axes.yaxis.set_minor_formatter(NullFormatter())


def _digits(value: float) -> str:
    """1e-05 as 10⁻⁵, 3e6 as 3·10⁶, the everyday range in digits."""
    if 1e-4 <= abs(value) < 1e6 or value == 0:
        return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    power = f"10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return power if mantissa == "1" else f"{mantissa}·{power}"
