"""Learning in rounds on a linear bandit: who draws the pairs, what is learned, and the gap and regret along the way [IT].

Round t: the main agent is learned from all comparisons so far; a strategy names the two policies that draw the next
`batch_size` pairs; their labels are added. One loop serves every setting: ONLINE strategies pair the main agent with a second
one, OFFLINE is the strategy whose two policies never change (`fixed`), and HYBRID starts the online loop from the wins of an
offline phase, with the anchor as the second agent. Labels are paid for equally in all. Replicates R run side by side.
Source: [IT] arXiv 2312.11456, algorithms 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from polyref.errors import ConfigError
from polyref.theory.bandit import FiniteBandit
from polyref.theory.enhancer import enhance
from polyref.theory.estimators import fit_linear
from polyref.theory.gshf import covariance, linear_features, offline_greedy
from polyref.theory.preferences import bradley_terry, pair_law
from polyref.theory.sampling import draw_wins
from polyref.theory.values import reverse_gap

Learner = Callable[[Tensor, Tensor, FiniteBandit], Tensor]
"""(theta_hat (R, d), S (R, d, d), bandit) -> log-policy (R, X, Y): `gshf.offline_greedy`, or a pessimist."""


@dataclass(frozen=True)
class Round:
    """What a strategy sees."""

    bandit: FiniteBandit
    main: Tensor
    """log pi_1, the main agent: (R, X, Y)."""
    covariance: Tensor
    """S of the comparisons so far: (R, d, d)."""


Strategy = Callable[[Round], tuple[Tensor, Tensor]]
"""The log-policies (R, X, Y) that draw the first and the second completion of the round's pairs."""


@dataclass(frozen=True)
class Curves:
    """What a run leaves. Entry t of T + 1 is the state after t rounds."""

    labels: Tensor
    """(T + 1,): comparisons seen, those of an offline phase included."""
    gap: Tensor
    """(R, T + 1): regularised gap of the main agent, in reward units."""
    regret: Tensor
    """(R, T + 1): sum over the labels drawn here of the gap of the main agent of their round; 0 at first."""
    played: Tensor
    """(R, T + 1): the same of the mean gap of the TWO policies that drew the pair: what the drawn completions cost."""
    wins: Tensor
    """(R, X, Y, Y): all comparisons at the end."""


def greedy(state: Round) -> tuple[Tensor, Tensor]:
    """Both from the main agent: no exploration beyond its own randomness."""
    return state.main, state.main


def anchored(state: Round) -> tuple[Tensor, Tensor]:
    """The main agent against the anchor G_a: the pair of hybrid learning."""
    return state.main, state.bandit.geometric.expand(state.main.shape)


def random_pair(state: Round) -> tuple[Tensor, Tensor]:
    """Both uniform over the supported actions, whatever has been learned."""
    outside = state.bandit.geometric.isneginf()
    uniform = torch.zeros_like(state.bandit.geometric).masked_fill(outside, -math.inf).log_softmax(-1).expand(state.main.shape)
    return uniform, uniform


def enhancing(scale: float) -> Strategy:
    """The main agent against its enhancer, in the confidence set of radius `scale`, c in reward units (`enhancer.enhance`)."""
    if not 0 <= scale < math.inf:
        raise ConfigError(f"the scale of the enhancer is {scale}", fix="give a finite value >= 0")

    def strategy(state: Round) -> tuple[Tensor, Tensor]:
        bandit, anchor = state.bandit, state.bandit.geometric.expand(state.main.shape).unsqueeze(-3)
        found = enhance(
            state.main,
            linear_features(bandit),
            state.covariance,
            bandit.contexts,
            bandit.beta,
            scale=scale,
            candidates=anchor,
        )
        return state.main, found.log_policy

    return strategy


def fixed(first: Tensor, second: Tensor | None = None) -> Strategy:
    """Always the log-policies `first` and `second` (the same where left out), (..., X, Y): offline data."""
    other = first if second is None else second
    return lambda state: (first.expand(state.main.shape), other.expand(state.main.shape))


def run_rounds(
    bandit: FiniteBandit,
    strategy: Strategy,
    generator: torch.Generator,
    *,
    rounds: int,
    batch_size: int,
    replicates: int,
    learner: Learner = offline_greedy,
    preference: Tensor | None = None,
    wins: Tensor | None = None,
    radius: float | None = None,
    ridge: float = 1.0,
) -> Curves:
    """`rounds` rounds of `batch_size` labels on a linear bandit, one for all replicates or (R,) of them.

    `preference` (..., X, Y, Y) labels the pairs, Bradley-Terry where left out; a pair of one action twice is paid for and
    teaches nothing. `wins` (R, X, Y, Y) are the comparisons to start from. `ridge` is the lambda of S and, times 1/100, the
    ridge of the likelihood; `radius` the ball of theta. ConfigError for sizes below 1, or a bandit without features.
    """
    if min(rounds, batch_size, replicates) < 1:
        raise ConfigError(f"rounds {rounds}, batch_size {batch_size}, replicates {replicates}", fix="give at least 1 of each")
    features = linear_features(bandit)
    contexts, actions = features.shape[-3:-1]
    shape = (replicates, contexts, actions)
    rewards = bandit.rewards.masked_fill(bandit.geometric.isneginf(), 0.0).expand(shape)
    preference = (bradley_terry(rewards) if preference is None else preference).expand(*shape, actions)
    wins = torch.zeros(*shape, actions, dtype=torch.float64) if wins is None else wins.expand(*shape, actions)
    before = int(wins[0].sum())
    gaps, played = [], []
    for _ in range(rounds):
        main, matrix = _learn(wins, features, bandit, learner, radius, ridge)
        first, second = strategy(Round(bandit, main, matrix))
        gaps.append(reverse_gap(main, bandit).expand(replicates))
        played.append(((reverse_gap(first, bandit) + reverse_gap(second, bandit)) / 2).expand(replicates))
        law = pair_law(bandit.contexts, first, second, distinct=False)
        wins = wins + draw_wins(law, preference, batch_size, replicates, generator)
    gaps.append(reverse_gap(_learn(wins, features, bandit, learner, radius, ridge)[0], bandit).expand(replicates))
    gap = torch.stack(gaps, -1)
    labels = before + batch_size * torch.arange(rounds + 1, dtype=torch.float64)
    return Curves(labels, gap, _summed(gap[:, :-1], batch_size), _summed(torch.stack(played, -1), batch_size), wins)


def run_hybrid(
    bandit: FiniteBandit,
    offline: Strategy,
    generator: torch.Generator,
    *,
    offline_labels: int,
    rounds: int,
    batch_size: int,
    replicates: int,
    strategy: Strategy = anchored,
    preference: Tensor | None = None,
    radius: float | None = None,
    ridge: float = 1.0,
) -> Curves:
    """`offline_labels` labels of the `fixed` strategy `offline`, then `run_rounds` of the main agent against the anchor."""
    start = run_rounds(
        bandit,
        offline,
        generator,
        rounds=1,
        batch_size=offline_labels,
        replicates=replicates,
        preference=preference,
        radius=radius,
        ridge=ridge,
    )
    return run_rounds(
        bandit,
        strategy,
        generator,
        rounds=rounds,
        batch_size=batch_size,
        replicates=replicates,
        preference=preference,
        wins=start.wins,
        radius=radius,
        ridge=ridge,
    )


def _learn(
    wins: Tensor, features: Tensor, bandit: FiniteBandit, learner: Learner, radius: float | None, ridge: float
) -> tuple[Tensor, Tensor]:
    theta = fit_linear(wins, features, radius=radius, ridge=ridge / 100)
    matrix = covariance(wins, features, ridge)
    return learner(theta, matrix, bandit).expand(wins.shape[:-1]), matrix


def _summed(gaps: Tensor, batch_size: int) -> Tensor:
    """(R, T) per round to the running sum per label (R, T + 1)."""
    return torch.cat([torch.zeros_like(gaps[:, :1]), (batch_size * gaps).cumsum(-1)], dim=-1)
