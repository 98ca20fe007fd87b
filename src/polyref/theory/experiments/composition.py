"""What is lost when references are composed token by token instead of over whole completions?"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from polyref.theory.bandit import FiniteBandit
from polyref.theory.experiments import Experiment, Progress, _words
from polyref.theory.regression import Estimates, estimates
from polyref.theory.replicates import map_replicates
from polyref.theory.results import Agreement, Cell, Curve, ExperimentResult, Panel, Table
from polyref.theory.solutions import solve_forward_kl, solve_reverse_kl
from polyref.theory.toy_language import random_toy_language, total_variation
from polyref.theory.values import forward_gap, reverse_gap

TITLE = "Composing tokens instead of completions"
LENGTHS: Final = (1, 2, 3, 4, 5)
SPREADS: Final = (0.5, 1.0, 2.0)
"""Standard deviation of the references' independent logits: how much they disagree."""

VOCABULARY, REFERENCES, BETA = 3, 3, 0.25
ROUNDING: Final = 1e-13
"""What is below this is rounding, and shown as 0."""

MEASURES: Final = {
    "geometric": "total variation, geometric",
    "arithmetic": "total variation, mixture",
    "reverse": "value lost, reverse KL",
    "forward": "value lost, forward KL",
}
NOTES: Final = (
    f"{REFERENCES} enumerable references of equal weight over {VOCABULARY} tokens, one of which ends; independent "
    "normal logits at every prefix, whose standard deviation is the disagreement; rewards uniform on [0, 1], "
    f"beta {BETA:g}; everything exact, by enumeration.",
    "With one token there is nothing to compose token by token: both ways agree, and log axes do not show the zero.",
)


def run(replicates: int, seed: int, progress: Progress) -> ExperimentResult:
    """Total variation between the two ways of composing, and what the optimum of the wrong anchor loses under the right one."""
    drawn = map_replicates(_measure, replicates, seed, chunk=20, progress=progress)
    found = {
        (name, spread): estimates(values[..., column].T, shared=False)
        for name, values in drawn.items()
        for column, spread in enumerate(SPREADS)
    }
    agreement, finding = _finding(found)
    titles = {
        "geometric": ("Averaged logits against the geometric composition", "total variation"),
        "arithmetic": ("Token mixture against the mixture", "total variation"),
        "reverse": ("Value lost by tilting the token average", "J(π*) − J(π), reverse KL"),
        "forward": ("Value lost with the token mixture", "J(π*) − J(π), forward KL"),
    }
    return ExperimentResult(
        name="composition",
        title=TITLE,
        question="Is averaging the references' logits at every token the composition that the theory speaks of?",
        claim=(
            "Optima and bounds are of the composition over whole completions [MR]; normalising at every token gives another "
            "distribution, as normalisers that depend on the prefix do not cancel."
        ),
        finding=finding,
        agreement=agreement,
        panels=tuple(_panel(found, name, *words) for name, words in titles.items()),
        table=_table(found),
        settings={
            "replicates": replicates,
            "seed": seed,
            "lengths": list(LENGTHS),
            "spreads": list(SPREADS),
            "vocabulary": VOCABULARY,
            "references": REFERENCES,
            "beta": BETA,
        },
        notes=NOTES,
    )


def _measure(generator: torch.Generator, size: int) -> dict[str, Tensor]:
    """Each measure (size, lengths, spreads); one prompt of the toy language is one replicate."""
    cells = [[_at(generator, size, length, spread) for spread in SPREADS] for length in LENGTHS]
    return {name: torch.stack([torch.stack([cell[name] for cell in row], -1) for row in cells], 1) for name in MEASURES}


def _at(generator: torch.Generator, size: int, length: int, spread: float) -> dict[str, Tensor]:
    """Each measure (size,) at one length and one disagreement."""
    toy = random_toy_language(
        generator, contexts=size, references=REFERENCES, vocabulary=VOCABULARY, length=length, spread=spread
    )
    weights = torch.full((REFERENCES,), 1 / REFERENCES, dtype=torch.float64)
    logps = toy.sequence_logps()[:, None]
    rewards = torch.rand(logps.shape[:-1], generator=generator, dtype=torch.float64)
    bandit = FiniteBandit.tabular(rewards, logps, weights, beta=BETA)
    averaged, mixed = toy.token_geometric(weights)[:, None], toy.token_arithmetic(weights)[:, None]
    found = {
        "geometric": total_variation(averaged, bandit.geometric)[:, 0],
        "arithmetic": total_variation(mixed, bandit.mixture)[:, 0],
        "reverse": reverse_gap(solve_reverse_kl(rewards, averaged, BETA), bandit),
        "forward": forward_gap(solve_forward_kl(rewards, mixed, BETA).log_policy, bandit),
    }
    return {name: values.masked_fill(values < ROUNDING, 0.0) for name, values in found.items()}


def _panel(found: dict[tuple[str, float], Estimates], name: str, title: str, y_label: str) -> Panel:
    curves = tuple(Curve.of(f"logit spread {spread:g}", LENGTHS, found[name, spread]) for spread in SPREADS)
    return Panel(title, "longest completion, tokens", y_label, curves, log_x=False, log_y=name in ("reverse", "forward"))


def _table(found: dict[tuple[str, float], Estimates]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for spread in SPREADS:
        columns = (_words.cells(found[name, spread]) for name in MEASURES)
        rows += [(spread, *row) for row in zip(LENGTHS, *columns, strict=True)]
    return Table(("logit spread", "tokens", *MEASURES.values()), tuple(rows))


def _finding(found: dict[tuple[str, float], Estimates]) -> tuple[Agreement, str]:
    """Agreement: nothing between the two at one token, and a difference beyond doubt from two tokens on."""
    tv = [found[name, spread] for name in ("geometric", "arithmetic") for spread in SPREADS]
    alike = all(one.high[0] == 0 for one in tv)
    apart = all((one.low[1:] > 0).all() for one in tv)
    grows = all((np.diff(one.value) > 0).all() for one in tv)
    middle = SPREADS[1]
    shown = {name: _words.told(_words.cells(found[name, middle])[-1], ".3f") for name in MEASURES}
    agreement = _words.joint((1 if alike else -1, int(apart)))
    return agreement, _words.finding(
        "token-wise composition is a different distribution",
        f"at {LENGTHS[-1]} tokens and logit spread {middle:g}, total variation {shown['geometric']} from the geometric "
        f"composition and {shown['arithmetic']} from the mixture, {shown['reverse']} of value lost under reverse KL and "
        f"{shown['forward']} under forward KL, of a reward range of 1, {'nothing' if alike else 'a difference even'} at one "
        f"token{', and more total variation with every further one' if grows else ''}",
        _words.outcome(agreement),
    )


EXPERIMENT = Experiment("composition", TITLE, run, default_replicates=400, seconds=3.0)
