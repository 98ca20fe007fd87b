"""Does the regularised gap under reverse KL fall as 1/n? [MR] arXiv 2502.01203."""

from __future__ import annotations

from torch import Tensor

from polyref.theory.bandit import FiniteBandit
from polyref.theory.coverage import density_coverage
from polyref.theory.experiments import Experiment, Progress, _rates, _words
from polyref.theory.results import ExperimentResult, Guide, Panel, agreement_of
from polyref.theory.solutions import reverse_optimum, solve_reverse_kl
from polyref.theory.values import reverse_gap

TITLE = "The regularised gap under reverse KL against the number of pairs"


def run(replicates: int, seed: int, progress: Progress) -> ExperimentResult:
    """J(pi*) - J(pi^) of the plug-in tilt: its mean and 90% quantile at each size, and the slope of both."""
    gaps, coverages = _rates.measure_over_sizes(_gap, _coverage, replicates, seed, progress)
    fits = _rates.fit_gaps("regularised gap", gaps, claimed=-1.0)
    agreement = agreement_of(fits.mean)
    return ExperimentResult(
        name="reverse-gap",
        title=TITLE,
        question="How fast does the policy fitted to n pairs approach the optimum of the objective it is fitted for?",
        claim="The regularised gap under reverse KL falls as 1/n, given coverage of every reference [MR].",
        finding=_words.finding(
            "slope -1",
            f"{_words.fitted(fits.mean, 'pairs')} for the mean and {_words.fitted(fits.upper, 'pairs')} for the 90% quantile",
            _words.verdict(agreement),
        ),
        agreement=agreement,
        panels=(
            Panel(
                "Regularised gap, reverse KL", "preference pairs", "J(π*) − J(π̂)", fits.curves, (Guide(-1.0, "claimed: 1/n"),)
            ),
        ),
        table=fits.table,
        slopes=(fits.mean, fits.upper),
        settings=_rates.settings(replicates, seed),
        notes=_rates.ASSUMPTIONS,
        measured=_rates.constants("reverse-gap", gaps, coverages, seed),
    )


def _gap(rewards: Tensor, bandit: FiniteBandit) -> Tensor:
    return reverse_gap(solve_reverse_kl(rewards, bandit.geometric, bandit.beta), bandit)


def _coverage(bandit: FiniteBandit) -> Tensor:
    return density_coverage(reverse_optimum(bandit), bandit.mixture)


EXPERIMENT = Experiment("reverse-gap", TITLE, run, default_replicates=1000, seconds=6.0)
