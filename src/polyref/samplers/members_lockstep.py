"""Several members that read the same completions, each after prompts of its own, their caches kept in step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from polyref.data.encode import Ids
from polyref.samplers.members import Member
from polyref.samplers.rows import Rows


class LockStep:
    """R completions under K members: `law` (R, V, K) is log pi_i(next token | prompt, completion so far), float64.

    Members with the same weights and adapter go through one forward pass, one's rows after another's. V is the smallest
    vocabulary: of what is beyond it, some member gives nothing.
    """

    def __init__(self, members: Sequence[Member], prompts: Sequence[Sequence[Ids]]) -> None:
        """A row for each of `prompts` (R, K), the tokens that each member reads before the completion."""
        groups: dict[tuple[int, str | None], list[int]] = {}
        for place, member in enumerate(members):
            groups.setdefault((id(member.model), member.adapter), []).append(place)
        self._members, self._groups, self._size = members, list(groups.values()), len(prompts)
        self._rows: list[Rows] = []
        for group in self._groups:
            first = members[group[0]]
            with first.switched() as model:
                self._rows.append(Rows.read(model, [row[place] for place in group for row in prompts], first.label))

    @property
    def law(self) -> Tensor:
        """(R, V, K)."""
        laws: list[Tensor | None] = [None] * len(self._members)
        for group, rows in zip(self._groups, self._rows, strict=True):
            parts = rows.logits.to(torch.float64).log_softmax(-1).view(len(group), self._size, -1)
            for place, part in zip(group, parts, strict=True):
                laws[place] = part.to(self._rows[0].logits.device)
        found = [law for law in laws if law is not None]
        return torch.stack([law[:, : min(law.shape[1] for law in found)] for law in found], -1)

    def pick(self, rows: Sequence[int]) -> LockStep:
        """These rows, perhaps in another order or several times over."""
        picked = object.__new__(LockStep)
        picked._members, picked._groups, picked._size = self._members, self._groups, len(rows)
        picked._rows = [
            mine.pick([g * self._size + row for g in range(len(group)) for row in rows])
            for group, mine in zip(self._groups, self._rows, strict=True)
        ]
        return picked

    def step(self, tokens: Tensor) -> None:
        """Read one more token (R,) a row."""
        for group, rows in zip(self._groups, self._rows, strict=True):
            with ExitStack() as stack:
                stack.enter_context(self._members[group[0]].switched())
                rows.step(tokens.to(rows.mask.device).repeat(len(group)))
