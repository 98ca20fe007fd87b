"""The page of an iterative run: what each round gained, how far it went from its anchor, and why it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyref.report.figures import Bars, Figure, bar_chart
from polyref.report.multistep import count, frontier, interval, said
from polyref.report.page import Cell, KeyNumber, Section, Table, write_page

Row = Mapping[str, Any]

_SETTINGS = ("model", "references", "weights", "composition", "anchor", "dtypes", "reward", "pessimism", "gold", "label")
_MORE = ("pairing", "enhancer", "loss_type", "beta", "replay", "from_start", "prompts", "offline_pairs", "offline_left_out")


def write_iterate_page(path: Path, title: str, summary: Row) -> Path:
    """Write the page of a run's `summary`, with its row for the start and each round, to `path`."""
    table: list[list[Cell]] = [[name, said(summary[name])] for name in (*_SETTINGS, *_MORE)]
    return write_page(
        path,
        title=title,
        summary=_sentences(summary),
        key_numbers=_key_numbers(summary),
        sections=[_gains(summary), _pairs(summary), Section("How it was made", tables=[Table(("setting", "value"), table)])],
    )


def _sentences(summary: Row) -> list[str]:
    rows, final = summary["rounds"], summary["final_round"]
    start, last = rows[0], rows[final]
    lines = [
        f"A policy was trained in {count(len(rows) - 1, 'round')} on pairs of its own completions, towards what "
        f"{summary['reward']} rewards. The mean reward of the final policy, that of {_name(last)}, is {last['reward'][0]:.3f}; "
        f"it was {start['reward'][0]:.3f}, judged on {summary['judged_on']}.",
        f"The KL of each round is taken to {summary['anchor']}.",
    ]
    if (stop := summary["stop"]) is not None:
        lines.append(
            f"It ended after round {stop['at']} of {summary['asked_rounds']}: {stop['why']}. "
            f"The final policy is that of {_name(last)}, the last before it."
        )
    return lines


def _name(row: Row) -> str:
    return f"round {row['round']}" if row["round"] else "the start"


def _key_numbers(summary: Row) -> list[KeyNumber]:
    start, last = summary["rounds"][0], summary["rounds"][summary["final_round"]]
    by = "gold reward" if last["gold"] is not None else "reward"
    return [
        KeyNumber("reward", interval(last["reward"]), f"at the start {start['reward'][0]:.3f}"),
        KeyNumber("win rate", interval(last["win_rate"]), f"by the {by}, against the start; 0.5 is no better"),
        KeyNumber("KL to the anchor", interval(last["kl_anchor"]), "nats"),
        KeyNumber("labels", summary["labels"], f"of {summary['tokens']:,} tokens drawn"),
    ]


def _gains(summary: Row) -> Section:
    rows, gold = summary["rounds"], summary["rounds"][-1]["gold"] is not None
    names = ["start" if not row["round"] else str(row["round"]) for row in rows]

    def table(columns: Sequence[tuple[str, str]]) -> Table:
        cells: list[list[Cell]] = [
            [name, *(interval(row[key]) for _, key in columns)] for name, row in zip(names, rows, strict=True)
        ]
        return Table(("round", *(word for word, _ in columns)), cells)

    kl, moved = [("KL to the anchor, nats", "kl_anchor")], any(row["kl"] != row["kl_anchor"] for row in rows)
    kl += [("KL to the references, nats", "kl")] if moved else []
    tables = [
        table([("reward", "reward"), *([("gold reward", "gold")] if gold else []), ("win rate", "win_rate")]),
        table([*kl, ("tokens", "length"), ("distinct texts", "distinct"), ("distinct bigrams", "distinct_bigrams")]),
    ]
    each: list[list[Cell]] = [[name, *map(interval, row["kl_each"])] for name, row in zip(names, rows, strict=True)]
    tables.append(Table(("round", *summary["references"]), each, "KL to each reference, nats"))
    figures = [frontier("reward", "Reward against KL", rows, "round")]
    if gold:
        figures.append(frontier("gold", "Gold reward against KL", rows, "round"))
    text = (
        "Each point is the policy after a round, the first one the start; a band and brackets are 95% intervals over prompts. "
        f"Up is more reward, left is closer to the references. Judged on {summary['judged_on']}, by completions drawn anew. "
        "Distinct are the shares of different texts, and of different neighbours of two words, among a prompt's completions."
    )
    return Section("What each round gained", (text,), figures=[one for one in figures if one is not None], tables=tables)


def _pairs(summary: Row) -> Section:
    rows = summary["rounds"][1:]
    groups = [f"round {row['round']}" for row in rows]
    bars = [Bars("of the round", [float(row["pairs"]) for row in rows])]
    bars.append(Bars("trained on", [float(row["train_pairs"]) for row in rows]))
    figures: list[Figure] = [bar_chart(groups, bars, title="Pairs of each round, and pairs it trained on")]
    table: list[list[Cell]] = [
        [str(row["round"]), row["completions"], row["tokens"], row["pairs"], row["ties"], row["prompts_without_pairs"]]
        + [row.get("unlabelled", 0), row["train_pairs"], row["train_loss"]]
        for row in rows
    ]
    names = ("round", "completions", "tokens", "pairs", "ties", "left out", "unlabelled", "trained on", "last loss")
    text = "Left out are prompts that give no pair. A round trains on the pairs of earlier rounds and offline pairs too."
    inexact, short = (sum(row.get(name, 0) for row in rows) for name in ("inexact_prompts", "short_prompts"))
    if inexact or short:
        text += (
            f" The enhancer drew for {count(inexact, 'prompt')} by particles, which is approximate, and too few for {short}."
        )
    return Section("What it was trained on", (text,), figures=figures, tables=[Table(names, table)])
