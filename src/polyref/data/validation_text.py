"""A validation report as text for a terminal."""

from __future__ import annotations

from collections import defaultdict

from polyref.data.validate import QUANTILES, RowProblem, ValidationReport
from polyref.errors import one_line

_ROWS_NAMED = 12
_COLUMNS_NAMED = 20


def render_report(report: ValidationReport) -> str:
    """`report` as lines: counts, lengths, and every kind of bad row with the rows it is found in.

    Printable characters only; what came out of the data (file, split and column names) is escaped.
    """
    lines = [
        *(
            f"{one_line(split)}: {rows} rows, {report.pairs[split]} usable pairs, {report.prompts[split]} distinct prompts"
            for split, rows in report.rows.items()
        ),
        *_columns(report),
        "",
        *(f"{count:>8}  {what}" for what, count in _counts(report) if count is not None),
        "",
        *_length_table(report),
        *_problem_lines(report),
    ]
    return "\n".join(lines) + "\n"


def _columns(report: ValidationReport) -> list[str]:
    """Which columns are read, and which are left alone: a misspelt optional one is among these."""
    told = []
    for wanted, what in ((True, "columns read"), (False, "left alone")):
        names = [one_line(name) for name, read in report.columns.items() if read is wanted]
        more = f" and {len(names) - _COLUMNS_NAMED} more" if len(names) > _COLUMNS_NAMED else ""
        told += [f"{what}: {', '.join(names[:_COLUMNS_NAMED])}{more}"] if names else []
    return ["; ".join(told)] if told else []


def _counts(report: ValidationReport) -> list[tuple[str, int | None]]:
    return [
        ("duplicate pairs", report.duplicates),
        ("pairs that reverse another", report.reversals),
        ("identical pairs (chosen = rejected)", report.identical),
        ("ties (chosen_probability = 0.5)", report.ties),
        ("pairs with an empty reply", report.empty_replies),
        ("pairs without a prompt column: their prompt is what chosen and rejected begin with", report.implicit or None),
        ("completions that were cut when drawn (ended = false)", report.unended),
        ("prompts in more than one split", report.shared_prompts if len(report.rows) > 1 else None),
        ("pairs whose text spells special tokens", report.special_texts),
        ("pairs whose boundary moved into the prompt", report.moved_boundaries),
        ("pairs cut at the maximum length", report.cut),
        ("pairs dropped with no completion left", report.dropped),
        ("rows that cannot be used", report.bad_rows),
    ]


def _length_table(report: ValidationReport) -> list[str]:
    if not report.lengths:
        return []
    heads = ["shortest", *(f"{share:.0%}" for share in QUANTILES[1:-1]), "longest"]
    return [
        f"{report.unit:<10}" + "".join(f"{head:>10}" for head in heads),
        *(f"{what:<10}" + "".join(f"{length:>10}" for length in lengths) for what, lengths in report.lengths.items()),
    ]


def _problem_lines(report: ValidationReport) -> list[str]:
    """One line a kind of problem, in the words of the first row that has it, and one that names the other rows."""
    kinds: dict[tuple[str, str | None, str], list[RowProblem]] = defaultdict(list)
    for problem in report.problems:
        kinds[problem.file, problem.column, problem.what].append(problem)
    lines = ["", f"{len(report.problems)} problems:"] if report.problems else []
    for alike in kinds.values():
        lines.append(str(alike[0]))
        others = [str(problem.row) for problem in alike[1:]]
        if others:
            more = f" and {len(others) - _ROWS_NAMED} more" if len(others) > _ROWS_NAMED else ""
            lines.append(f"    also in row {', '.join(others[:_ROWS_NAMED])}{more}")
    return lines
