"""Does the regularised gap grow in proportion to how badly the data cover the optimum? [MR] arXiv 2502.01203."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from polyref.theory.asymptotics import error_covariance
from polyref.theory.bandit import FiniteBandit
from polyref.theory.coverage import chi_square_coverage, density_coverage
from polyref.theory.estimators import fit_tabular
from polyref.theory.experiments import Experiment, Progress, _rates, _words
from polyref.theory.preferences import bradley_terry, pair_law
from polyref.theory.regression import Estimates, estimates, fit_slope
from polyref.theory.replicates import map_replicates
from polyref.theory.results import Curve, ExperimentResult, Guide, Panel, Table, agreement_of
from polyref.theory.sampling import draw_wins
from polyref.theory.solutions import reverse_optimum, solve_reverse_kl
from polyref.theory.values import reverse_gap

TITLE = "The regularised gap against the coverage of the optimum by the data"
MASSES: Final = tuple(0.4 / 2**k for k in range(7))
"""Probability that the data law gives the best action: 0.4 down to 0.00625."""
PAIRS: Final = 64_000
TAIL: Final = 3
"""Points left out of the asymptotic slope: there other actions than the best one limit the estimate."""
NOTES: Final = (
    "Problems and estimator as in reverse-gap. The data law mu is the mixture of the references, with the best action "
    f"of each context set to the mass of the row; {PAIRS:,} distinct pairs a replicate, fresh for each row.",
    "First-order theory: the mean of delta' Cov_pi* delta / (2 beta), delta normal with the inverse information of "
    "the pairs as covariance. Constants on the horizontal axis are means over the problems.",
    f"The verdict is of the {len(MASSES) - TAIL} laws that cover worst. That was chosen after a first run, which "
    "judged the fit over all laws; there, both fits beat the claim.",
)


def run(replicates: int, seed: int, progress: Progress) -> ExperimentResult:
    """n times the gap of the plug-in tilt for data laws that avoid the best action more and more, in the same problems."""
    drawn = map_replicates(_chunk, replicates, seed, chunk=50, progress=progress)
    scaled, limit, density, square = (drawn[name].T for name in ("scaled", "limit", "density", "square"))
    found, local = estimates(scaled), estimates(limit)
    constant = density.mean(-1)
    overall = fit_slope(constant, scaled, name="n gap against max pi*/mu", claimed=1.0)
    tail = fit_slope(constant, scaled, name="n gap against max pi*/mu, worst half", claimed=1.0, drop=TAIL)
    by_square = fit_slope(square.mean(-1), scaled, name="n gap against the mean of pi*/mu under pi*, worst half", drop=TAIL)
    ratios = scaled.mean(-1) / limit.mean(-1)
    agreement = agreement_of(tail)
    end = _words.verdict(agreement, beats="slower than the bound allows", misses="faster than the bound allows")
    return ExperimentResult(
        name="coverage",
        title=TITLE,
        question="How many more pairs does the same gap take when the data seldom show the best completions?",
        claim=(
            "The bound on the regularised gap is proportional to a coverage constant over n [MR]; with the constant derived in "
            "polyref.theory.bounds it is the largest ratio of the policies to mu, here of the optimum: max pi*/mu."
        ),
        finding=_words.finding(
            "n times the gap grows at most in proportion to the coverage constant max pi*/mu, slope 1",
            f"{_words.fitted(tail)} and {_words.shown(overall)} over the whole range",
            end,
        ),
        agreement=agreement,
        panels=(_panel(constant, found, local),),
        table=Table(
            ("mass of the best action", "max π*/μ", "mean of π*/μ under π*", "n times gap", "first-order theory"),
            tuple(
                zip(MASSES, constant.tolist(), square.mean(-1).tolist(), _words.cells(found), _words.cells(local), strict=True)
            ),
        ),
        slopes=(tail, overall, by_square),
        settings=_rates.settings(replicates, seed) | {"pairs": PAIRS, "masses": list(MASSES)},
        notes=(
            f"First-order theory foretells n times the gap within a factor of {float(ratios.min()):.2f} to "
            f"{float(ratios.max()):.2f}.",
            *NOTES,
        ),
    )


def _panel(constant: Tensor, found: Estimates, local: Estimates) -> Panel:
    return Panel(
        f"Data of {PAIRS:,} pairs",
        "coverage constant max π*/μ",
        "n (J(π*) − J(π̂))",
        (Curve.of("measured", constant, found), Curve.of("first-order theory", constant, local)),
        (Guide(1.0, "claimed: proportional"),),
    )


def _chunk(generator: torch.Generator, size: int) -> dict[str, Tensor]:
    bandit = _rates.problems(generator, size)
    optimum, preference = reverse_optimum(bandit), bradley_terry(bandit.rewards)
    scaled, limit, density, square = [], [], [], []
    for mass in MASSES:
        mu = _with_mass(bandit.mixture, bandit.rewards.argmax(-1, keepdim=True), mass)
        law = pair_law(bandit.contexts, mu)
        estimate = fit_tabular(draw_wins(law, preference, PAIRS, size, generator), radius=_rates.RADIUS)
        policy = solve_reverse_kl(estimate, bandit.geometric, bandit.beta)
        scaled.append(PAIRS * reverse_gap(policy, bandit))
        limit.append(first_order(bandit, law, optimum))
        density.append(density_coverage(optimum, mu))
        square.append(chi_square_coverage(optimum, mu, bandit.contexts))
    columns = {"scaled": scaled, "limit": limit, "density": density, "square": square}
    return {name: torch.stack(values, -1) for name, values in columns.items()}


def first_order(bandit: FiniteBandit, law: Tensor, optimum: Tensor) -> Tensor:
    """lim n E gap = E_x tr(Cov_pi* C_x)/(2 beta), C_x the covariance of sqrt(n) times the error of the rewards in x: (...,)."""
    errors = error_covariance(law, bradley_terry(bandit.rewards), bandit.rewards)
    policy = optimum.exp()
    spread = torch.diag_embed(policy) - policy.unsqueeze(-1) * policy.unsqueeze(-2)
    return bandit.mean((spread * errors).sum((-2, -1))) / (2 * bandit.beta)


def _with_mass(mixture: Tensor, best: Tensor, mass: float) -> Tensor:
    """`mixture` (..., X, Y) with the mass of `best` (..., X, 1) set, the others in proportion."""
    others = mixture.scatter(-1, best, -math.inf).log_softmax(-1) + math.log1p(-mass)
    return others.scatter(-1, best, math.log(mass))


EXPERIMENT = Experiment("coverage", TITLE, run, default_replicates=300, seconds=7.0)
