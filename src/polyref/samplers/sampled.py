"""Prompts to samples: drawn from one model or a composition, scored, and tilted by the reward; each with what it took."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from polyref.data.prompt_rows import PromptRow, places_among
from polyref.data.sources import prompt_key
from polyref.errors import ConfigError
from polyref.objectives.metrics import Interval
from polyref.references.compose import check_weights
from polyref.references.reference_set import ReferenceSet
from polyref.rewards.protocols import Reward
from polyref.samplers.auxiliary import as_completion
from polyref.samplers.composed import draw_composed
from polyref.samplers.composed_values import Drawn, Sample
from polyref.samplers.engine import SamplingParameters
from polyref.samplers.members import load_members
from polyref.samplers.references import sampling_policy
from polyref.samplers.tilt import Kept, forward, importance, reject
from polyref.types import Text

TILTS = ("rejection", "importance", "forward")

_WEIGHED = {"importance": importance, "forward": forward}


@dataclass(frozen=True)
class Tilt:
    """exp(r/beta) times the law drawn from: `by` rejection, under `r_max` if a bound is known, or by importance weights.

    By forward: not that, but beta/(lambda - r) times the mixture drawn from, the optimum under forward KL, by weights.
    """

    beta: float
    r_max: float | None = None
    by: str = "rejection"


@dataclass(frozen=True)
class Drawing:
    """How `draws` completions of a prompt are drawn; a `tilt` by rejection keeps at most `n` of them."""

    n: int
    draws: int
    parameters: SamplingParameters
    method: str
    budget: int | None
    batch_size: int
    seed: int
    tilt: Tilt | None = None


@dataclass(frozen=True, eq=False)
class Sampled:
    """What a prompt got: all that was `drawn`, the `rewards` (N,) of its samples, and which of them the tilt `kept`."""

    drawn: Drawn
    rewards: Tensor | None = None
    kept: Kept | None = None

    @property
    def samples(self) -> list[tuple[Sample, float, float | None]]:
        """Each sample, its log-weight, and its reward where there is one."""
        rewards = [None] * len(self.drawn.samples) if self.rewards is None else self.rewards.tolist()
        if self.kept is None:
            return [(sample, sample.log_weight, r) for sample, r in zip(self.drawn.samples, rewards, strict=True)]
        kept = zip(self.kept.indices.tolist(), self.kept.log_weights.tolist(), strict=True)
        return [(self.drawn.samples[i], log_weight, rewards[i]) for i, log_weight in kept]

    @property
    def ess(self) -> float:
        """How many independent draws the samples are worth."""
        return self.drawn.ess if self.kept is None else self.kept.ess

    @property
    def exact(self) -> bool:
        """Whether each sample is a draw of exactly the law asked for; `note` says where a budget decided how many there are."""
        return self.drawn.exact and (self.kept is None or self.kept.exact)

    @property
    def note(self) -> str:
        """What is missing or approximate, in one line."""
        return "; ".join(part for part in (self.drawn.note, self.kept.note if self.kept else "") if part)


Draw = Callable[[Sequence[PromptRow]], list[Drawn]]
"""What draws for some prompts, the same for a prompt whichever others are asked for with it."""


def pooled(references: ReferenceSet, prompts: Sequence[PromptRow]) -> ReferenceSet:
    """`references` with the mean of the weights of `prompts`: positive for the members that any prompt needs.

    ReferenceSetError for weights of a prompt that are off the simplex, or as many as no set of this size has.
    """
    given = [row.reference_weights or references.weights or () for row in prompts]
    rows = check_weights(torch.tensor(given, dtype=torch.float64), members=len(references))
    return replace(references, weights=tuple((rows.mean(0) / rows.mean(0).sum()).tolist()))


def open_draw(references: ReferenceSet, prompts: Sequence[PromptRow], how: Drawing) -> Draw:
    """Load what `prompts` need of `references`: one model alone draws with its engine, unless a method was named."""
    needed = pooled(references, prompts)
    if sum(needed.needed()) == 1 and how.method == "auto":
        return _alone(needed, how)
    members, places = load_members(needed), places_among(prompts)

    def draw(some: Sequence[PromptRow]) -> list[Drawn]:
        weights = [row.reference_weights or references.weights for row in some]
        options: dict[str, Any] = {"method": how.method, "budget": how.budget, "batch_size": how.batch_size}
        options |= {"weights": weights, "places": places(some)}
        return draw_composed(members, [row.prompt for row in some], how.draws, how.parameters, seed=how.seed, **options)

    return draw


def _alone(references: ReferenceSet, how: Drawing) -> Draw:
    """The one member that has weight, at its temperature and top_p; log-probs are its own at 1."""
    longest = how.draws * how.parameters.max_new_tokens
    if how.budget is not None and how.budget < longest:
        what = (
            f"a budget of {how.budget} calls does not cover {how.draws} completions of {how.parameters.max_new_tokens} tokens"
        )
        raise ConfigError(what, fix=f"give at least {longest}, or none")
    (engine,) = sampling_policy(replace(references, composition="arithmetic"), batch_size=how.batch_size).engines
    place = references.needed().index(True)

    def draw(some: Sequence[PromptRow]) -> list[Drawn]:
        found = []
        for completions in engine([row.prompt for row in some], how.draws, how.parameters, seed=how.seed):
            samples = []
            for one in completions:
                logps = tuple(one.logp if at == place else math.nan for at in range(len(references)))
                samples.append(Sample(one.token_ids, one.text, one.ended, logps))
            calls = sum(len(one.token_ids) for one in completions)
            found.append(Drawn("engine", tuple(samples), how.draws, how.draws, Interval(0.0, 0.0, 0.0), calls, True))
        return found

    return draw


def sample(prompts: Sequence[PromptRow], draw: Draw, how: Drawing, reward: Reward | None) -> list[Sampled]:
    """Samples of each prompt, whose coins are its own, also where another is equal to it.

    Errors: those of drawing and of the reward, and of `reject` for a beta or r_max out of range.
    """
    drawn = draw(prompts)
    if reward is None:
        return [Sampled(one) for one in drawn]
    texts: list[tuple[Text, Text]] = [
        (row.prompt, as_completion(row.prompt, one.text))
        for row, some in zip(prompts, drawn, strict=True)
        for one in some.samples
    ]
    values = reward([prompt for prompt, _ in texts], [text for _, text in texts])
    parts = values.split([len(some.samples) for some in drawn])
    seen, found = Counter[tuple[str, tuple[float, ...] | None]](), list[Sampled]()
    for row, some, own in zip(prompts, drawn, parts, strict=True):
        equal = prompt_key(row.prompt), row.reference_weights
        found.append(_tilted(row, seen[equal], some, own, how))
        seen[equal] += 1
    return found


def _tilted(row: PromptRow, place: int, drawn: Drawn, rewards: Tensor, how: Drawing) -> Sampled:
    if how.tilt is None or not drawn.samples:
        return Sampled(drawn, rewards)
    tilt = how.tilt
    if not drawn.exact:  # particles cannot be thinned one by one; their log Z would need an interval that they do not give
        log_weights = torch.tensor([one.log_weight for one in drawn.samples], dtype=torch.float64)
        return Sampled(drawn, rewards, replace(importance(rewards, tilt.beta, log_weights=log_weights), log_z=None))
    if tilt.by in _WEIGHED:
        return Sampled(drawn, rewards, _WEIGHED[tilt.by](rewards, tilt.beta))
    coins = stream(how.seed, "tilt", row.prompt, row.reference_weights, place).random(len(rewards))
    return Sampled(drawn, rewards, reject(rewards, torch.from_numpy(coins), tilt.beta, r_max=tilt.r_max, wanted=how.n))


def stream(seed: int, what: str, prompt: Text, weights: tuple[float, ...] | None = None, place: int = 0) -> np.random.Generator:
    """Random numbers of `what` for one prompt under its own `weights`, after `place` equal ones: others do not change them."""
    own = f"{place} {weights} " if place or weights is not None else ""
    key = xxhash.xxh3_128_intdigest(f"{seed} {what} {own}{prompt_key(prompt)}".encode())
    return np.random.Generator(np.random.Philox(key=key))
