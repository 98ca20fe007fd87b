"""What the experiments on variance reduction share: misspecified problems, and the errors of plain and reduced fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Final, NamedTuple

import torch
from torch import Tensor

from polyref.theory.asymptotics import error_covariance, pseudo_true
from polyref.theory.auxiliary import variance_reduced_terms
from polyref.theory.bandit import FiniteBandit, random_bandit
from polyref.theory.estimators import fit_tabular
from polyref.theory.preferences import MISSPECIFICATIONS, pair_law
from polyref.theory.regression import Estimates, Numbers, ratio
from polyref.theory.sampling import draw_wins
from polyref.theory.solutions import solve_reverse_kl
from polyref.theory.values import reverse_gap

CONTEXTS, ACTIONS, REFERENCES, BETA, REWARD_RANGE = 5, 5, 3, 0.5, 2.0
RADIUS: Final = 10.0
"""Of the ball of rewards a context: it holds the pseudo-true rewards of every misspecification."""

SIZES: Final = {"contexts": CONTEXTS, "actions": ACTIONS, "references": REFERENCES, "beta": BETA, "reward_range": REWARD_RANGE}
ASSUMPTIONS: Final = (
    f"Every replicate is a problem of its own: {CONTEXTS} contexts, {ACTIONS} actions, {REFERENCES} references, rewards "
    f"uniform on [0, {REWARD_RANGE:g}], beta {BETA:g}; distinct pairs drawn from the known mixture of the references, "
    "as are the auxiliary pairs.",
    "The error is to the pseudo-true rewards, which the plain fit tends to as well; the regret is the regularised gap of the "
    "tilt of the estimate to that of the pseudo-true rewards. Where Bradley-Terry is wrong, no reward is the true one.",
)


class Problem(NamedTuple):
    """Problems with preferences that no reward may explain, (R, ...) each."""

    bandit: FiniteBandit
    """Its rewards are the pseudo-true ones."""
    preference: Tensor
    law: Tensor


def draw_problem(misspecification: str, replicates: int, generator: torch.Generator) -> Problem:
    """Random problems of the sizes above, with preferences of that name in MISSPECIFICATIONS."""
    bandit = random_bandit(
        generator,
        replicates=(replicates,),
        contexts=CONTEXTS,
        actions=ACTIONS,
        references=REFERENCES,
        beta=BETA,
        reward_range=REWARD_RANGE,
    )
    preference = MISSPECIFICATIONS[misspecification](bandit.rewards, generator)
    law = pair_law(bandit.contexts, bandit.mixture)
    return Problem(replace(bandit, rewards=pseudo_true(law, preference, radius=RADIUS)), preference, law)


def plain_errors(problem: Problem, wins: Tensor) -> dict[str, Tensor]:
    """Squared error and regret of the plain fit of `wins`, (R,) each."""
    return _errors(problem, fit_tabular(wins, radius=RADIUS))


def reduced_errors(
    problem: Problem, wins: Tensor, g: Tensor, draws: int | None, generator: torch.Generator, control: float = 1.0
) -> dict[str, Tensor]:
    """The same with `draws` auxiliary pairs a data pair, whose preferences are `g`; None: with their exact law."""
    terms = variance_reduced_terms(wins, g, problem.law, draws=draws, generator=generator, control=control)
    return _errors(problem, fit_tabular(terms.wins, linear=terms.linear, radius=RADIUS))


def predicted_error(
    problem: Problem, g: Tensor | None = None, auxiliary_pairs: float = float("inf"), control: float = 1.0
) -> Tensor:
    """The limit of n times the squared error, (R,)."""
    covariance = error_covariance(
        problem.law, problem.preference, problem.bandit.rewards, g=g, auxiliary_pairs=auxiliary_pairs, control=control
    )
    return problem.bandit.mean(covariance.diagonal(dim1=-2, dim2=-1).sum(-1))


def draw_data(problem: Problem, pairs: int, generator: torch.Generator) -> Tensor:
    """Wins (R, X, Y, Y) of `pairs` labelled pairs a replicate."""
    return draw_wins(problem.law, problem.preference, pairs, problem.law.shape[0], generator)


def share(reduced: Numbers, plain: Numbers) -> Estimates:
    """The mean of one error as a share of another of the same runs, with its interval."""
    return ratio(reduced, plain, paired=True)


def _errors(problem: Problem, rewards: Tensor) -> dict[str, Tensor]:
    bandit = problem.bandit
    squared = bandit.mean(((rewards - bandit.rewards) ** 2).sum(-1))
    policy = solve_reverse_kl(rewards, bandit.geometric, bandit.beta)
    return {"error": squared, "regret": reverse_gap(policy, bandit)}
