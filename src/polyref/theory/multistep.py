"""Multi-step rejection sampling: N small tilts instead of one large one, exactly and by simulation [IT], [RSO].

One step proposes from the anchor and accepts with exp((r - r_max)/beta): as little as exp(-R/beta), R the range of rewards in
a context. N steps climb the ladder 1/beta_k = k/(N beta): step k proposes from the policy fitted at step k - 1 (the anchor at
first), accepts with exp((r - r_max)/(N beta)), at least exp(-R/(N beta)) whatever it proposes from, and the accepted are fitted
before the next step, with beta_k against the ORIGINAL anchor. Steps are paid for by proposals: N steps need about
N exp(R/(N beta)) for each completion accepted in every step, at best near N = R/beta. N = 1 is plain rejection sampling.
Exact only for a known r_max(x), which is the largest reward on the support. Sources: [IT] 2312.11456, [RSO] 2309.06657.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from polyref.errors import ConfigError
from polyref.theory.bandit import FiniteBandit
from polyref.theory.estimators import fit_tabular
from polyref.theory.preferences import bradley_terry, pair_law
from polyref.theory.sampling import draw_wins
from polyref.theory.solutions import solve_reverse_kl

Fit = Callable[[Tensor, int], Tensor]
"""(counts of accepted draws (R, X, Y), step k = 1..N-1) -> the log-policy (R, X, Y) that the next step proposes from."""


@dataclass(frozen=True)
class Path:
    """The exact course of N steps, by enumeration."""

    proposals_from: Tensor
    """(..., N, X, Y): log-policy that each step proposes from; the first is the anchor."""
    accepted: Tensor
    """(..., N, X, Y): log-law of what each step accepts; the last is what the method returns."""
    acceptance: Tensor
    """(..., N, X): probability that a proposal is accepted."""

    @property
    def proposals(self) -> Tensor:
        """(..., X): expected proposals, over all steps, for one accepted completion in each."""
        return self.acceptance.reciprocal().sum(-2)


@dataclass(frozen=True)
class Simulation:
    """A simulated course: counts over a fixed number of proposals in each step and context."""

    accepted: Tensor
    """(R, N, X, Y): accepted draws."""
    proposals: int
    """Proposals a step and context."""

    @property
    def acceptance(self) -> Tensor:
        """(R, N, X): the share accepted."""
        return self.accepted.sum(-1) / self.proposals


def ladder(bandit: FiniteBandit, steps: int) -> Tensor:
    """log pi_k = log G_a + r k/(N beta) - log Z_k for k = 0..N: (..., N + 1, X, Y). The last is the optimum."""
    levels = torch.arange(_checked(steps) + 1, dtype=torch.float64)[:, None, None] / steps
    return (bandit.geometric.unsqueeze(-3) + levels * _rewards(bandit).unsqueeze(-3) / bandit.beta).log_softmax(-1)


def least_acceptance(bandit: FiniteBandit, steps: int) -> Tensor:
    """exp(-R(x)/(N beta)): (..., X), below which no step falls, whatever policy it proposes from."""
    rewards = _rewards(bandit)
    least = rewards.masked_fill(bandit.geometric.isneginf(), math.inf).amin(-1)
    return (-(_best(bandit) - least) / (_checked(steps) * bandit.beta)).exp()


def enumerate_steps(
    bandit: FiniteBandit, steps: int, *, errors: Tensor | None = None, anchored: bool = True, reweight: bool = False
) -> Path:
    """The exact laws and acceptances of `steps` steps.

    `errors` (..., N - 1, X, Y) are the fit errors of steps 1..N-1: what each fitted log-policy has added, before it is
    normalised, to what it should be; none where left out. It should be pi_k when `anchored` (sigmoid pairs at beta_k against
    the original anchor estimate the whole tilt), and otherwise the law of the accepted draws (they are imitated), so that
    errors accumulate: the law returned is off by the last error, or by the sum of all. `reweight` accepts in proportion to
    pi_k / (policy proposed from) instead: exact whatever the errors, at the acceptance that the largest ratio leaves.
    """
    exact = ladder(bandit, steps)
    source, sources, accepted, rates = exact[..., 0, :, :], [], [], []
    for step in range(1, steps + 1):
        if reweight:
            log_weight = (exact[..., step, :, :] - source).masked_fill(source.isneginf(), -math.inf)
            log_weight = log_weight - log_weight.amax(-1, keepdim=True)
        else:
            log_weight = (_rewards(bandit) - _best(bandit).unsqueeze(-1)) / (steps * bandit.beta)
        joint = source + log_weight
        rates.append(joint.logsumexp(-1).exp())
        sources.append(source)
        accepted.append(joint.log_softmax(-1))
        if step < steps:
            aim = exact[..., step, :, :] if anchored else accepted[-1]
            source = aim if errors is None else (aim + errors[..., step - 1, :, :]).log_softmax(-1)
    shape = torch.broadcast_shapes(*(one.shape for one in sources))
    stacked = [torch.stack([one.expand(shape) for one in part], -3) for part in (sources, accepted)]
    return Path(stacked[0], stacked[1], torch.stack([rate.expand(shape[:-1]) for rate in rates], -2))


def simulate_steps(
    bandit: FiniteBandit,
    steps: int,
    generator: torch.Generator,
    *,
    proposals: int,
    replicates: int,
    fit: Fit | None = None,
) -> Simulation:
    """`steps` steps of `proposals` drawn completions a context, each kept on a coin of its own; one bandit, R replicates.

    `fit` turns the accepted into the next proposal policy; left out, the exact one takes its place. `fit_pairs` is a real one.
    """
    if min(proposals, replicates) < 1:
        raise ConfigError(f"proposals {proposals}, replicates {replicates}", fix="give at least 1 of each")
    exact = ladder(bandit, steps)
    shape = (replicates, *exact.shape[-2:])
    keep = ((_rewards(bandit) - _best(bandit).unsqueeze(-1)) / (steps * bandit.beta)).exp().expand(shape)
    source, kept = exact[..., 0, :, :].expand(shape), []
    for step in range(1, steps + 1):
        drawn = torch.multinomial(source.exp().reshape(-1, shape[-1]), proposals, True, generator=generator).view(
            *shape[:2], -1
        )
        coins = torch.rand(drawn.shape, generator=generator, dtype=torch.float64) < keep.gather(-1, drawn)
        counts = torch.zeros(shape, dtype=torch.float64).scatter_add(-1, drawn, coins.to(torch.float64))
        kept.append(counts)
        if step < steps:
            source = exact[..., step, :, :].expand(shape) if fit is None else fit(counts, step)
    return Simulation(torch.stack(kept, -3), proposals)


def fit_pairs(bandit: FiniteBandit, steps: int, generator: torch.Generator, *, pairs: int, radius: float) -> Fit:
    """The practice: `pairs` distinct pairs of accepted completions, labelled Bradley-Terry by the reward, and a sigmoid fit.

    The tabular minimiser of the sigmoid loss at beta_k against the original anchor is the tilt of the maximum-likelihood reward
    (in a ball of `radius`) at beta_k. One half is added to each supported count, as a pair needs two different completions.
    """
    rewards = _rewards(bandit)
    outside = bandit.geometric.isneginf()

    def fit(accepted: Tensor, step: int) -> Tensor:
        empirical = (accepted + 0.5).log().masked_fill(outside, -math.inf).log_softmax(-1)
        law = pair_law(bandit.contexts, empirical)
        wins = draw_wins(law, bradley_terry(rewards.expand(accepted.shape)), pairs, accepted.shape[0], generator)
        return solve_reverse_kl(fit_tabular(wins, radius=radius), bandit.geometric, bandit.beta * steps / step)

    return fit


def _rewards(bandit: FiniteBandit) -> Tensor:
    """Rewards (..., X, Y), 0 where the anchor has no mass."""
    return bandit.rewards.masked_fill(bandit.geometric.isneginf(), 0.0)


def _best(bandit: FiniteBandit) -> Tensor:
    """r_max (..., X) on the support of the anchor."""
    return bandit.rewards.masked_fill(bandit.geometric.isneginf(), -math.inf).amax(-1)


def _checked(steps: int) -> int:
    if steps < 1:
        raise ConfigError(f"steps is {steps}", where="multi-step rejection sampling", fix="give at least 1")
    return steps
