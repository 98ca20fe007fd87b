"""The page of one training on samples: what the samples are worth, how the likelihood went, and how sure one can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyref.report.figures import Bars, bar_chart
from polyref.report.page import KeyNumber, Section, Table, write_page
from polyref.report.training import curve_chart, estimate

Row = Mapping[str, Any]


def write_likelihood_page(path: Path, title: str, summary: Row, metrics: Sequence[Row]) -> Path:
    """Write the page of a likelihood training's `summary` and its `metrics` rows to `path`."""
    sections = [_evidence(summary), _curves(metrics), _setting(summary)]
    return write_page(
        path,
        title=title,
        summary=_sentences(summary),
        key_numbers=_key_numbers(summary),
        sections=[section for section in sections if section.figures or section.tables],
    )


def _sentences(summary: Row) -> list[str]:
    samples, prompts = summary["train_samples"], summary["train_prompts"]
    lines = [
        f"The policy was trained by weighted likelihood on {samples} samples of {prompts} prompts, which count the same each. "
        f"By their weights, the {samples / prompts:.1f} samples of a prompt are worth {summary['effective']:.1f} counted alike."
    ]
    before, after = summary["before"], summary["after"]
    if before and after:
        mean, low, high = summary["change"]
        sure = "one prompt gives no interval" if low is None else f"95% interval {low:.2f} to {high:.2f}"
        lines.append(
            f"On the samples of {after['prompts']} held-out prompts ({summary['shared_prompts'] or 'none'} of them trained on) "
            f"its log-likelihood is {abs(mean):.2f} nats {'higher' if mean >= 0 else 'lower'} than before (gain: {sure})."
        )
    return lines


def _key_numbers(summary: Row) -> list[KeyNumber]:
    numbers = [KeyNumber("effective samples", f"{summary['effective']:.1f}", "a training prompt, by the weights")]
    if summary["change"]:
        change = estimate(summary["change"])
        numbers.insert(0, KeyNumber("held-out log-likelihood, gained", change, "nats a prompt, after less before"))
    return numbers


def _evidence(summary: Row) -> Section:
    before, after = summary["before"], summary["after"]
    if not (before and after):
        return Section("Held-out evidence")
    columns = [list(values) for values in zip(before["nll"], after["nll"], strict=True)]
    title = "Held-out negative log-likelihood, nats"
    figure = bar_chart(["before training", "after training"], [Bars("nats", *columns)], title=title)
    reports = (("before", before), ("after", after))
    rows = [[when, estimate(r["nll"]), r["prompts"], r["samples"], r["effective"]] for when, r in reports]
    return Section(
        "Held-out evidence",
        ("Weighted means over the samples of a prompt. Intervals are 95%, from a bootstrap over prompts.",),
        figures=(figure,),
        tables=(Table(("", "negative log-likelihood", "prompts", "samples", "effective a prompt"), rows),),
    )


def _curves(metrics: Sequence[Row]) -> Section:
    rows = [row for row in metrics if "logps/weighted" in row]
    if not rows:
        return Section("Training curves")
    names = {"by their weights": "logps/weighted", "counted alike": "logps/even"}
    figures = (
        curve_chart(rows, "Loss", "nats", loss="loss"),
        curve_chart(rows, "Log-probability of samples", "nats", **names),
    )
    told = "Means over the training prompts since the point before. The two curves part as the policy learns the weights."
    return Section("Training curves", (told,), figures=figures)


def _setting(summary: Row) -> Section:
    names = ("model", "train_prompts", "train_samples", "cut_samples", "length_normalise", "max_length")
    settings = [[name, str(summary[name])] for name in names]
    return Section("How it was made", tables=(Table(("setting", "value"), settings),))
