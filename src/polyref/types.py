"""The values that pass between rooms, each with the shape of every field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypedDict

if TYPE_CHECKING:
    from torch import Tensor


SIMPLEX_TOLERANCE: Final = 1e-6 + 1e-12
"""Weights are on the simplex when each is at least 0 and their sum is within this of 1, in data as in a reference set.

Thirds written to six decimals, which sum to 0.999999, are: the last part is for the rounding of such a sum.
"""


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: str
    content: str


Text = str | tuple[Message, ...]
"""Plain text, or the turns of a conversation."""


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """One preference pair. `prompt`, `chosen` and `rejected` are all strings or all message tuples.

    `chosen_probability` is P(chosen preferred) in [0, 1] (a vote share or a judge's probability; None means 1);
    `reference_weights` is one simplex vector over the reference set for this prompt; `margin` (in nats of implied reward) is
    subtracted from the implied reward difference. A completion whose `*_ended` is false was cut where it stops: an atom
    without the end factor (None means it ended). `source` and `row` (1-based) say where the pair came from.

    An auxiliary preference model g adds `predicted_probability`, its P(chosen preferred) of this pair, and M >= 1 auxiliary
    pairs of completions of the same prompt, drawn as data pairs are: `auxiliary_1`, `auxiliary_2` (M,) and
    `auxiliary_probability` (M,), its P(auxiliary_1 preferred). All four, or none.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    chosen_probability: float | None = None
    reference_weights: tuple[float, ...] | None = None
    margin: float | None = None
    chosen_ended: bool | None = None
    rejected_ended: bool | None = None
    predicted_probability: float | None = None
    auxiliary_1: tuple[Text, ...] | None = None
    auxiliary_2: tuple[Text, ...] | None = None
    auxiliary_probability: tuple[float, ...] | None = None
    source: str = "memory"
    row: int = 0


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """Token ids of one pair, made once and shared by the cache and the trainer.

    The model input for a completion is `prompt_ids + completion_ids`; only completion positions are scored. A completion that
    was cut, when it was drawn or at the maximum length, has `*_cut` true and carries no end-of-turn token: it is an atom
    without the end factor.
    `auxiliary_ids` are the 2M completions of the auxiliary pairs, the first and the second of each in turn.
    """

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    chosen_cut: bool = False
    rejected_cut: bool = False
    auxiliary_ids: tuple[tuple[int, ...], ...] = ()
    auxiliary_cut: tuple[bool, ...] = ()

    @property
    def completions(self) -> tuple[tuple[int, ...], ...]:
        """Chosen, rejected, and the auxiliary ones: 2 + 2M."""
        return (self.chosen_ids, self.rejected_ids, *self.auxiliary_ids)

    @property
    def cuts(self) -> tuple[bool, ...]:
        """Which of the completions were cut."""
        return (self.chosen_cut, self.rejected_cut, *self.auxiliary_cut)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """R rows of one prompt followed by its C completions, padded on the right to L tokens.

    `input_ids`, `position_ids`, `segment_ids`: (R, L) int64. Segment 0 is the prompt, 1..C the completions, -1 padding;
    positions restart after the prompt for every completion. The N scored tokens, in row order, are `target_ids` (N,); each is
    predicted at flat position `source_index` (N,) of the R * L grid and belongs to completion `completion_index` (N,) of the R
    * C.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    source_index: Tensor
    target_ids: Tensor
    completion_index: Tensor
    completions: int


@dataclass(frozen=True, slots=True)
class LogProbs:
    """Sequence log-probabilities in nats. `total` (R, C) sums over completion tokens; `tokens` (R, C) counts them."""

    total: Tensor
    tokens: Tensor
