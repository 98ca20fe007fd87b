"""The page of one preference training: what was learnt, how the curves went, and how sure one can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyref.report.figures import Bars, Figure, Line, bar_chart, line_chart
from polyref.report.page import Cell, KeyNumber, Section, SideBySide, Table, write_page

Row = Mapping[str, Any]


def write_training_page(
    path: Path,
    title: str,
    summary: Row,
    metrics: Sequence[Row],
    *,
    opening: Sequence[str] = (),
    replies: Sequence[SideBySide] = (),
) -> Path:
    """Write the page of a training `summary` and its `metrics` rows to `path`; `opening` sentences come first."""
    sections = [evidence(summary), _curves(metrics)]
    if replies:
        sections.append(
            Section("Replies side by side", ("Greedy decoding; cut at the length of the demonstration.",), comparisons=replies)
        )
    sections.append(_setting(summary))
    return write_page(
        path,
        title=title,
        summary=[*opening, *_sentences(summary)],
        key_numbers=_key_numbers(summary),
        sections=[section for section in sections if section.figures or section.tables or section.comparisons],
    )


def _sentences(summary: Row) -> list[str]:
    references = summary["references"]
    many = (
        f"{len(references)} references composed into one {summary['composition']} anchor"
        if len(references) > 1
        else "one reference"
    )
    lines = [
        f"The policy was trained on {summary['train_pairs']} preference pairs to prefer what was chosen, while a "
        f"{summary['divergence']}-KL term of strength beta = {summary['beta']} holds it close to {many}."
    ]
    before, after = summary["before"], summary["after"]
    if before and after:
        (was, _, _), (now, low, high) = before["accuracy"], after["accuracy"]
        lines.append(
            f"On {after['pairs']} held-out pairs ({after['prompts']} prompts, {summary['shared_prompts'] or 'none'} of them "
            f"trained on) it prefers what was chosen {now:.0%} of the time, against {was:.0%} before; {certainty(low, high)}."
        )
    return lines


def certainty(low: float | None, high: float | None) -> str:
    """What an accuracy's interval says of chance, in words."""
    if low is None or high is None:
        return "one prompt gives no interval"
    verdict = "is above chance" if low > 0.5 else "is below chance" if high < 0.5 else "cannot be told from chance at this size"
    return f"the 95% interval, {low:.0%} to {high:.0%}, {verdict}"


def estimate(values: Sequence[float | None]) -> Cell:
    """[mean, low, high] as the page shows it: dashes where there is no interval."""
    mean, low, high = values
    if mean is None or low is None or high is None:
        return f"{mean:.3f} [–, –]".replace("-", "−")
    return mean, low, high


def _key_numbers(summary: Row) -> list[KeyNumber]:
    after = summary["after"]
    if not after:
        return []
    return [
        KeyNumber(
            "held-out preference accuracy", estimate(after["accuracy"]), "share of held-out pairs ranked as their labels say"
        ),
        KeyNumber("held-out margin", estimate(after["margin"]), "mean implied reward of chosen less rejected"),
    ]


def evidence(summary: Row) -> Section:
    """Accuracy and margin on held-out pairs before and after the training of `summary`; empty where none were held out."""
    before, after = summary["before"], summary["after"]
    if not (before and after):
        return Section("Held-out evidence")
    columns = [list(values) for values in zip(before["accuracy"], after["accuracy"], strict=True)]
    bars = Bars("accuracy", *columns)
    figure = bar_chart(["before training", "after training"], [bars], title="Held-out preference accuracy", baseline=0.5)
    reports = (("before", before), ("after", after))
    rows = [[when, estimate(r["accuracy"]), estimate(r["margin"]), r["pairs"]] for when, r in reports]
    return Section(
        "Held-out evidence",
        ("Intervals are 95%, from a bootstrap over prompts. The dashed line is a coin flip.",),
        figures=(figure,),
        tables=(Table(("", "accuracy", "margin", "pairs"), rows),),
    )


def curve_chart(rows: Sequence[Row], title: str, unit: str, **names: str) -> Figure:
    """What log lines say over the steps: one curve for each of `names`, of the key that it names, where a line has it."""
    held = {name: [row for row in rows if key in row] for name, key in names.items()}
    lines = [Line(n, [row["step"] for row in held[n]], [row[k] for row in held[n]]) for n, k in names.items()]
    return line_chart(lines, title=title, x_label="step", y_label=unit)


def _curves(metrics: Sequence[Row]) -> Section:
    rows = [row for row in metrics if "rewards/margins" in row]
    if not rows:
        return Section("Training curves")

    figures: tuple[Figure, ...] = (
        curve_chart(rows, "Loss", "nats", loss="loss"),
        curve_chart(rows, "Implied rewards", "reward", chosen="rewards/chosen", rejected="rewards/rejected"),
        curve_chart(rows, "Log-probability of completions", "nats", chosen="logps/chosen", rejected="logps/rejected"),
    )
    if any("vr/factor" in row for row in rows):
        figures += (curve_chart(rows, "Variance of the plain loss over that of the loss", "ratio", factor="vr/factor"),)
    if any("dr/value" in row for row in rows):
        figures += (
            curve_chart(rows, "Win rate over the sampling policy, estimated", "share", value="dr/value"),
            curve_chart(rows, "Importance ratios", "share", clipped="dr/clip_share", **{"effective sample": "dr/ess"}),
        )
    return Section("Training curves", ("Means over the training pairs since the point before.",), figures=figures)


def _setting(summary: Row) -> Section:
    weights = zip(summary["references"], summary["weights"], strict=True)
    rows: list[list[Any]] = [[label, weight] for label, weight in weights]
    names = ("model", "composition", "divergence", "loss_type", "beta", "train_pairs", "objective", "auxiliary_pairs")
    settings = [[key, str(summary[key])] for key in names if key in summary]
    return Section(
        "How it was made",
        tuple(summary["compatibility"]),
        tables=(Table(("reference", "weight"), rows), Table(("setting", "value"), settings)),
    )
