"""Do several references serve better than one, when good answers are split among them, and when one holds them all?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from polyref.theory.bandit import FiniteBandit
from polyref.theory.estimators import fit_tabular
from polyref.theory.experiments import Experiment, Progress, _words
from polyref.theory.experiments._data import growing_wins
from polyref.theory.experiments._words import MARGIN
from polyref.theory.preferences import bradley_terry, pair_law
from polyref.theory.regression import estimates
from polyref.theory.replicates import map_replicates
from polyref.theory.results import Agreement, Cell, Curve, Estimate, ExperimentResult, Panel, Table
from polyref.theory.solutions import solve_forward_kl, solve_reverse_kl
from polyref.theory.values import forward_objective, kl, mean_reward, reverse_objective

TITLE = "Several references against one"
SIZES: Final = tuple(100 * 2**k for k in range(8))
"""Pairs: 100 to 12,800."""

CONTEXTS, ACTIONS, GOOD, REFERENCES, BETA, RADIUS = 6, 10, 2, 3, 0.25, 5.0
MASS, LITTLE = 0.6, 0.02
"""Probability that a reference gives the good actions of a context where it knows them, and where it does not."""

SCENARIOS: Final = {"split": "Good answers split among three", "one": "One of three knows them all"}
ARMS: Final = {
    "best": "the best one alone",
    "any": "one at random, alone",
    "geometric": "three, geometric",
    "mixture": "three, reverse KL to the mixture",
    "forward": "three, forward KL",
}


JUDGED: Final = ("geometric", "forward")
"""The two objectives of [MR]."""

NOTES: Final = (
    f"{CONTEXTS} contexts, {ACTIONS} actions of which {GOOD} are good (rewards uniform on [0.8, 1], the others on "
    f"[0, 0.5]), beta {BETA:g} throughout. A reference gives the good actions of a context {MASS:g} where it knows "
    f"them and {LITTLE:g} where not. Split: each of three knows a third of the contexts. Otherwise one knows them all, "
    "the others none. Pairs come from the references in use, in equal shares; rewards by maximum likelihood.",
    "Reward lost is the common yardstick: the best action's reward less the policy's, without any KL. Regularised "
    "values and gaps are of each way's own objective, and not comparable between ways.",
    f"The verdict is of [MR]'s two objectives; less than {MARGIN:g} of reward counts as no gain. Reverse KL to the "
    "mixture is neither of them, and shown beside them.",
    "Where a reference hardly ever draws the good actions, their estimated rewards are noise, which moves the policy "
    "away from its anchor: with little data it can lose less reward than its own optimum does.",
)

Beyond = dict[tuple[str, str], Estimate]
"""By scenario and way to use several references."""


class Arm(NamedTuple):
    """One way to use references: its problem, the optimum of any rewards under it, and its own regularised objective."""

    bandit: FiniteBandit
    solve: Callable[[Tensor], Tensor]
    objective: Callable[[Tensor], Tensor]
    data: str
    """Arms of one `data` share one data set."""


def run(replicates: int, seed: int, progress: Progress) -> ExperimentResult:
    """Reward lost against the best answer, and each way's own regularised gap, against the number of pairs."""
    drawn = map_replicates(_measure, replicates, seed, chunk=50, progress=progress)
    beyond = _beyond(drawn)
    agreement, finding = _finding(beyond)
    panels = [
        Panel(title, "preference pairs", words, tuple(_curve(drawn, scenario, arm, what) for arm in ARMS), log_y=what == "gap")
        for what, words in (("lost", "reward lost to the best answer"), ("gap", "gap of the own objective"))
        for scenario, title in SCENARIOS.items()
    ]
    return ExperimentResult(
        name="references",
        title=TITLE,
        question="When is it worth keeping a policy close to several references instead of one?",
        claim=(
            "References that know different things cover good answers better together than any alone ([MR], motivation of both "
            "of its objectives: reverse KL to the geometric composition, forward KL to the references)."
        ),
        finding=finding,
        agreement=agreement,
        panels=tuple(panels),
        table=_table(drawn),
        settings={
            "replicates": replicates,
            "seed": seed,
            "pairs": list(SIZES),
            "contexts": CONTEXTS,
            "actions": ACTIONS,
            "references": REFERENCES,
            "beta": BETA,
        },
        notes=(
            _elsewhere(beyond),
            *NOTES,
        ),
    )


def _measure(generator: torch.Generator, size: int) -> dict[str, Tensor]:
    """For each scenario, arm: "lost" and "gap" (size, P), and "optimum" (size, 2): reward lost and regularised value."""
    found = {}
    for scenario in SCENARIOS:
        arms = _arms(generator, size, scenario)
        rewards = arms["best"].bandit.rewards
        best = rewards.amax(-1).mean(-1)
        fitted = {data: _fits(generator, arm.bandit) for data, arm in {arm.data: arm for arm in arms.values()}.items()}
        for name, arm in arms.items():
            optimum = arm.solve(rewards)
            value = arm.objective(optimum)
            policies = [arm.solve(estimate) for estimate in fitted[arm.data]]
            lost = [best - mean_reward(policy, arm.bandit) for policy in policies]
            gaps = [value - arm.objective(policy) for policy in policies]
            found[f"{scenario} {name} lost"] = torch.stack(lost, -1)
            found[f"{scenario} {name} gap"] = torch.stack(gaps, -1)
            found[f"{scenario} {name} optimum"] = torch.stack([best - mean_reward(optimum, arm.bandit), value], -1)
    return found


def _arms(generator: torch.Generator, size: int, scenario: str) -> dict[str, Arm]:
    """The problem of one scenario, drawn, and the five ways to use its references."""
    rewards = 0.5 * torch.rand(size, CONTEXTS, ACTIONS, generator=generator, dtype=torch.float64)
    rewards[..., :GOOD] = 0.8 + 0.4 * rewards[..., :GOOD]
    plain = torch.randn(size, CONTEXTS, ACTIONS, REFERENCES, generator=generator, dtype=torch.float64)
    knows = torch.arange(CONTEXTS)[:, None] % REFERENCES == torch.arange(REFERENCES)
    if scenario == "one":
        knows = (torch.arange(REFERENCES) == 0).expand(CONTEXTS, REFERENCES)
    logps = _with_good_mass(plain, LITTLE + (MASS - LITTLE) * knows.to(torch.float64))
    alone = torch.stack([mean_reward(*_tilt(rewards, logps[..., k : k + 1])) for k in range(REFERENCES)], -1)
    drawn = torch.randint(REFERENCES, (size,), generator=generator)
    together = FiniteBandit.tabular(rewards, logps, beta=BETA)
    return {
        "best": _single(rewards, logps, alone.argmax(-1), "best"),
        "any": _single(rewards, logps, drawn, "any"),
        "geometric": Arm(
            together,
            lambda r: solve_reverse_kl(r, together.geometric, BETA),
            lambda policy: reverse_objective(policy, together),
            "together",
        ),
        "mixture": Arm(
            together,
            lambda r: solve_reverse_kl(r, together.mixture, BETA),
            lambda policy: mean_reward(policy, together) - BETA * together.mean(kl(policy, together.mixture)),
            "together",
        ),
        "forward": Arm(
            together,
            lambda r: solve_forward_kl(r, together.mixture, BETA).log_policy,
            lambda policy: forward_objective(policy, together),
            "together",
        ),
    }


def _with_good_mass(logits: Tensor, mass: Tensor) -> Tensor:
    """Log-probs (..., X, Y, K) whose first GOOD actions hold `mass` (X, K); proportions within and without as in softmax."""
    good = logits[..., :GOOD, :].log_softmax(-2) + mass.log()[:, None, :]
    rest = logits[..., GOOD:, :].log_softmax(-2) + torch.log1p(-mass)[:, None, :]
    return torch.cat([good, rest], -2)


def _tilt(rewards: Tensor, logps: Tensor) -> tuple[Tensor, FiniteBandit]:
    bandit = FiniteBandit.tabular(rewards, logps, beta=BETA)
    return solve_reverse_kl(rewards, bandit.geometric, BETA), bandit


def _single(rewards: Tensor, logps: Tensor, member: Tensor, data: str) -> Arm:
    """Reverse KL to reference `member` (R,) of each replicate."""
    index = member[:, None, None, None].expand(*logps.shape[:-1], 1)
    bandit = FiniteBandit.tabular(rewards, logps.gather(-1, index), beta=BETA)
    return Arm(
        bandit,
        lambda r: solve_reverse_kl(r, bandit.geometric, BETA),
        lambda policy: reverse_objective(policy, bandit),
        data,
    )


def _fits(generator: torch.Generator, bandit: FiniteBandit) -> list[Tensor]:
    """Maximum-likelihood rewards at every size, of nested data sets drawn from the references of `bandit`."""
    law, preference = pair_law(bandit.contexts, bandit.mixture), bradley_terry(bandit.rewards)
    return [fit_tabular(wins, radius=RADIUS) for wins in growing_wins(law, preference, SIZES, generator)]


def _curve(drawn: dict[str, Tensor], scenario: str, arm: str, what: str) -> Curve:
    return Curve.of(ARMS[arm], SIZES, estimates(drawn[f"{scenario} {arm} {what}"].T))


def _table(drawn: dict[str, Tensor]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for scenario, title in SCENARIOS.items():
        for arm, words in ARMS.items():
            lost, gaps, optimum = (drawn[f"{scenario} {arm} {what}"] for what in ("lost", "gap", "optimum"))
            middle = len(SIZES) // 2
            numbers = [optimum[:, 0], lost[:, middle], lost[:, -1], optimum[:, 1], gaps[:, middle], gaps[:, -1]]
            rows.append((title, words, *map(_words.mean_cell, numbers)))
    middle_size, last = (f"{size:,}" for size in (SIZES[len(SIZES) // 2], SIZES[-1]))
    columns = ("reward lost, optimum", f"at {middle_size} pairs", f"at {last} pairs", "regularised value")
    return Table(("scenario", "references", *columns, f"gap at {middle_size}", f"gap at {last}"), tuple(rows))


def _beyond(drawn: dict[str, Tensor]) -> Beyond:
    """Reward lost beyond what the best single reference loses, at the largest size, paired."""
    return {
        (scenario, arm): _words.mean_cell((drawn[f"{scenario} {arm} lost"] - drawn[f"{scenario} best lost"])[:, -1])
        for scenario in SCENARIOS
        for arm in ("geometric", "forward", "mixture")
    }


def _finding(beyond: Beyond) -> tuple[Agreement, str]:
    """Judged where answers are split."""
    signs = [_words.lower(beyond["split", arm], 0.0) for arm in JUDGED]
    agreement = _words.joint(signs)
    return agreement, _words.finding(
        "several references cover good answers better",
        f"at {SIZES[-1]:,} pairs, where good answers are split, reward lost beyond that of the best single reference of "
        f"{_listed(beyond, 'split')}, borne out for {signs.count(1)} of {len(signs)} objectives (less than {MARGIN:g} counts "
        "as no gain)",
        _words.outcome(agreement),
    )


def _elsewhere(beyond: Beyond) -> str:
    """What the verdict does not count: the other scenario, and the objective that is not [MR]'s."""
    split, one = (_words.told(beyond[scenario, "mixture"], "+.3f") for scenario in SCENARIOS)
    return (
        f"Reward lost beyond that of the best single reference where one knows all good answers: {_listed(beyond, 'one')}. "
        f"Reverse KL to the mixture, which is neither objective: {split} where they are split, {one} where one knows them all."
    )


def _listed(beyond: Beyond, scenario: str) -> str:
    return " and ".join(f"{_words.told(beyond[scenario, arm], '+.3f')} for {ARMS[arm]}" for arm in JUDGED)


EXPERIMENT = Experiment("references", TITLE, run, default_replicates=200, seconds=8.0)
