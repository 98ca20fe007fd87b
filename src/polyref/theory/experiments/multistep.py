"""How many proposals does a ladder of small tilts save over one large one, and what do fit errors do to it? [IT], [RSO]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from polyref.theory.bandit import FiniteBandit
from polyref.theory.experiments import Experiment, Progress, _linear, _words
from polyref.theory.multistep import enumerate_steps, fit_pairs, least_acceptance, simulate_steps
from polyref.theory.regression import SlopeFit, fit_slope
from polyref.theory.replicates import map_replicates
from polyref.theory.results import Agreement, Cell, Curve, Estimate, ExperimentResult, Guide, Panel, Table
from polyref.theory.solutions import reverse_optimum
from polyref.theory.values import kl

TITLE = "Multi-step rejection sampling: acceptance and total proposals against the number of steps"
STEPS: Final = (1, 2, 4, 8, 16, 32)
ACTIONS, REWARD_RANGE, BETA, ERROR, PROPOSALS, PAIRS = 24, 5.0, 0.25, 0.2, 400, 4_000
RADIUS: Final = 10.0
"""Of the ball of rewards a context, centred, whose norm is about 7."""
RARITY: Final = {"rare": 18.0, "common": 3.0}
"""Nats by which the anchor prefers the worst completion to the best one."""
RANGE_OVER_BETA: Final = REWARD_RANGE / BETA

NOTES: Final = (
    f"Every replicate is a problem of 2 contexts and {ACTIONS} completions, rewards from 0 to {REWARD_RANGE:g} with "
    f"uniform noise, the anchor exponentially against them: by {RARITY['rare']:g} nats over the range (rare), or by "
    f"{RARITY['common']:g} (common), with normal noise; r_max known.",
    f"Simulated: {PROPOSALS} proposals a step and context, shown where each step should accept 10 of them or more.",
    "One step never needs more than 1/G_a(best) proposals, however large R/beta: a ladder pays for rare completions.",
    f"Fit errors: normal of {ERROR:g} nats an action, drawn anew for each step, on common completions; `pairs` fits "
    f"{PAIRS:,} labelled pairs of accepted draws in each step by the sigmoid loss against the original anchor. "
    "Re-weighting by exact ratios undoes all of it. Why the error of `pairs` changes with N is not measured here; in a "
    "first version with a reward range of 1 (less signal in a label) it was some 3 nats and flat from N = 4 on.",
)

_ERRORS: Final = ("anchored", "imitated", "pairs")


class Measured(NamedTuple):
    """Values (P, R) over STEPS for one kind of problem."""

    proposals: Tensor
    simulated: Tensor
    least: Tensor
    floor: Tensor

    @property
    def countable(self) -> list[int]:
        """Which numbers of steps are simulated with at least 10 acceptances to be expected in every step."""
        return [n for n in range(len(STEPS)) if float(self.least[n].min()) * PROPOSALS >= 10]

    @property
    def best(self) -> int:
        """Which number of steps needs the fewest proposals."""
        return int(self.proposals.mean(-1).argmin())

    @property
    def checks(self) -> dict[int, Estimate]:
        """Simulated proposals over exact ones, where they can be counted."""
        return {n: _words.ratio_cell(self.simulated[n], self.proposals[n]) for n in self.countable}


Kinds = dict[str, Measured]


def run(replicates: int, seed: int, progress: Progress) -> ExperimentResult:
    """Proposals, acceptance, and the error of the law returned, over the number of steps."""
    drawn = map_replicates(_chunk, replicates, seed, chunk=25, progress=progress)
    kinds = {kind: Measured(*(drawn[f"{kind}/{name}"].T for name in Measured._fields)) for kind in RARITY}
    errors = {name: drawn[name].T for name in _ERRORS}
    slopes = tuple(
        fit_slope(STEPS[1:], errors[name][1:], name=f"KL of the law returned, {name}", claimed=None) for name in _ERRORS
    )
    held = all(bool((one.least >= one.floor - 1e-12).all()) for one in kinds.values())
    agreement: Agreement = "agrees" if held else "misses the claim"
    return ExperimentResult(
        name="multistep",
        title=TITLE,
        question="Is it cheaper to sample the optimum by many small tilts than by one large one?",
        claim="N steps accept at least exp(-R/(N beta)) of the proposals in each step, plain rejection exp(-R/beta) [IT].",
        finding=_finding(kinds, agreement),
        agreement=agreement,
        panels=_panels(kinds, errors),
        table=_table(kinds),
        slopes=slopes,
        settings={
            "replicates": replicates,
            "seed": seed,
            "steps": list(STEPS),
            "actions": ACTIONS,
            "reward_range": REWARD_RANGE,
            "beta": BETA,
            "radius": RADIUS,
            "error": ERROR,
            "proposals": PROPOSALS,
            "pairs": PAIRS,
        },
        notes=(
            *_comparisons(kinds, slopes),
            *NOTES,
        ),
    )


def _chunk(generator: torch.Generator, size: int) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    for kind, rarity in RARITY.items():
        bandit = _problem(generator, size, rarity)
        paths = [enumerate_steps(bandit, steps) for steps in STEPS]
        results[f"{kind}/proposals"] = torch.stack([path.proposals.mean(-1) for path in paths], -1)
        results[f"{kind}/least"] = torch.stack([path.acceptance.amin((-2, -1)) for path in paths], -1)
        results[f"{kind}/simulated"] = torch.stack([_simulated(bandit, steps, generator, size) for steps in STEPS], -1)
        results[f"{kind}/floor"] = torch.stack([least_acceptance(bandit, steps).amin(-1) for steps in STEPS], -1)
    off: dict[str, list[Tensor]] = {name: [] for name in _ERRORS}
    for steps in STEPS:
        noise = ERROR * torch.randn(size, steps - 1, 2, ACTIONS, generator=generator, dtype=torch.float64)
        for name, anchored in (("anchored", True), ("imitated", False)):
            law = enumerate_steps(bandit, steps, errors=noise, anchored=anchored).accepted[..., -1, :, :]
            off[name].append(kl(law, reverse_optimum(bandit)).mean(-1))
        off["pairs"].append(_returned(bandit, steps, generator, size))
    return results | {name: torch.stack(values, -1) for name, values in off.items()}


def _problem(generator: torch.Generator, size: int, rarity: float) -> FiniteBandit:
    shape = (size, 2, ACTIONS)
    noise = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    quality = (torch.linspace(0, 1, ACTIONS, dtype=torch.float64) + 0.1 * noise).clamp(0, 1)
    quality[..., 0], quality[..., -1] = 0.0, 1.0
    jitter = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return FiniteBandit.tabular(REWARD_RANGE * quality, (jitter - rarity * quality).log_softmax(-1).unsqueeze(-1), beta=BETA)


def _simulated(bandit: FiniteBandit, steps: int, generator: torch.Generator, size: int) -> Tensor:
    """Proposals (R,) for one accepted completion a step, the mean of the contexts: from n proposals and A accepted, each step
    contributes (n + 1)/(A + 1), whose mean is 1/p up to a factor 1 - (1 - p)^(n + 1)."""
    run = simulate_steps(bandit, steps, generator, proposals=PROPOSALS, replicates=size)
    return ((PROPOSALS + 1) / (run.accepted.sum(-1) + 1)).sum(-2).mean(-1)


def _returned(bandit: FiniteBandit, steps: int, generator: torch.Generator, size: int) -> Tensor:
    """KL (R,) from the law that the last step accepts, exactly, to the optimum, the step before it fitted to pairs."""
    optimum = reverse_optimum(bandit)
    if steps == 1:
        return torch.zeros(size, dtype=torch.float64)
    fitted: list[Tensor] = []
    fit = fit_pairs(bandit, steps, generator, pairs=PAIRS, radius=RADIUS)
    simulate_steps(
        bandit,
        steps,
        generator,
        proposals=PROPOSALS,
        replicates=size,
        fit=lambda accepted, step: fitted.append(fit(accepted, step)) or fitted[-1],  # type: ignore[func-returns-value]
    )
    law = (fitted[-1] + bandit.rewards / (steps * bandit.beta)).log_softmax(-1)
    return kl(law, optimum).mean(-1)


def _panels(kinds: Kinds, errors: dict[str, Tensor]) -> tuple[Panel, ...]:
    exact = (_linear.curve(f"{kind}, exact", STEPS, one.proposals) for kind, one in kinds.items())
    simulated = (
        _linear.curve(f"{kind}, simulated", [STEPS[n] for n in one.countable], one.simulated[one.countable])
        for kind, one in kinds.items()
        if one.countable
    )
    least = (_linear.curve(kind, STEPS, one.least) for kind, one in kinds.items())
    returned = (_linear.curve(name, STEPS[1:], errors[name][1:]) for name in _ERRORS)
    return (
        Panel(
            "Total proposals for one accepted completion a step",
            "steps N",
            "proposals",
            (*exact, *simulated, Curve("worst case", STEPS, list(map(_worst, STEPS)))),
        ),
        Panel(
            "Smallest acceptance of any step and prompt",
            "steps N",
            "acceptance",
            (*least, Curve("claimed floor", STEPS, list(map(_floor, STEPS)))),
        ),
        Panel(
            "Law returned by policies fitted with error",
            "steps N",
            "KL to the optimum",
            tuple(returned),
            (Guide(1.0, "errors that add up"),),
        ),
    )


def _table(kinds: Kinds) -> Table:
    columns = ("good completions", "steps", "proposals", "simulated / exact", "least acceptance", "claimed floor", "worst case")
    rows: list[tuple[Cell, ...]] = []
    for kind, one in kinds.items():
        checks = one.checks
        for n, steps in enumerate(STEPS):
            proposals, least = _words.mean_cell(one.proposals[n]), _words.mean_cell(one.least[n])
            rows.append((kind, steps, proposals, checks.get(n), least, _floor(steps), _worst(steps)))
    return Table(columns, tuple(rows))


def _finding(kinds: Kinds, agreement: Agreement) -> str:
    return _words.finding(
        "acceptance of at least exp(-R/(N beta)) a step, so about N exp(R/(N beta)) proposals in all",
        f"at R/beta = {RANGE_OVER_BETA:.0f}, where the floor {'holds in every step' if agreement == 'agrees' else 'is broken'} "
        f"and one step needs {_saved(kinds['rare'])} where good completions are rare and {_saved(kinds['common'])} where they "
        "are common",
        _words.outcome(agreement),
    )


def _comparisons(kinds: Kinds, slopes: Sequence[SlopeFit]) -> list[str]:
    """What the verdict does not count: simulation beside enumeration, and fit errors."""
    off = max((abs(check.value - 1) for one in kinds.values() for check in one.checks.values()), default=math.nan)
    anchored, imitated, pairs = map(_words.shown, slopes)
    return [
        f"Simulated proposals are within {off:.1%} of the enumerated ones.",
        f"With fit errors the law returned is off by a KL that changes with the number of steps at slope {anchored} when fits "
        f"are anchored, {imitated} when each imitates the last, and {pairs} when each is fitted to pairs of the latest draws "
        "alone.",
    ]


def _saved(one: Measured) -> str:
    """Proposals of one step over those of the best number of steps."""
    if one.best == 0:
        return "the fewest proposals of all numbers tried"
    saved = _words.ratio_cell(one.proposals[0], one.proposals[one.best])
    times = _words.told(saved, ",.3g" if saved.high < 1000 else ",.0f")
    return f"{times} times the proposals of {STEPS[one.best]} (the best number tried)"


def _worst(steps: int) -> float:
    """N exp(R/(N beta)): about the proposals that N steps can need."""
    return steps * math.exp(RANGE_OVER_BETA / steps)


def _floor(steps: int) -> float:
    """exp(-R/(N beta)): the claimed least acceptance of a step."""
    return math.exp(-RANGE_OVER_BETA / steps)


EXPERIMENT = Experiment("multistep", TITLE, run, default_replicates=100, seconds=28.0)
