"""The page of one sampling: how much the references agree by prompt, what was proposed, and what was kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyref.errors import one_line
from polyref.report.figures import Figure, Line, line_chart
from polyref.report.page import Cell, KeyNumber, Section, Table, write_page

Row = Mapping[str, Any]
_LISTED = 40


def write_sample_page(path: Path, title: str, summary: Row, prompts: Sequence[Row]) -> Path:
    """Write the page of a sampling's `summary` and its rows of diagnostics, one a prompt, to `path`."""
    return write_page(
        path,
        title=title,
        summary=_sentences(summary),
        key_numbers=_key_numbers(summary),
        sections=[_picture(prompts), _table(prompts), _setting(summary)],
    )


def _sentences(summary: Row) -> list[str]:
    many = len(summary["references"]) > 1
    what = f"the {summary['composition']} composition of {len(summary['references'])} references" if many else "one model"
    reward = summary.get("reward")
    tilted = f", tilted by {reward['model']} at beta {reward['beta']:g}" if reward and "beta" in reward else ""
    lines = [
        f"{summary['samples']} completions of {summary['prompts']} prompts were drawn from {what}{tilted}. They are worth "
        f"{summary['ess']:.1f} independent draws, and took {summary['proposals']} proposals."
    ]
    exact = summary["exact_prompts"]
    lines.append(
        f"The samples of {exact} of {summary['prompts']} prompts are exact: each is a draw of the law asked for."
        + ("" if exact == summary["prompts"] else " Those of the others are approximate or weighted; the table says why.")
    )
    if (log_f := summary["log_f"]) is not None and many:
        share = math.exp(log_f["median"])
        lines.append(
            f"The references share {share:.2g} of their mass on the prompt in the middle (F, 1 where they are equal); log F is "
            f"from {log_f['lowest']:.2f} to {log_f['highest']:.2f}."
        )
    return lines


def _key_numbers(summary: Row) -> list[KeyNumber]:
    numbers = [
        KeyNumber("samples", summary["samples"], "kept, over all prompts"),
        KeyNumber("effective size", f"{summary['ess']:.1f}", "independent draws that they are worth"),
        KeyNumber("acceptance", summary["acceptance"], "share of proposals that the composition accepted"),
    ]
    if summary["log_f"] is not None and len(summary["references"]) > 1:
        numbers.append(KeyNumber("median log F", summary["log_f"]["median"], "how much the references agree; 0 is wholly"))
    return numbers


def _picture(prompts: Sequence[Row]) -> Section:
    figures = [_shares(prompts), _agreement(prompts), _counts(prompts)]
    paragraphs = (
        "Each point is a prompt; each figure orders them by its first curve. Bands are 95% intervals. An effective size far "
        "below the number of samples means that a few weights carry all.",
    )
    return Section("By prompt", paragraphs, figures=[figure for figure in figures if figure is not None])


def _shares(prompts: Sequence[Row]) -> Figure:
    rows = _sorted(prompts, "acceptance")
    x = list(range(1, len(rows) + 1))
    lines = [
        Line("accepted", x, [_value(row["acceptance"]) for row in rows]),
        Line("effective size", x, [row["ess"] / row["samples"] if row["samples"] else math.nan for row in rows]),
    ]
    if any(row["tilt_acceptance"] for row in rows):
        lines.insert(1, Line("kept by the tilt", x, *_ends(row["tilt_acceptance"] for row in rows)))
    caption = (
        "Accepted: of proposals, by the composition; all particles are. Kept by the tilt: of those. Effective size: of samples."
    )
    return line_chart(
        lines, title="Acceptance and effective size", x_label="prompts, by acceptance", y_label="share", caption=caption
    )


def _agreement(prompts: Sequence[Row]) -> Figure | None:
    rows = sorted((row for row in prompts if row["log_f"]), key=lambda row: -_value(row["log_f"][0], -math.inf))
    if not any(row["log_f"][0] for row in rows):
        return None  # one model, or references that are equal
    x = list(range(1, len(rows) + 1))
    caption = "F is the mass that the references share: log F is 0 where they are equal. No band: no lower end is known."
    title = "How much the references agree"
    line = Line("log F", x, *_ends(row["log_f"] for row in rows))
    return line_chart([line], title=title, x_label="prompts, by log F", y_label="log F, nats", caption=caption)


def _counts(prompts: Sequence[Row]) -> Figure:
    rows = sorted(prompts, key=lambda row: (row["proposals"], row["accepted"], row["samples"]))
    x = list(range(1, len(rows) + 1))
    lines = [
        Line("proposed", x, [row["proposals"] for row in rows]),
        Line("accepted", x, [row["accepted"] for row in rows]),
        Line("samples", x, [row["samples"] for row in rows]),
    ]
    return line_chart(lines, title="Proposals against what was kept", x_label="prompts, by proposals", y_label="completions")


def _table(prompts: Sequence[Row]) -> Section:
    rows = sorted(prompts, key=lambda row: (row["ess"], _value(row["acceptance"], -1.0)))[:_LISTED]
    shown: list[list[Cell]] = [
        [_words(row["prompt"]), row["method"], row["proposals"], row["accepted"], row["samples"], row["ess"], row["calls"]]
        + [_estimate(row["log_f"])]
        for row in rows
    ]
    columns = ("prompt", "method", "proposed", "accepted", "samples", "ESS", "calls", "log F")
    notes = [[_words(row["prompt"]), row["note"]] for row in rows if row["note"]]
    some = f"The {len(rows)} of {len(prompts)} prompts with the least effective size"
    told = "All prompts" if len(rows) == len(prompts) else some
    tables = (Table(columns, shown), *((Table(("prompt", "note"), notes),) if notes else ()))
    return Section(
        "Prompts", (f"{told}, least effective size first; then what is to be said of their samples.",), tables=tables
    )


def _setting(summary: Row) -> Section:
    names = ("references", "weights", "composition", "methods", "calls", "share_ended", "left_out", "reward", "pairs")
    settings = [[name, _said(summary[name])] for name in names if name in summary]
    return Section("How it was made", tables=(Table(("setting", "value"), settings),))


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(_said, value))
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _sorted(prompts: Sequence[Row], name: str) -> list[Row]:
    return sorted(prompts, key=lambda row: -_value(row[name], -1.0))


def _value(value: float | None, missing: float = math.nan) -> float:
    return missing if value is None else value


def _ends(intervals: Any) -> tuple[list[float], list[float], list[float]]:
    """(means, low ends, high ends) of intervals as lists, NaN where there is none."""
    rows = [[_value(end) for end in interval or (None, None, None)] for interval in intervals]
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def _estimate(interval: Sequence[float | None] | None) -> Cell:
    if not interval:
        return None
    mean, low, high = (_value(end, -math.inf) for end in interval)
    return mean, low, high


def _words(prompt: Any) -> str:
    return one_line(prompt if isinstance(prompt, str) else prompt[-1]["content"], 60)
