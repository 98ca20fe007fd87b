"""Rewards kept on disk, addressed by content: by what gives the reward, and by the texts of prompt and completion.

The means are those of `polyref.scoring.cache`: immutable parts, one writer at a time, a kill loses seconds.

    FOLDER/<reward digest>/key.json                what gives the reward, for people
    FOLDER/<reward digest>/part-<xxh3>.parquet     rows (key, reward)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from polyref.errors import ConfigError
from polyref.rewards.protocols import Reward, check_rewards, check_rows, rows_named
from polyref.scoring.cache import ScoreCache
from polyref.types import Text

if TYPE_CHECKING:
    from torch import Tensor

_LAYOUT = "polyref rewards 1"  # part of every digest: a change of what is stored starts a new cache

Progress = Callable[[str, int, int], None]
"""Called as progress(name, done, total), in completions."""


class StoredReward(NamedTuple):
    """A reward, in its own units."""

    reward: float


@dataclass(frozen=True, slots=True)
class RewardKey:
    """All that a reward depends on besides the texts: a fingerprint of weights, settings, data, whatever it is made of."""

    fingerprint: str

    @property
    def digest(self) -> str:
        """xxh3 128-bit checksum, in hexadecimal."""
        return xxhash.xxh3_128_hexdigest(json.dumps([_LAYOUT, self.fingerprint]).encode())


def text_key(prompt: Text, completion: Text) -> bytes:
    """xxh3 128-bit checksum of both texts and of where one ends, 16 bytes; a string and a message that says it differ."""
    return xxhash.xxh3_128_digest(json.dumps([prompt, completion], sort_keys=True).encode())


class CachedReward:
    """`reward` through a cache; a `Reward` itself, of the same name and values. `hits`, `misses`: completions found and scored.

    Each text is scored once, in blocks of `rows_at_once` that are kept as they come, so a killed scoring goes on where it was,
    and another process with the same reward waits and then finds what this one scored.
    """

    def __init__(self, reward: Reward, folder: Path, fingerprint: str, rows_at_once: int, progress: Progress | None) -> None:
        self.reward, self.name, self.fingerprint = reward, reward.name, fingerprint
        self.hits = self.misses = 0
        self._cache, self._key = ScoreCache(folder, StoredReward), RewardKey(fingerprint)
        self._rows_at_once, self._progress = rows_at_once, progress

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        """(N,) float64. What `reward` raises, after what it scored before was kept; RunFolderError for a cache not writable."""
        rows = check_rows(self.name, prompts, completions)
        keys = [text_key(*texts) for texts in zip(prompts, completions, strict=True)]
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        found, before = self._cache.lookup(self._key, first), self.misses
        if len(found) < len(first):
            missing = sorted(row for key, row in first.items() if key not in found)
            found |= self._score(missing, keys, prompts, completions)
        self.hits += len(first) - (self.misses - before)
        return check_rewards([found[key].reward for key in keys], rows, self.name)

    @property
    def temperature(self) -> float | None:
        """What a reward model's differences are best divided by, where it is known."""
        known: float | None = getattr(self.reward, "temperature", None)
        return known

    def _score(
        self, rows: Sequence[int], keys: Sequence[bytes], prompts: Sequence[Text], completions: Sequence[Text]
    ) -> dict[bytes, StoredReward]:
        """What `rows` hold, in order; another process may have added some of it while this one waited."""
        with self._cache.writer(self._key) as writer:
            found = writer.known(keys[row] for row in rows)
            missing = [row for row in rows if keys[row] not in found]
            for start in range(0, len(missing), self._rows_at_once):
                block = missing[start : start + self._rows_at_once]
                with rows_named([f"row {row + 1}" for row in block]):
                    rewards = self.reward([prompts[row] for row in block], [completions[row] for row in block])
                    values = check_rewards(rewards, len(block), self.name).tolist()
                block_keys = [keys[row] for row in block]
                writer.add(block_keys, values)
                found |= {key: StoredReward(value) for key, value in zip(block_keys, values, strict=True)}
                self.misses += len(block)
                if self._progress is not None:
                    self._progress(self.name, start + len(block), len(missing))
        return found


def cached(
    reward: Reward,
    cache_dir: str | Path,
    *,
    fingerprint: str | None = None,
    rows_at_once: int = 1024,
    progress: Progress | None = None,
) -> CachedReward:
    """`reward` with its values kept in `cache_dir`, for this run and any other.

    `fingerprint` is a text that changes whenever the reward would give the same texts another value; by default the reward's
    own, as rules and reward models have. ConfigError without one: a function's code is nothing to be told apart by.
    """
    fingerprint = fingerprint or getattr(reward, "fingerprint", None)
    if not fingerprint:
        fix = "give one that changes whenever its values would"
        raise ConfigError("has no fingerprint to keep its values under", where=reward.name, fix=fix)
    if rows_at_once < 1:
        raise ConfigError(f"rows_at_once is {rows_at_once}", where="cached", fix="give at least 1")
    return CachedReward(reward, Path(cache_dir), fingerprint, rows_at_once, progress)
