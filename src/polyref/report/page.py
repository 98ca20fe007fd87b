"""One self-contained HTML page: it opens from a mail or a shared drive, loads nothing, and runs no script.

Every text on it is data (prompts, replies, model names), so all of it is escaped, control characters are shown rather than
sent, and a content policy in the page forbids scripts and loading even if something slipped through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from polyref.files import write_bytes
from polyref.report.figures import SERIES_COLOURS, Figure

Estimate = tuple[float, float, float]
"""A mean and the ends of its interval: (mean, low, high)."""

Cell = str | int | float | Estimate | None
_JOINERS = "\n\t\u200c\u200d"  # not printable to Python, and harmless: line ends, and what joins letters and emoji


@dataclass(frozen=True, slots=True)
class KeyNumber:
    """A number large enough to be read across the room; an Estimate is shown with its interval."""

    label: str
    value: Cell
    note: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under `columns`. Columns without any text are set as numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    @property
    def numeric(self) -> list[bool]:
        return [not any(isinstance(row[index], str) for row in self.rows) for index in range(len(self.columns))]


@dataclass(frozen=True, slots=True)
class SideBySide:
    """What several policies reply to one prompt: (name, text) pairs, shown next to each other."""

    prompt: str
    replies: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it, in the order of the fields."""

    heading: str
    paragraphs: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    comparisons: Sequence[SideBySide] = ()


def write_page(
    path: str | Path,
    *,
    title: str,
    summary: Sequence[str],
    sections: Sequence[Section],
    key_numbers: Sequence[KeyNumber] = (),
) -> Path:
    """Write the page to `path` (atomically) and return `path`. `summary` opens it: sentences a newcomer understands.

    Raises:
        RunFolderError: the file cannot be written.
    """
    page = (
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            summary=summary,
            sections=sections,
            key_numbers=key_numbers,
            series=range(1, SERIES_COLOURS + 1),
            version=metadata.version("polyref"),
        )
    )
    write_bytes(path, page.encode())
    return Path(path)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("polyref.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _shown(value: Any) -> Any:
    """What a template expression puts on the page, before escaping. The SVG of a Figure is ours and stays as it is."""
    if isinstance(value, Figure):
        return Markup(value.svg)  # noqa: S704
    if isinstance(value, Markup):
        return value
    if value is None:
        return "–"
    if isinstance(value, tuple):
        mean, low, high = value
        return f"{_number(mean)} [{_number(low)}, {_number(high)}]"
    if isinstance(value, Real) and not isinstance(value, bool):
        return _number(float(value) if not isinstance(value, Integral) else int(value))
    return "".join(c if c.isprintable() or c in _JOINERS else c.encode("unicode_escape").decode() for c in str(value))


def _number(value: float) -> str:
    """At least three significant digits, never an exponent in the everyday range, a true minus sign."""
    if isinstance(value, int):
        text = f"{value:,}"
    elif not math.isfinite(value):
        text = str(value)
    elif value == 0 or 1e-3 <= abs(value) < 1e6:
        text = f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    else:
        text = f"{value:.2e}"
    return text.replace("-", "−")
