"""What draws completions: one small protocol, and the values that pass through it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from polyref.errors import ConfigError
from polyref.types import Text


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """At most `max_new_tokens` tokens, each from softmax(logits / temperature) cut to the `top_p` likeliest mass.

    A completion that has not ended by then is cut there: an atom without the end factor, part of the support like any other.
    ConfigError for a length below 1, a temperature that is not positive and finite, or top_p outside (0, 1].
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}", fix="give at least 1")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}", fix="give a finite value above 0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}", fix="give a share above 0, at most 1")


@dataclass(frozen=True, slots=True)
class Completion:
    """A drawn completion: its tokens with the one that ends it, if it `ended`, and its text without.

    `logp` is its log-probability in nats under the model itself (temperature 1, every token allowed), `drawn_logp` under the
    law that it was drawn from; they differ only where temperature or top_p do.
    """

    token_ids: tuple[int, ...]
    text: str
    logp: float
    drawn_logp: float
    ended: bool


class Engine(Protocol):
    """Draws `n` completions of each prompt, independent given the seed: one list a prompt, in the order of `prompts`.

    The completions of a prompt depend on its text, its place among equal prompts, the parameters and the seed: not on the
    other prompts, their order, or how many are drawn at once.
    """

    name: str

    def __call__(
        self, prompts: Sequence[Text], n: int, parameters: SamplingParameters, *, seed: int
    ) -> list[list[Completion]]: ...


Progress = Callable[[int, int, float], None]
"""Called as (completions done, completions in all, tokens drawn a second so far)."""

Finished = Callable[[int, list[Completion]], None]
"""Called as (index of a prompt, its completions) as soon as all of them are drawn: what is kept if the rest fails."""


class Tally:
    """Completions that are done of `total`, with their tokens, and who is told of them as they come."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._done, self._tokens, self._start = 0, 0, time.perf_counter()

    def add(self, completions: int, tokens: int) -> None:
        """Count as many more, of `tokens` together, and tell of them if there are any."""
        self._done, self._tokens = self._done + completions, self._tokens + tokens
        if self._progress is not None and completions:
            self._progress(self._done, self._total, self._tokens / max(time.perf_counter() - self._start, 1e-9))


class Collected:
    """The completions of one call of an engine as they come, `n` for each of `prompts` prompts, and who is told of them."""

    def __init__(self, prompts: int, n: int, progress: Progress | None, finished: Finished | None) -> None:
        self._found: list[list[Completion | None]] = [[None] * n for _ in range(prompts)]
        self._lacking, self._tally, self._finished = [n] * prompts, Tally(n * prompts, progress), finished

    def add(self, drawn: Iterable[tuple[int, int, Completion]]) -> None:
        """Take completions as (prompt, which of its draws, completion), and tell of them if there are any."""
        done = tokens = 0
        for prompt, draw, completion in drawn:
            self._found[prompt][draw] = completion
            self._lacking[prompt] -= 1
            done, tokens = done + 1, tokens + len(completion.token_ids)
            if self._finished is not None and not self._lacking[prompt]:
                self._finished(prompt, cast(list[Completion], self._found[prompt]))
        self._tally.add(done, tokens)

    def completions(self) -> list[list[Completion]]:
        """All of them, once all have come."""
        return cast(list[list[Completion]], self._found)
