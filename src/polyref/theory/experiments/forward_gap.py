"""Does the gap under forward KL fall as 1/sqrt(n), as its bound, or faster? [MR] arXiv 2502.01203."""

from __future__ import annotations

from torch import Tensor

from polyref.theory.bandit import FiniteBandit
from polyref.theory.coverage import density_coverage
from polyref.theory.experiments import Experiment, Progress, _rates, _words
from polyref.theory.results import ExperimentResult, Guide, Panel, agreement_of
from polyref.theory.solutions import forward_optimum, solve_forward_kl
from polyref.theory.values import forward_gap

TITLE = "The gap under forward KL against the number of pairs"


def run(replicates: int, seed: int, progress: Progress) -> ExperimentResult:
    """J~(pi~) - J~(pi^) of the plug-in optimum: its mean and 90% quantile at each size, and the slope of both."""
    gaps, coverages = _rates.measure_over_sizes(_gap, _coverage, replicates, seed, progress)
    fits = _rates.fit_gaps("forward-KL gap", gaps, claimed=-0.5)
    agreement = agreement_of(fits.mean)
    holds = "holds" if fits.mean.low <= -1 <= fits.mean.high else "does not hold"
    return ExperimentResult(
        name="forward-gap",
        title=TITLE,
        question="Does forward KL to several references cost more data than reverse KL, as its bound says?",
        claim="The gap under forward KL is bounded by a constant over sqrt(n) [MR].",
        finding=_words.finding(
            "a bound of slope -0.5",
            f"{_words.fitted(fits.mean, 'pairs')} for the mean, whose interval {holds} the -1 of second-order theory, and "
            f"{_words.fitted(fits.upper, 'pairs')} for the 90% quantile",
            _words.verdict(agreement),
        ),
        agreement=agreement,
        panels=(
            Panel(
                "Gap, forward KL",
                "preference pairs",
                "J(π*) − J(π̂), forward",
                fits.curves,
                (Guide(-0.5, "claimed bound: 1/√n"), Guide(-1.0, "second order: 1/n")),
            ),
        ),
        table=fits.table,
        slopes=(fits.mean, fits.upper),
        settings=_rates.settings(replicates, seed),
        notes=_rates.ASSUMPTIONS,
        measured=_rates.constants("forward-gap", gaps, coverages, seed),
    )


def _gap(rewards: Tensor, bandit: FiniteBandit) -> Tensor:
    return forward_gap(solve_forward_kl(rewards, bandit.mixture, bandit.beta).log_policy, bandit)


def _coverage(bandit: FiniteBandit) -> Tensor:
    return density_coverage(forward_optimum(bandit), bandit.mixture)


EXPERIMENT = Experiment("forward-gap", TITLE, run, default_replicates=1000, seconds=7.0)
