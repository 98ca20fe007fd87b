"""Means over pairs for the log: sums of named values, kept until a line is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


class PairMeans:
    """What is averaged over pairs, for each mode ("train", "eval") under names of its own.

    An evaluation counts each pair once. Training counts pairs as often as they are trained on: those that fill up the last
    batch of an epoch, where processes share it, twice.
    """

    def __init__(self, columns: Mapping[str, Sequence[str]]) -> None:
        self.columns = dict(columns)
        self._sums: dict[str, Tensor] = {}
        for mode in self.columns:
            self.reset(mode)

    def reset(self, mode: str) -> None:
        """Forget what was added."""
        self._sums[mode] = torch.zeros(len(self.columns[mode]) + 1)

    def add(self, mode: str, values: Tensor) -> None:
        """Add the values (B, M) of B pairs, one column a name."""
        sums = values.detach().sum(0).cpu().double()
        self._sums[mode] = self._sums[mode] + torch.cat([sums, sums.new_tensor([len(values)])])

    def take(self, mode: str, over_processes: Callable[[Tensor], Tensor] | None = None) -> tuple[dict[str, float], int]:
        """The means since the last call, and of how many pairs; no name where there were none.

        `over_processes` adds up the sums (M + 1,) of all processes.
        """
        sums = self._sums[mode]
        self.reset(mode)
        *totals, count = (over_processes(sums) if over_processes is not None else sums).tolist()
        means = {name: total / count for name, total in zip(self.columns[mode], totals, strict=True)} if count else {}
        return means, round(count)
