"""What draws completions: one small protocol, and the values that pass through it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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
