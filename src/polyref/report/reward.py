"""The page of one reward training: how well the model ranks, and how far its rewards can be read as probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyref.report.figures import Figure, Line, line_chart
from polyref.report.page import KeyNumber, Section, Table, write_page
from polyref.report.training import certainty, curve_chart, estimate, evidence

Row = Mapping[str, Any]


def write_reward_page(path: Path, title: str, summary: Row, metrics: Sequence[Row]) -> Path:
    """Write the page of a reward training's `summary` and its `metrics` rows to `path`."""
    sections = [evidence(summary), _calibration(summary["calibration"]), _curves(metrics), _setting(summary)]
    return write_page(
        path,
        title=title,
        summary=_sentences(summary),
        key_numbers=_key_numbers(summary),
        sections=[section for section in sections if section.figures or section.tables],
    )


def _sentences(summary: Row) -> list[str]:
    lines = [f"A reward model was trained on {summary['train_pairs']} preference pairs to give what was chosen more reward."]
    before, after, calibration = summary["before"], summary["after"], summary["calibration"]
    if before and after:
        (was, _, _), (now, low, high) = before["accuracy"], after["accuracy"]
        shared = summary["shared_prompts"] or "none"
        lines.append(
            f"On {after['pairs']} held-out pairs ({after['prompts']} prompts, {shared} of them trained on) it ranks what was "
            f"chosen first {now:.0%} of the time, against {was:.0%} before; {certainty(low, high)}."
        )
    if calibration:
        lines.append(_reading(calibration["temperature"]))
    return lines


def _reading(temperature: float | None) -> str:
    if temperature is None:
        return "Its rewards cannot be scaled into probabilities: it ranks all pairs as labelled, or no better than chance."
    told = "too sure of itself" if temperature > 1 else "not sure enough of itself"
    return (
        f"It is {told}: its reward differences are best divided by {temperature:.3g} before they are read as log-odds. "
        "That changes no ranking."
    )


def _key_numbers(summary: Row) -> list[KeyNumber]:
    after, calibration = summary["after"], summary["calibration"]
    if not after:
        return []
    numbers = [
        KeyNumber(
            "held-out preference accuracy", estimate(after["accuracy"]), "share of held-out pairs ranked as their labels say"
        ),
        KeyNumber("held-out margin", estimate(after["margin"]), "mean reward of chosen less rejected"),
        KeyNumber("temperature", calibration["temperature"], "divides rewards; fitted on the held-out pairs"),
    ]
    return numbers


def _calibration(calibration: Row | None) -> Section:
    if not calibration:
        return Section("Calibration")
    readings = [("as trained", calibration["raw"])]
    if calibration["calibrated"]:
        readings.append((f"divided by {calibration['temperature']:.3g}", calibration["calibrated"]))
    lines = [Line("as it should be", [0.5, 1.0], [0.5, 1.0])]
    for name, reading in readings:
        bins = reading["bins"]
        values = zip(*(each["accuracy"] for each in bins), strict=True)
        accuracy, low, high = ([float("nan") if v is None else v for v in each] for each in values)
        lines.append(Line(name, [each["confidence"] for each in bins], accuracy, low, high))
    axes = {"x_label": "confidence of the model", "y_label": "share ranked right"}
    chart = line_chart(lines, title="Reliability on held-out pairs", baseline=0.5, **axes)
    rows = [
        [name, each["confidence"], estimate(each["accuracy"]), each["count"]]
        for name, reading in readings
        for each in reading["bins"]
    ]
    likelihoods = [[name, reading["nll"], reading["error"]] for name, reading in readings]
    return Section(
        "Calibration",
        (
            "Pairs are grouped by how sure the model is of its ranking; where it says 80%, it should be right 80% of the time. "
            "Bands are 95% intervals from a bootstrap over prompts. The divisor is fitted on these very pairs.",
        ),
        figures=(chart,),
        tables=(
            Table(("rewards", "negative log-likelihood", "calibration error"), likelihoods),
            Table(("rewards", "confidence", "share ranked right", "pairs"), rows),
        ),
    )


def _curves(metrics: Sequence[Row]) -> Section:
    rows = [row for row in metrics if "rewards/margins" in row]
    if not rows:
        return Section("Training curves")
    charts: tuple[Figure, ...] = (
        curve_chart(rows, "Loss", "nats", loss="loss"),
        curve_chart(rows, "Rewards", "reward", chosen="rewards/chosen", rejected="rewards/rejected"),
    )
    if any("vr/factor" in row for row in rows):
        charts += (curve_chart(rows, "Variance of the plain loss over that of the loss", "ratio", factor="vr/factor"),)
    return Section("Training curves", ("Means over the training pairs since the point before.",), figures=charts)


def _setting(summary: Row) -> Section:
    names = ("model", "loss_type", "objective", "auxiliary_pairs", "center_rewards_coefficient", "max_length", "train_pairs")
    settings = [[name, str(summary[name])] for name in names if name in summary]
    return Section("How it was made", tables=(Table(("setting", "value"), settings),))
