"""The page of a multi-step run: what each step gained, how far it went from the references, and what it took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyref.report.figures import Bars, Figure, Line, bar_chart, line_chart
from polyref.report.page import Cell, KeyNumber, Section, Table, write_page
from polyref.report.training import estimate

Row = Mapping[str, Any]


def write_multistep_page(path: Path, title: str, summary: Row) -> Path:
    """Write the page of a run's `summary`, with its row for the start and each step, to `path`."""
    return write_page(
        path,
        title=title,
        summary=_sentences(summary),
        key_numbers=_key_numbers(summary),
        sections=[_gains(summary), _efforts(summary), _setting(summary)],
    )


def _sentences(summary: Row) -> list[str]:
    start, last = summary["steps"][0], summary["steps"][-1]
    references, steps = count(len(summary["references"]), "reference"), count(len(summary["steps"]) - 1, "step")
    lines = [
        f"A policy was led towards what {summary['reward']} rewards, close to {references}, in {steps} of rejection sampling "
        f"and training. Its mean reward went from {start['reward'][0]:.3f} to {last['reward'][0]:.3f}, judged on "
        f"{summary['judged_on']}."
    ]
    if last["kl"] is not None:
        lines.append(
            f"It is {last['kl'][0]:.2f} nats of KL from its references, which each step was held to: "
            "no step is measured from the one before."
        )
    if last["win_rate"] is not None:
        lines.append(f"By the gold reward its completions beat those of the start {last['win_rate'][0]:.0%} of the time.")
    if not summary["reached"]:
        lines.append(f"The last step is at beta {last['beta']:.4g}: the {summary['beta']:g} asked for was not reached.")
    return lines


def count(number: int, word: str) -> str:
    """As in 1 step, 2 steps."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def _key_numbers(summary: Row) -> list[KeyNumber]:
    start, last = summary["steps"][0], summary["steps"][-1]
    numbers = [
        KeyNumber("reward", interval(last["reward"]), f"at the start {start['reward'][0]:.3f}"),
        KeyNumber("KL to the references", interval(last["kl"]), "nats"),
        KeyNumber("proposals", summary["proposals"], f"in all, {summary['tokens']:,} tokens"),
    ]
    if last["win_rate"] is not None:
        numbers.insert(1, KeyNumber("gold win rate", interval(last["win_rate"]), "against the start; 0.5 is no better"))
    return numbers


def _gains(summary: Row) -> Section:
    rows = summary["steps"]
    names = ["start" if not row["step"] else str(row["step"]) for row in rows]
    table: list[list[Cell]] = [
        [name, row["beta"], *(interval(row[column]) for column in ("reward", "kl", "length"))]
        for name, row in zip(names, rows, strict=True)
    ]
    text: tuple[str, ...] = (
        f"Each point is the policy after a step, the first one the start; a band and brackets are 95% intervals over prompts. "
        f"Up is more reward, left is closer to the references. Judged on {summary['judged_on']}, by completions drawn anew.",
    )
    if unscored := rows[-1].get("unscored"):
        why = "completions that a reference gives no probability or cannot read"
        text = (*text, f"The last KL leaves out {unscored} {why}, and is too small.")
    tables = [Table(("step", "beta", "reward", "KL to the references, nats", "tokens"), table)]
    if rows[-1]["gold"] is not None:
        gold = [[name, interval(row["gold"]), interval(row["win_rate"])] for name, row in zip(names, rows, strict=True)]
        tables.append(Table(("step", "gold reward", "gold win rate against the start"), gold))
    if len(summary["references"]) > 1:
        each = [[name, *map(interval, row["kl_each"])] for name, row in zip(names, rows, strict=True)]
        tables.append(Table(("step", *summary["references"]), each, "KL to each reference, nats"))
    figures = [frontier("reward", "Reward against KL", rows)]
    if rows[-1]["gold"] is not None:
        figures.append(frontier("gold", "Gold reward against KL", rows))
    return Section("What each step gained", text, figures=[one for one in figures if one is not None], tables=tables)


def frontier(name: str, title: str, rows: Sequence[Row], unit: str = "step") -> Figure | None:
    """Reward over KL to the references, a point a `unit`, joined in their order, with a band unless KL falls: none folds."""
    known = [row for row in rows if row["kl"] is not None and row[name] is not None]
    if not known:
        return None
    kl = [row["kl"][0] for row in known]
    mean, low, high = ([math.nan if row[name][i] is None else row[name][i] for row in known] for i in range(3))
    rising = kl == sorted(kl)
    line = Line(name, kl, mean, low, high) if rising else Line(name, kl, mean)
    y_label = "mean reward" if name == "reward" else "mean gold reward"
    order = sorted(known, key=lambda row: row["kl"][0])
    steps = ", ".join(f"{unit} {row[unit]}" if row[unit] else "the start" for row in order)
    more = "" if rising else " The line joins them in their order; the table has the intervals."
    caption = f"From the left: {steps}.{more}"
    return line_chart([line], title=title, x_label="KL to the references, nats", y_label=y_label, caption=caption)


def _efforts(summary: Row) -> Section:
    rows = summary["steps"][1:]
    groups = [f"step {row['step']}" for row in rows]
    counts = [
        Bars(word, [float(row[name]) for row in rows])
        for word, name in (("proposed", "proposals"), ("scored", "scored"), ("kept", "kept"))
    ]
    figures = [bar_chart(groups, counts, title="Proposals against what was kept")]
    if (shares := _shares(rows)) is not None:
        figures.insert(0, shares)
    columns = (
        "step",
        "beta of the tilt",
        "acceptance",
        "proposals",
        "scored",
        "tokens",
        "kept",
        "ESS",
        "pairs",
        "left out",
    )
    table: list[list[Cell]] = [
        [str(row["step"]), row["step_beta"], interval(row["acceptance"]), row["proposals"], row["scored"], row["tokens"]]
        + [row["kept"], row["ess"], row["pairs"], row["prompts_without_pairs"]]
        for row in rows
    ]
    text: tuple[str, ...] = (
        "Scored are the proposals that the composition let pass, all of them where one model draws. Left out are prompts that "
        "give no pair: fewer than two different completions were kept.",
    )
    if above := sum(row.get("above_r_max", 0) for row in rows):
        text = (*text, f"{above} times a prompt had rewards above the r_max that was claimed: its tilt is approximate there.")
    return Section("What it took", text, figures=figures, tables=[Table(columns, table)])


def _shares(rows: Sequence[Row]) -> Figure | None:
    lines = []
    for row in rows:
        known = sorted((rate for rate in row["acceptance_by_prompt"] if rate is not None), reverse=True)
        if known:
            lines.append(Line(f"step {row['step']}", list(range(1, len(known) + 1)), known))
    caption = "The share of a prompt's proposals that the tilt accepts, prompts of each step from the highest."
    x_label = "prompts, by acceptance"
    return line_chart(lines, title="Acceptance", x_label=x_label, y_label="share", caption=caption) if lines else None


def _setting(summary: Row) -> Section:
    names = ("model", "references", "weights", "composition", "anchor", "reward", "pessimism", "beta", "schedule", "correct")
    rows: list[list[Cell]] = [[name, said(summary[name])] for name in (*names, "loss_type", "labels", "pairing", "prompts")]
    return Section("How it was made", tables=[Table(("setting", "value"), rows)])


def said(value: Any) -> str:
    """A setting in words."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, list):
        return "; ".join(map(said, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {said(entry)}" for key, entry in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def interval(values: Sequence[float | None] | None) -> Cell:
    """[mean, low, high] as the page shows it; nothing where it is not known."""
    return None if values is None else estimate(values)
