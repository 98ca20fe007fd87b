"""How far is the fitted policy's expected reward from that of the regularised optimum? [MR] arXiv 2502.01203."""

from __future__ import annotations

import torch
from torch import Tensor

from polyref.theory.bandit import FiniteBandit
from polyref.theory.experiments import Experiment, Progress, _rates, _words
from polyref.theory.regression import Estimates, estimates, fit_slope, mean, quantile, rms
from polyref.theory.results import Curve, ExperimentResult, Guide, Panel, Table, agreement_of
from polyref.theory.solutions import solve_reverse_kl
from polyref.theory.values import unregularised_gap

TITLE = "The unregularised gap, which has a sign, against the number of pairs"


def run(replicates: int, seed: int, progress: Progress) -> ExperimentResult:
    """E_{pi*} r - E_{pi^} r: mean, root mean square and 90% quantile at each size, and the slope of each."""
    gaps, _ = _rates.measure_over_sizes(_gap, lambda bandit: torch.ones(()), replicates, seed, progress)
    sizes, statistics = _rates.SIZES, (mean, rms, quantile(0.9))
    average, square, upper = (estimates(gaps, statistic) for statistic in statistics)
    centre, slope, tail = (
        fit_slope(sizes, gaps, statistic, name="unregularised gap", claimed=claimed, drop=None)
        for statistic, claimed in zip(statistics, (None, -0.5, -0.5), strict=True)
    )
    negative = (gaps < 0).double().mean(-1).tolist()
    rows = zip(sizes, _words.cells(average), _words.cells(square), _words.cells(upper), negative, strict=True)
    agreement = agreement_of(slope)
    return ExperimentResult(
        name="unregularised-gap",
        title=TITLE,
        question="How much expected reward does a policy fitted to n pairs give away, or win, against the regularised optimum?",
        claim="E_{pi*} r - E_{pi^} r, pi* optimal for the regularised objective, is bounded by a constant over sqrt(n) [MR].",
        finding=_words.finding(
            "a bound of slope -0.5",
            f"{_words.fitted(slope, 'pairs')} for the root mean square and {_words.fitted(tail, 'pairs')} for the 90% quantile",
            _words.verdict(agreement),
        ),
        agreement=agreement,
        panels=_panels(average, square, upper),
        table=Table(("pairs", "mean, signed", "root mean square", "90% quantile", "share negative"), tuple(rows)),
        slopes=(slope, tail, centre),
        settings=_rates.settings(replicates, seed),
        notes=(
            f"The gap is negative in {negative[-1]:.0%} of the runs at {sizes[-1]:,} pairs; slope of its signed mean: "
            f"{_words.shown(centre)}.",
            *_rates.ASSUMPTIONS,
        ),
    )


def _panels(average: Estimates, square: Estimates, upper: Estimates) -> tuple[Panel, Panel]:
    sizes = _rates.SIZES
    return (
        Panel(
            "Size of the unregularised gap",
            "preference pairs",
            "E_π* r − E_π̂ r",
            (Curve.of("root mean square", sizes, square), Curve.of("90% quantile", sizes, upper)),
            (Guide(-0.5, "claimed bound: 1/√n"),),
        ),
        Panel(
            "Its signed mean",
            "preference pairs",
            "mean of E_π* r − E_π̂ r",
            (Curve.of("mean", sizes, average),),
            (Guide(0.0, "no difference", (sizes[0], 0.0)),),
            log_y=False,
        ),
    )


def _gap(rewards: Tensor, bandit: FiniteBandit) -> Tensor:
    return unregularised_gap(solve_reverse_kl(rewards, bandit.geometric, bandit.beta), bandit)


EXPERIMENT = Experiment("unregularised-gap", TITLE, run, default_replicates=1000, seconds=5.0)
