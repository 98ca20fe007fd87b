"""What a reward and a preference model are, and the checks that every number of theirs passes. Both are plain callables.

A function or an object with a `name` and the call below is one; nothing is inherited. Rows are counted from 1 in messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from polyref.errors import DataError, InputError, ModelError
from polyref.types import Text


class Reward(Protocol):
    """r(x, y): one number a completion, in units of its own. What it gives a row does not depend on the other rows."""

    @property
    def name(self) -> str: ...

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        """N prompts and a completion of each -> (N,) float64 on the CPU, finite, without gradient; N may be 0."""
        ...


class PreferenceModel(Protocol):
    """g(x, y1, y2), the probability that `first` is preferred. Antisymmetric by construction: g(x, b, a) = 1 - g(x, a, b)."""

    @property
    def name(self) -> str: ...

    def __call__(self, prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text]) -> Tensor:
        """N prompts and two completions of each -> (N,) float64 on the CPU, in [0, 1], without gradient; N may be 0."""
        ...


def check_rows(who: str, prompts: Sequence[Text], *completions: Sequence[Text]) -> int:
    """N, the number of prompts. InputError unless every list of completions has as many."""
    for texts in completions:
        if len(texts) != len(prompts):
            what = f"{len(texts)} completions for {len(prompts)} prompts"
            raise InputError(what, where=who, fix="give one completion a prompt")
    return len(prompts)


@contextmanager
def rows_named(rows: Sequence[str]) -> Iterator[None]:
    """A DataError or ModelError of the body whose place ends in "row N", N of `rows`, says the N-th of them instead."""
    try:
        yield
    except (DataError, ModelError) as error:
        place = re.fullmatch(r"(?:(.*), )?row (\d+)", error.where or "")
        if place is None or not 1 <= int(place[2]) <= len(rows) or type(error) not in (DataError, ModelError):
            raise
        where = ", ".join(part for part in (place[1], rows[int(place[2]) - 1]) if part)
        raise type(error)(error.what, where=where, fix=error.fix) from error


def check_rewards(values: Tensor | Sequence[float], n: int, who: str) -> Tensor:
    """`values` as (n,) float64 on the CPU without gradient. ModelError, naming the row, unless all are finite numbers."""
    return _check(values, n, who, "reward", -torch.inf, torch.inf)


def check_probabilities(values: Tensor | Sequence[float], n: int, who: str) -> Tensor:
    """As `check_rewards`, for numbers in [0, 1]."""
    return _check(values, n, who, "probability", 0.0, 1.0)


def _check(values: Tensor | Sequence[float], n: int, who: str, word: str, low: float, high: float) -> Tensor:
    try:
        given = values.detach().cpu() if isinstance(values, Tensor) else values
        checked = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ModelError(f"gave no numbers: {error}", where=who, fix=f"return one {word} a row") from error
    if checked.shape != (n,):
        what = f"gave shape {tuple(checked.shape)} for {n} rows"
        raise ModelError(what, where=who, fix=f"return one {word} a row")
    bad = ~(checked.isfinite() & (checked >= low) & (checked <= high))
    if bad.any():
        row = int(bad.nonzero()[0])
        fix = "a probability is in [0, 1]" if high == 1 else "a reward is a finite number"
        raise ModelError(f"gave {checked[row].item()} as {word}", where=f"{who}, row {row + 1}", fix=fix)
    return checked
