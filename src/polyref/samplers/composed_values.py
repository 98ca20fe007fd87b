"""What samplers of compositions take and give: a prompt made ready, samples with log-weights, and how they came about."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from polyref.data.encode import Ids
from polyref.objectives.metrics import Interval
from polyref.samplers.engine import Tally
from polyref.samplers.members import Member
from polyref.samplers.weights import effective_size
from polyref.types import Text


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion: its tokens, in those of the member that drew it, with the one that ends it if it `ended`; its text without.

    `logps` (K,) is log pi_i(y|x) of every member in nats, NaN of those without weight for this prompt: they were not asked.
    `log_weight` is 0 where samples follow the composition itself; see `Drawn`.
    """

    token_ids: Ids
    text: str
    ended: bool
    logps: tuple[float, ...]
    log_weight: float = 0.0


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was drawn for a prompt, and what it took.

    `samples` follow the composition: exactly if `exact`, and independently unless the budget decided how many there are (see
    `note`); else as weighted ones, whose sum over exp(log_weight) f(y) / `proposals` has mean F_a E f(y). `log_mass` is the log
    of what the composition sums to before it is normalised, with a 95% interval: log F_a for a geometric one. `calls` counts
    completion tokens passed through members; the prompts' own, read once a batch, come on top. `note` says what is missing, ""
    where nothing is.
    """

    method: str
    samples: tuple[Sample, ...]
    proposals: int
    accepted: int
    log_mass: Interval
    calls: int
    exact: bool
    note: str = ""

    @property
    def acceptance(self) -> float:
        """Share of proposals that became samples; NaN of none."""
        return self.accepted / self.proposals if self.proposals else math.nan

    @property
    def ess(self) -> float:
        """(sum w)^2 / sum w^2 over the samples: their number where they weigh alike."""
        return float(effective_size(torch.tensor([sample.log_weight for sample in self.samples], dtype=torch.float64)))

    @property
    def mass(self) -> Interval:
        """exp of `log_mass`, at most 1. Its mean is the unbiased estimate, where there is one; `log_mass` is biased low."""
        return Interval(*(math.exp(value) for value in self.log_mass))


def log_interval(interval: Interval) -> Interval:
    """The logs of an estimate and its interval, -inf of 0 and NaN of NaN."""
    return Interval(*(math.log(value) if value > 0 else -math.inf if value == 0 else math.nan for value in interval))


class Task(NamedTuple):
    """A prompt for those members that have weight for it: `ids` (K,) the tokens each reads first, `weights` (K,), of sum 1.

    `key` and the seed make its streams of random numbers.
    """

    prompt: Text
    ids: tuple[Ids, ...]
    weights: tuple[float, ...]
    key: str


class Plan(NamedTuple):
    """What is asked of every prompt alike. `fixed`: n proposals are made, instead of as many as n acceptances take.

    `by_text`: members have different tokenizers, and only their canonical encodings of texts that end count. `tally`, if any,
    counts completions as they are done: accepted ones or particles, at most n a prompt, or the proposals of a `fixed` number.
    """

    n: int
    max_new_tokens: int
    seed: int
    batch_size: int
    fixed: bool
    by_text: bool
    tally: Tally | None = None


Method = Callable[[Sequence[Member], Sequence[Task], Sequence[int], Plan], list[Drawn]]
"""(members (K,), tasks (P,), the most `calls` of each (P,), plan) -> (P,)."""


def uniforms(plan: Plan, task: Task, what: str, draw: int, count: int) -> np.ndarray:
    """(count,) numbers in [0, 1) of one draw's own stream: no other draw, prompt or batch changes them."""
    key = xxhash.xxh3_128_intdigest(f"{plan.seed} {what} {draw} {task.key}".encode())
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def common_ends(members: Sequence[Member]) -> frozenset[int]:
    """The tokens that end a completion for members with one tokenizer: those of any of them."""
    return frozenset().union(*(member.ends for member in members))


def decoded(member: Member, tokens: Sequence[int], ended: bool) -> str:
    """The text of completion `tokens`, without the token that ends it."""
    kept = list(tokens[:-1] if ended else tokens)
    return str(member.encoder.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))
