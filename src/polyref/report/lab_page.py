"""The theory lab's words: a result as text for a terminal, as CSV, as a part of a Markdown or an HTML page."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from polyref.report import figures, page
from polyref.theory.regression import SlopeFit
from polyref.theory.results import Cell, Estimate, ExperimentResult

SLOPE_COLUMNS = ("slope of", "statistic", "measured", "claimed", "points", "note")


SOURCES = (
    "Sources: [MR] arXiv 2502.01203, many references; [IT] arXiv 2312.11456, iterative learning; [VR] arXiv 2504.03784, "
    "variance reduction; [DR] arXiv 2506.01183, double robustness; [RSO] arXiv 2309.06657, rejection sampling."
)


def as_text(result: ExperimentResult) -> str:
    """Title, table with intervals, slopes, the finding, notes: what `polyref lab` prints."""
    parts = [f"{result.title}\n{'=' * len(result.title)}\n", _text_table(result.table.columns, result.table.rows)]
    if result.slopes:
        parts.append("slopes of log against log, with 95% bootstrap intervals\n" + _text_table(SLOPE_COLUMNS, _slopes(result)))
    parts.append(f"{result.agreement.upper()}: {result.finding}\n" + "".join(f"note: {note}\n" for note in result.notes))
    return "\n".join(parts)


def as_csv(result: ExperimentResult) -> bytes:
    """The table; a column with intervals becomes three: NAME, NAME low, NAME high."""
    table = result.table
    wide = [any(isinstance(row[index], Estimate) for row in table.rows) for index in range(len(table.columns))]
    names = [
        [name, f"{name} low", f"{name} high"] if three else [name] for name, three in zip(table.columns, wide, strict=True)
    ]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([name for group in names for name in group])
    for row in table.rows:
        cells = [_three(cell) if three else [cell] for cell, three in zip(row, wide, strict=True)]
        writer.writerow(["" if cell is None else cell for group in cells for cell in group])
    return buffer.getvalue().encode()


def as_markdown(results: Sequence[ExperimentResult], seconds: Mapping[str, float | None]) -> str:
    """A page of all results, whose figures NAME.svg lie beside it."""
    rows = [[f"[{r.name}](#{r.name})", r.agreement, r.finding, _seconds(seconds.get(r.name))] for r in results]
    parts = [
        "# What the lab measured\n",
        f"Written by `polyref lab all`; every section has the command that makes it again. {_md(SOURCES)}\n",
        _markdown_table(("experiment", "verdict", "finding", "time"), rows),
    ]
    for result in results:
        parts += [
            f"## {result.title} {{ #{result.name} }}\n",
            f"*{_md(result.question)}*\n",
            f"```bash\n{command(result)}\n```\n",
            f"**The claim.** {_md(result.claim)}\n",
            f"**The finding ({result.agreement}).** {_md(result.finding)}\n",
            f"![{_md(result.title)}]({result.name}.svg)\n",
        ]
        if result.slopes:
            parts.append(_markdown_table(SLOPE_COLUMNS, _slopes(result)))
        parts.append(_markdown_table(result.table.columns, result.table.rows))
        parts += ["".join(f"- {_md(note)}\n" for note in result.notes)] if result.notes else []
    return "\n".join(parts)


def write_lab_page(
    path: Path, results: Sequence[ExperimentResult], svgs: Mapping[str, bytes], seconds: Mapping[str, float | None]
) -> Path:
    """The same as one self-contained HTML page; `svgs` holds each result's figure by name."""
    rows = [(r.name, r.agreement, r.finding, _seconds(seconds.get(r.name))) for r in results]
    overview = page.Table(("experiment", "verdict", "finding", "time"), rows)
    sections = [page.Section("All at a glance", tables=(overview,))]
    for result in results:
        slopes = _table(SLOPE_COLUMNS, _slopes(result), "Slopes of log against log, with 95% bootstrap intervals.")
        tables = [slopes] * bool(result.slopes) + [_table(result.table.columns, result.table.rows)]
        words = (result.question, f"The claim: {result.claim}", f"The finding ({result.agreement}): {result.finding}")
        figure = figures.Figure(result.title, _inline(svgs[result.name]), f"Made by: {command(result)}")
        sections.append(page.Section(result.title, (*words, *result.notes), (figure,), tables))
    opening = [
        "Exact KL-regularised bandits, whose optimum is known, measure what the papers claim: rates, coverage, pessimism, "
        "exploration, variance reduction and what several references do.",
        "Intervals are 95%, over replicates; dashed lines without markers are guides, such as claimed rates, named in legends.",
        SOURCES,
    ]
    return page.write_page(path, title="The theory lab", summary=opening, sections=sections)


def command(result: ExperimentResult) -> str:
    """The command that makes `result` again."""
    settings = result.settings
    return f"polyref lab {result.name} --replicates {settings['replicates']} --seed {settings['seed']}"


def shown(cell: Cell) -> str:
    """A cell of a table as text."""
    if cell is None:
        return ""
    if isinstance(cell, Estimate):
        return f"{_number(cell.value)} [{_number(cell.low)}, {_number(cell.high)}]"
    return _number(cell) if isinstance(cell, float) else f"{cell:,}" if type(cell) is int else str(cell)


def _number(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.3g}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


def _slopes(result: ExperimentResult) -> list[list[Cell]]:
    def row(fit: SlopeFit) -> list[Cell]:
        measured = Estimate(fit.slope, fit.low, fit.high) if not math.isnan(fit.slope) else "none"
        return [fit.name, fit.statistic, measured, fit.claimed, len(fit.used), fit.note]

    return [row(fit) for fit in result.slopes]


def _table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "") -> page.Table:
    """Numbers to three significant digits, as everywhere in the lab; the page's own would show fewer of small ones."""
    return page.Table(columns, [[shown(cell) for cell in row] for row in rows], caption)


def _three(cell: Cell) -> list[Cell]:
    return list(cell) if isinstance(cell, Estimate) else [cell, None, None]


def _text_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Aligned columns, numbers to the right; a last column of text is left ragged."""
    cells = [list(columns), *([shown(cell) for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    words = [any(isinstance(row[index], str) for row in rows) for index in range(len(columns))]
    lines = (
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width) for cell, width, text in zip(row, widths, words, strict=True)
        )
        for row in cells
    )
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_md(shown(cell)) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _md(text: str) -> str:
    """Text that Markdown shows as it is, within a table too. Links that this module makes are left alone."""
    return text if text.startswith("[") and "](#" in text else re.sub(r"([|*_~<>`])", r"\\\1", text)


def _inline(svg: bytes) -> str:
    """The `<svg>` element, sized by the page, its ink its own, without the ids that other figures have too."""
    document = svg.decode()
    element = document[document.index("<svg") :].strip()
    for size in ("width", "height"):
        element = re.sub(rf'^(<svg[^>]*?) {size}="[^"]*"', r"\1", element)
    element = element.replace("<svg", '<svg style="--ink: #222222; max-width: 60rem; border-radius: 6px"', 1)
    element = re.sub(r' id="[a-z]+[\d_.]*_\d+"', "", element)
    return re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
