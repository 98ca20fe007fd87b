"""Data sets that grow: each holds the one before, as one run is seen at every size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from polyref.theory.sampling import draw_wins


def growing_wins(law: Tensor, preference: Tensor, sizes: Sequence[int], generator: torch.Generator) -> Iterator[Tensor]:
    """Wins (R, X, Y, Y) of the first n labelled pairs, for each n of the rising `sizes`; preferences (R, X, Y, Y)."""
    wins, seen = torch.zeros_like(preference), 0
    for pairs in sizes:
        wins, seen = wins + draw_wins(law, preference, pairs - seen, wins.shape[0], generator), pairs
        yield wins
