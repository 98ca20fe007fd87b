"""Does an exploring second agent lower the regret, and do large batches raise it? Online learning in rounds [IT]."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from polyref.theory.experiments import Experiment, Progress, _linear, _rates
from polyref.theory.online import Curves, Strategy, anchored, enhancing, greedy, random_pair, run_rounds
from polyref.theory.regression import fit_slope
from polyref.theory.replicates import map_replicates
from polyref.theory.results import Cell, Estimate, ExperimentResult, Guide, Panel, Table, agreement_of

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


def run(replicates: int, seed: int, progress: Progress) -> ExperimentResult:
    """Regret and gap of the main agent under each second agent, and of the enhancer at each batch size."""
    drawn = map_replicates(_chunk, replicates, seed, chunk=50, progress=progress)
    labels = [BATCH * point for point in POINTS]
    shown = {name: {key: drawn[f"{name}/{key}"][:, POINTS].T for key in ("gap", "regret", "played")} for name in STRATEGIES}
    last = {name: {key: drawn[f"{name}/{key}"][:, -1] for key in ("gap", "regret", "played")} for name in STRATEGIES}
    slopes = tuple(fit_slope(labels, shown[name]["regret"], name=f"regret, {name}", claimed=0.5) for name in STRATEGIES)
    agreement = agreement_of(slopes[0])
    against = {name: _linear.ratio_cell(last[MAIN]["regret"], last[name]["regret"]) for name in STRATEGIES if name != MAIN}
    played = {name: _linear.ratio_cell(last[MAIN]["played"], last[name]["played"]) for name in STRATEGIES if name != MAIN}
    sizes = {size: drawn[f"batch {size}"] for size in BATCHES}
    batch = _linear.ratio_cell(sizes[BATCHES[-1]][:, -1], sizes[BATCHES[0]][:, -1])
    dearer = _linear.ratio_cell(drawn[f"regret {BATCHES[-1]}"], drawn[f"regret {BATCHES[0]}"])
    rows: list[tuple[Cell, ...]] = [
        (name, BATCH, *(_linear.mean_cell(last[name][key]) for key in ("gap", "regret", "played"))) for name in STRATEGIES
    ]
    rows += [
        (MAIN, size, _linear.mean_cell(sizes[size][:, -1]), *(_linear.mean_cell(drawn[f"{key} {size}"]) for key in _SUMS))
        for size in BATCHES
    ]
    return ExperimentResult(
        name="online",
        title=TITLE,
        question="Who should the current policy be compared with while labels come in?",
        claim="With an enhancer the regret of the main agent is of order sqrt(labels); batches cost little [IT].",
        finding=(
            f"Claimed: regret slope at most 1/2 with an enhancer. Measured: {_rates.shown(slopes[0])}; "
            f"{_rates.shown(slopes[2])} for greedy pairs. Regret of the main agent with the enhancer against others after "
            f"{LABELS:,} labels: " + _against(against) + "; of both drawn policies: " + _against(played) + ". Batches of "
            f"{BATCHES[-1]} have {_linear.shown(dearer)} times the regret of batches of {BATCHES[0]} and end at "
            f"{_linear.shown(batch)} times their gap; {_verdict(agreement)}."
        ),
        agreement=agreement,
        panels=(
            Panel(
                "Cumulative regret of the main agent",
                "labels",
                "regret",
                tuple(_linear.curve(name, labels, shown[name]["regret"]) for name in STRATEGIES),
                (Guide(0.5, "claimed: square root"),),
            ),
            Panel(
                "Cumulative regret of both drawn policies",
                "labels",
                "regret",
                tuple(_linear.curve(name, labels, shown[name]["played"]) for name in STRATEGIES),
            ),
            Panel(
                "Gap of the main agent",
                "labels",
                "J(π*) − J(π₁)",
                tuple(_linear.curve(name, labels, shown[name]["gap"]) for name in STRATEGIES),
            ),
            Panel(
                f"Batch sizes, {MAIN}",
                "labels",
                "J(π*) − J(π₁)",
                tuple(
                    _linear.curve(f"batches of {size}", [size * t for t in range(1, LABELS // size + 1)], sizes[size][:, 1:].T)
                    for size in BATCHES
                ),
            ),
        ),
        table=Table(
            ("second agent", "batch", "gap at the end", "regret of the main agent", "regret of both drawn policies"),
            tuple(rows),
        ),
        slopes=slopes,
        settings=_linear.settings(replicates, seed, labels=LABELS, batch=BATCH, batches=list(BATCHES), scale=_linear.SCALE),
        notes=(
            *_linear.ASSUMPTIONS,
            "Regret sums, over the labels, the regularised gap of the main agent (or the mean gap of the two policies that "
            "draw the pair) in their round. Pairs of one completion twice are paid for and teach nothing. The enhancer is a "
            "heuristic for a problem that is not convex: exact line by line, from several starts.",
            "A random pair is uniform over the actions: possible here, where they can be listed, and not over sentences.",
        ),
    )


_SUMS: Final = ("regret", "played")


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
    for name, strategy in STRATEGIES.items():
        curves = learn(strategy, BATCH)
        results |= {f"{name}/gap": curves.gap, f"{name}/regret": curves.regret, f"{name}/played": curves.played}
    for batch in BATCHES:
        curves = learn(STRATEGIES[MAIN], batch)
        results |= {
            f"batch {batch}": curves.gap,
            f"regret {batch}": curves.regret[:, -1],
            f"played {batch}": curves.played[:, -1],
        }
    return results


def _against(ratios: dict[str, Estimate]) -> str:
    return ", ".join(f"{_linear.shown(one)} of {name}" for name, one in ratios.items())


def _verdict(agreement: str) -> str:
    return {
        "agrees": "the interval holds the claimed rate",
        "beats the claim": "regret grows slower than claimed",
        "misses the claim": "regret grows faster than claimed at these sizes",
    }.get(agreement, "no rate can be fitted")


EXPERIMENT = Experiment("online", TITLE, run, default_replicates=100, seconds=26.0)
