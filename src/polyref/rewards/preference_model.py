"""Preference models g(x, y1, y2) = P(y1 preferred) from what is at hand: a reward, annotators' votes, other preference models.

Each is antisymmetric by construction, g(x, b, a) = 1 - g(x, a, b), the one property that an auxiliary model needs for the
variance-reduced and the doubly robust objective to be right whatever else it gets wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from polyref.data.sources import prompt_key
from polyref.errors import ConfigError, DataError
from polyref.rewards.protocols import PreferenceModel, Reward, check_probabilities, check_rewards, check_rows, rows_named
from polyref.types import PreferenceRecord, Text


@dataclass(frozen=True, slots=True)
class NamedPreferences:
    """A function of (prompts, first, second) under a name: a `PreferenceModel`. What it returns is checked on every call."""

    name: str
    function: Callable[[Sequence[Text], Sequence[Text], Sequence[Text]], Tensor]

    def __call__(self, prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text]) -> Tensor:
        """(N,) float64 in [0, 1]. InputError for lists of unequal length, ModelError for what is no probability."""
        rows = check_rows(self.name, prompts, first, second)
        return check_probabilities(self.function(prompts, first, second), rows, self.name)


def probability_of(log_odds: Tensor) -> Tensor:
    """s(d) for log-odds d (...), in float64, with s(-d) = 1 - s(d) to the last bit; s(d) alone is that to rounding only."""
    wide = log_odds.to(torch.float64)
    larger = torch.sigmoid(wide.abs())
    return torch.where(wide >= 0, larger, 1 - larger)


def from_reward(reward: Reward, temperature: float | None = None, name: str | None = None) -> PreferenceModel:
    """g = s((r(x, y1) - r(x, y2))/T), Bradley-Terry in `reward`, whose units `temperature` T > 0 has.

    T is by default the `temperature` that a reward model was calibrated with, through a cache too, and 1 for any other reward;
    a larger one makes an overconfident reward less sure. Infinitely sure is no T: ConfigError. Each call asks `reward` for both
    completions of every row at once.
    """
    known: float | None = getattr(reward, "temperature", None)
    divisor = temperature if temperature is not None else 1.0 if known is None else known
    if not 0 < divisor < float("inf"):
        raise ConfigError(f"temperature is {divisor}", where="from_reward", fix="give a number above 0")

    def preferences(prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text]) -> Tensor:
        with rows_named([f"row {row + 1}" for row in range(len(prompts))] * 2):
            both = check_rewards(reward([*prompts, *prompts], [*first, *second]), 2 * len(prompts), reward.name)
        of_first, of_second = both.tensor_split(2)
        return probability_of((of_first - of_second) / divisor)

    return NamedPreferences(name or f"difference of {reward.name}", preferences)


def from_votes(records: Iterable[PreferenceRecord], name: str = "votes") -> PreferenceModel:
    """g is the share of annotators who preferred the first completion, looked up by the texts of prompt and pair.

    A record says `chosen_probability`, 1 where it is None; of a pair that several records hold, in either order, the mean
    counts. A completion beside itself has 1/2. A pair that nobody voted on is refused with its row (DataError): no vote is
    made up. A share that holds the very vote used as the label is not independent of it: leave that vote out.
    """
    votes: dict[tuple[str, str, str], list[float]] = {}
    for record in records:
        share = 1.0 if record.chosen_probability is None else record.chosen_probability
        pair, in_order = _unordered(record.prompt, record.chosen, record.rejected)
        votes.setdefault(pair, []).append(share if in_order else 1 - share)
    shares = {pair: fmean(of_pair) for pair, of_pair in votes.items()}

    def share_of(row: int, prompt: Text, first: Text, second: Text) -> float:
        if first == second:
            return 0.5
        pair, in_order = _unordered(prompt, first, second)
        if (found := shares.get(pair)) is None:
            fix = "give the votes on every pair, or a preference model that generalises"
            raise DataError("nobody voted on this pair", where=f"{name}, row {row}", fix=fix)
        return found if in_order else 1 - found

    def preferences(prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text]) -> Tensor:
        rows = enumerate(zip(prompts, first, second, strict=True), 1)
        return torch.tensor([share_of(row, *texts) for row, texts in rows], dtype=torch.float64)

    return NamedPreferences(name, preferences)


def from_ensemble(members: Sequence[PreferenceModel], name: str | None = None) -> PreferenceModel:
    """g is the mean of the members' probabilities. ConfigError without a member."""
    if not members:
        raise ConfigError("an ensemble without members", where="from_ensemble", fix="give at least one preference model")

    def preferences(prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text]) -> Tensor:
        each = [check_probabilities(member(prompts, first, second), len(prompts), member.name) for member in members]
        return torch.stack(each).mean(0)

    return NamedPreferences(name or f"mean of {', '.join(member.name for member in members)}", preferences)


def _unordered(prompt: Text, first: Text, second: Text) -> tuple[tuple[str, str, str], bool]:
    """A key of the pair whatever its order, and whether the order given is that of the key."""
    of_prompt, a, b = prompt_key(prompt), prompt_key(first), prompt_key(second)
    return ((of_prompt, a, b), True) if a <= b else ((of_prompt, b, a), False)
