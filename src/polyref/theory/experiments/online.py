"""Does an exploring second agent lower the regret, and do large batches raise it? Online learning in rounds [IT]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from polyref.theory.experiments import Experiment, Progress, _linear, _words
from polyref.theory.online import Curves, Strategy, anchored, enhancing, greedy, random_pair, run_rounds
from polyref.theory.regression import SlopeFit, fit_slope
from polyref.theory.replicates import map_replicates
from polyref.theory.results import Agreement, Cell, ExperimentResult, Guide, Panel, Table, agreement_of

TITLE = "Online learning: regret and gap with an enhancer and without, and batch sizes"
LABELS, BATCH = 1000, 25
BATCHES: Final = (10, 50, 250)
STRATEGIES: Final[dict[str, Strategy]] = {
    f"enhancer, c = {_linear.SCALE:g}": enhancing(_linear.SCALE),
    "enhancer, c = 1": enhancing(1.0),
    "greedy": greedy,
    "anchor": anchored,
    "random pair": random_pair,
}
MAIN: Final = next(iter(STRATEGIES))
POINTS: Final = tuple(range(4, LABELS // BATCH + 1, 4))
"""Rounds that are shown and fitted: every 100 labels."""
KEYS: Final = ("gap", "regret", "played")
NOTES: Final = (
    "The verdict is of the slope.",
    *_linear.ASSUMPTIONS,
    "Regret sums, over the labels, the regularised gap of the main agent (or the mean gap of the two policies that "
    "draw the pair) in their round. Pairs of one completion twice are paid for and teach nothing. The enhancer is a "
    "heuristic for a problem that is not convex: exact line by line, from several starts.",
    "A random pair is uniform over the actions: possible here, where they can be listed, and not over sentences.",
)


def run(replicates: int, seed: int, progress: Progress) -> ExperimentResult:
    """Regret and gap of the main agent under each second agent, and of the enhancer at each batch size."""
    drawn = map_replicates(_chunk, replicates, seed, chunk=50, progress=progress)
    labels = [BATCH * point for point in POINTS]
    slopes = tuple(
        fit_slope(labels, drawn[f"{name}/regret"][:, POINTS].T, name=f"regret, {name}", claimed=0.5) for name in STRATEGIES
    )
    agreement = agreement_of(slopes[0])
    return ExperimentResult(
        name="online",
        title=TITLE,
        question="Who should the current policy be compared with while labels come in?",
        claim=(
            "With an enhancer the regret of the main agent is of order sqrt(labels), and few large batches are enough for a "
            "small gap [IT]."
        ),
        finding=_finding(drawn, slopes, agreement),
        agreement=agreement,
        panels=_panels(drawn),
        table=_table(drawn),
        slopes=slopes,
        settings=_linear.settings(replicates, seed, labels=LABELS, batch=BATCH, batches=list(BATCHES), scale=_linear.SCALE),
        notes=(
            *_comparisons(drawn),
            *NOTES,
        ),
    )


def _chunk(generator: torch.Generator, size: int) -> dict[str, Tensor]:
    bandit = _linear.problems(generator, size)

    def learn(strategy: Strategy, batch: int) -> Curves:
        return run_rounds(
            bandit,
            strategy,
            generator,
            rounds=LABELS // batch,
            batch_size=batch,
            replicates=size,
            radius=_linear.RADIUS,
        )

    results: dict[str, Tensor] = {}
    runs = {name: (strategy, BATCH) for name, strategy in STRATEGIES.items()}
    for run, (strategy, batch) in (runs | {str(batch): (STRATEGIES[MAIN], batch) for batch in BATCHES}).items():
        curves = learn(strategy, batch)
        results |= {f"{run}/{key}": getattr(curves, key) for key in KEYS}
    return results


def _panels(drawn: dict[str, Tensor]) -> tuple[Panel, ...]:
    def panel(title: str, key: str, y_label: str, *guides: Guide) -> Panel:
        curves = (_linear.curve(name, [BATCH * t for t in POINTS], drawn[f"{name}/{key}"][:, POINTS].T) for name in STRATEGIES)
        return Panel(title, "labels", y_label, tuple(curves), guides)

    batches = (
        _linear.curve(f"batches of {size}", [size * t for t in range(1, LABELS // size + 1)], drawn[f"{size}/gap"][:, 1:].T)
        for size in BATCHES
    )
    return (
        panel("Cumulative regret of the main agent", "regret", "regret", Guide(0.5, "claimed: square root")),
        panel("Cumulative regret of both drawn policies", "played", "regret"),
        panel("Gap of the main agent", "gap", "J(π*) − J(π₁)"),
        Panel(f"Batch sizes, {MAIN}", "labels", "J(π*) − J(π₁)", tuple(batches)),
    )


def _table(drawn: dict[str, Tensor]) -> Table:
    """The state after the last label, for each second agent, then for each batch size."""
    runs = [(name, BATCH, name) for name in STRATEGIES] + [(MAIN, size, str(size)) for size in BATCHES]
    rows: list[tuple[Cell, ...]] = [
        (agent, size, *(_words.mean_cell(drawn[f"{run}/{key}"][:, -1]) for key in KEYS)) for agent, size, run in runs
    ]
    columns = ("second agent", "batch", "gap at the end", "regret of the main agent", "regret of both drawn policies")
    return Table(columns, tuple(rows))


def _finding(drawn: dict[str, Tensor], slopes: Sequence[SlopeFit], agreement: Agreement) -> str:
    fit = dict(zip(STRATEGIES, slopes, strict=True))
    few, many = BATCHES[0], BATCHES[-1]
    return _words.finding(
        "regret slope at most 1/2 with an enhancer, and few large batches are enough",
        f"{_words.shown(fit[MAIN])} with it and {_words.shown(fit['greedy'])} for greedy pairs, and batches of {many} that end "
        f"at {_over(drawn, str(many), str(few), 'gap')} times the gap of batches of {few}, for "
        f"{_over(drawn, str(many), str(few), 'regret')} times their regret",
        _words.verdict(agreement, beats="slower growth than claimed", misses="faster growth than claimed at these sizes"),
    )


def _comparisons(drawn: dict[str, Tensor]) -> list[str]:
    """The main strategy beside the others after the last label, one sentence a kind of regret."""
    kinds = {"regret": "Regret of the main agent", "played": "Regret of both drawn policies"}
    others = [name for name in STRATEGIES if name != MAIN]
    return [
        f"{text} with the enhancer, c = {_linear.SCALE:g}, over that with another second agent, after {LABELS:,} labels: "
        + "; ".join(f"{name}: {_over(drawn, MAIN, name, key)}" for name in others)
        + "."
        for key, text in kinds.items()
    ]


def _over(drawn: dict[str, Tensor], run: str, other: str, key: str) -> str:
    """The mean of `key` at the end of one run as a multiple of another's, in words."""
    return _words.told(_words.ratio_cell(drawn[f"{run}/{key}"][:, -1], drawn[f"{other}/{key}"][:, -1]))


EXPERIMENT = Experiment("online", TITLE, run, default_replicates=100, seconds=24.0)
