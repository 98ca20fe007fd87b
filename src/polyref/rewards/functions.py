"""Plain functions as rewards: one of a prompt and a completion, or one of whole lists of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polyref.rewards.protocols import check_rewards, check_rows
from polyref.types import Text

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class NamedReward:
    """A function of (prompts, completions) under a name: a `Reward`. What it returns is checked on every call.

    `fingerprint` is a text that changes whenever the function would give the same texts another value; `cached` needs one.
    """

    name: str
    function: Callable[[Sequence[Text], Sequence[Text]], Sequence[float] | Tensor]
    fingerprint: str | None = None

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        """(N,) float64, finite. InputError for lists of unequal length, ModelError for what is no finite number."""
        rows = check_rows(self.name, prompts, completions)
        return check_rewards(self.function(prompts, completions), rows, self.name)


def from_function(function: Callable[[Text, Text], float], name: str, fingerprint: str | None = None) -> NamedReward:
    """The reward that `function` gives each prompt and completion, taken as the data has them: strings or message tuples."""

    def rewards(prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        return [function(*row) for row in zip(prompts, completions, strict=True)]

    return NamedReward(name, rewards, fingerprint)


def plain_text(text: Text) -> str:
    """A string as it is, or the contents of the messages with an empty line between them."""
    return text if isinstance(text, str) else "\n\n".join(message["content"] for message in text)
