"""Layers of a key-value cache with room for tokens and rows to come, which are put there, not beside a copy of all before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard, cast

from torch import Tensor
from transformers.cache_utils import DynamicLayer

_SPARE = 64
"""Columns made ahead: what is there is copied once for so many tokens."""


class RoomyLayer(DynamicLayer):
    """`keys` and `values` (R, H, L, D) begin larger tensors, unless somebody else put others there."""

    def __init__(self) -> None:
        super().__init__()
        self._roomy: tuple[Tensor | None, Tensor | None] = (None, None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all columns, those of the new tokens (R, H, T, D) behind the others."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._put(*(_appended(*some) for some in zip(self._kept, self._roomy, (key_states, value_states), strict=True)))
        return self._kept

    def move(self, moves: Sequence[tuple[int, int]], rows: int) -> None:
        """Put row a where row b is for each (a, b) of `moves`, and keep the first `rows`, in place."""
        if self.is_initialized:
            for kept in self._kept:
                for a, b in moves:
                    kept[b] = kept[a]
            self.keys, self.values = (kept[:rows] for kept in self._kept)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows, which let go of the room that they were in."""
        super().batch_select_indices(indices)
        self._roomy = (None, None)

    def join(self, other: RoomyLayer) -> None:
        """Add the rows of `other` behind these, the shorter of both padded in front."""
        if self.is_initialized:
            self._put(*(_joined(*some) for some in zip(self._kept, self._roomy, other._kept, strict=True)))

    @property
    def _kept(self) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], (self.keys, self.values))

    def _put(self, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor]) -> None:
        (self.keys, keys_room), (self.values, values_room) = keys, values
        self._roomy = keys_room, values_room


def with_room(layer: Any) -> Any:
    """`layer`, which is still empty, with room if it keeps all that it reads."""
    return RoomyLayer() if type(layer) is DynamicLayer else layer


def _begun(room: Tensor | None, kept: Tensor) -> TypeGuard[Tensor]:
    """Whether `kept` begins `room`, where more can then be put beside it."""
    return room is not None and kept.data_ptr() == room.data_ptr()


def _make(like: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """So many rows and columns, and the larger tensor that they begin."""
    room = like.new_empty(rows, like.shape[1], columns + _SPARE, like.shape[-1])
    return room[..., :columns, :], room


def _appended(kept: Tensor, room: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
    """`kept` with `new` behind it, and the tensor that they begin."""
    before = kept.shape[-2] if kept.numel() else 0
    length = before + new.shape[-2]
    if not _begun(room, kept) or length > room.shape[-2]:
        _, room = _make(new, len(new), length)
        if before:
            room[..., :before, :] = kept
    room[: len(new), :, before:length] = new
    return room[: len(new), :, :length], room


def _joined(first: Tensor, room: Tensor | None, second: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of both, and the tensor that they begin."""
    rows, columns = len(first) + len(second), max(first.shape[-2], second.shape[-2])
    if _begun(room, first) and rows <= len(room) and columns == first.shape[-2]:
        found = room[:rows, :, :columns]
    else:
        found, room = _make(first, rows, columns)
        _pad(found[: len(first)], first)
    _pad(found[len(first) :], second)
    return found, room


def _pad(into: Tensor, some: Tensor) -> None:
    padding = into.shape[-2] - some.shape[-2]
    into[..., :padding, :] = 0
    into[..., padding:, :] = some
