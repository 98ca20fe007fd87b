"""Scores kept on disk, addressed by content: by who scored, and by exactly what was scored.

The address of a sequence log-probability is the scorer (weights, adapter, system prompt, template, tokenizer, dtype) and the
token ids after truncation. Nothing else enters it, so another learning rate, weight vector or output folder finds the same
rows, and another `max_length` can never return a stale one. Rewards are kept by the same means in `polyref.rewards.cached`.

    FOLDER/<scorer digest>/key.json                what the scorer is, for people
    FOLDER/<scorer digest>/part-<xxh3>.parquet     rows (key, logp, tokens); the name carries the checksum of the bytes

Parts are immutable and written atomically; a killed writer loses at most the rows of its last `flush_seconds`.
"""

from __future__ import annotations

import json
import logging
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, get_type_hints, overload

import filelock
import xxhash

from polyref.errors import ModelError, RunFolderError
from polyref.files import remove_temporaries, write_bytes, write_errors

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

_LAYOUT = "polyref log-probabilities 2"  # part of every scorer digest: a change of what is stored starts a new cache
_KEY_BYTES = 16
_ARROW_TYPES = {float: "float64", int: "int32"}

Row = TypeVar("Row", bound=tuple[Any, ...])
"""What is kept under a key: a NamedTuple of float and int, the first of them a score."""


class Key(Protocol):
    """Who scored, as a frozen dataclass; its `digest` covers every field, and the kind of row that is kept."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def digest(self) -> str: ...


@dataclass(frozen=True, slots=True)
class ScorerKey:
    """All that a log-probability depends on besides the token ids; each field is a name or a fingerprint."""

    weights: str
    adapter: str = ""
    system_prompt: str = ""
    template: str = ""
    tokenizer: str = ""
    dtype: str = "float32"

    @property
    def digest(self) -> str:
        """xxh3 128-bit checksum of the fields, in hexadecimal."""
        return xxhash.xxh3_128_hexdigest(json.dumps([_LAYOUT, asdict(self)], sort_keys=True).encode())


class CachedScore(NamedTuple):
    """`logp`: the sum over completion tokens of log p(token | what is before it), in nats. `tokens`: how many there are."""

    logp: float
    tokens: int


def row_key(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> bytes:
    """xxh3 128-bit checksum of both id sequences and of where one ends and the other begins: 16 bytes."""
    numbers = array("q", (len(prompt_ids), *prompt_ids, *completion_ids))
    return xxhash.xxh3_128_digest(numbers.tobytes())


class ScoreCache(Generic[Row]):
    """A folder of scores, log-probabilities unless another `row` is named, shared by any number of processes at once."""

    @overload
    def __init__(self: ScoreCache[CachedScore], folder: str | Path) -> None: ...
    @overload
    def __init__(self, folder: str | Path, row: type[Row]) -> None: ...
    def __init__(self, folder: str | Path, row: Any = CachedScore) -> None:
        self.folder, self._row = Path(folder), row
        self._verified: dict[Path, pa.Table] = {}

    def lookup(self, scorer: Key, keys: Iterable[bytes]) -> dict[bytes, Row]:
        """The scores on disk of those of `keys` that are known. Takes no lock: it may miss what another process is adding."""
        return _select(self._read(self._folder(scorer)), keys, self._row)

    @contextmanager
    def writer(self, scorer: Key, *, flush_rows: int = 4096, flush_seconds: float = 5.0) -> Iterator[CacheWriter[Row]]:
        """The one writer of `scorer`. A second process waits here until the first is done, then finds all that it scored.

        Ask `known` inside the block, score the rest, and `add` it: so nothing is scored twice. Rows reach the disk every
        `flush_rows` rows or `flush_seconds` seconds and at the end, also when the block raises. A block that ends well leaves
        one part, sorted by key: the same bytes whatever the order, and however often it was interrupted.

        Raises:
            RunFolderError: the folder cannot be written, or the disk is full. What was written before stays valid.
        """
        folder = self._folder(scorer)
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = _wait_for(folder / ".lock")
        try:
            with write_errors(folder):
                remove_temporaries(folder)
                description = folder / "key.json"
                if not description.exists():
                    write_bytes(description, (json.dumps(asdict(scorer), indent=2) + "\n").encode())
            writer = CacheWriter(folder, self._read(folder), self._row, flush_rows, flush_seconds)
            try:
                yield writer
            except BaseException:
                with suppress(RunFolderError):  # the first error is the one to tell
                    writer.flush()
                raise
            writer.flush()
            self._compact(folder)
        finally:
            lock.release()

    def _folder(self, scorer: Key) -> Path:
        return self.folder / scorer.digest

    def _read(self, folder: Path) -> pa.Table:
        """Every row of the folder. Parts never change, so one that was verified is not read again."""
        import pyarrow as pa

        while True:
            paths = sorted(folder.glob("part-*.parquet"))
            for path in set(paths) - self._verified.keys():
                try:
                    content = path.read_bytes()
                except FileNotFoundError:  # a writer just compacted it into another part
                    break
                except OSError as error:
                    what = f"cannot be read: {error.strerror}"
                    raise RunFolderError(what, where=str(path), fix="mend or remove it") from error
                if _part_name(content) == path.name:
                    self._verified[path] = _decode(content)
                else:
                    _set_aside(path)
            else:
                break
        tables = [self._verified[path] for path in paths if path in self._verified]
        return pa.concat_tables(tables) if tables else _table([], [], self._row)

    def _compact(self, folder: Path) -> None:
        paths = sorted(folder.glob("part-*.parquet"))
        if len(paths) < 2:
            return
        rows = self._read(folder).sort_by("key")
        kept = _write_part(folder, rows.filter(_first_of_each(rows["key"])))
        with write_errors(folder):
            for path in paths:
                self._verified.pop(path, None)
                if path != kept:
                    path.unlink(missing_ok=True)


LogProbCache = ScoreCache
"""The name under which no other row is given: a cache of sequence log-probabilities."""


class CacheWriter(Generic[Row]):
    """What `ScoreCache.writer` yields; alone in its folder as long as the block lasts."""

    def __init__(self, folder: Path, rows: pa.Table, row: type[Row], flush_rows: int, flush_seconds: float) -> None:
        self._folder, self._rows, self._row = folder, rows, row
        self._flush_rows, self._flush_seconds = flush_rows, flush_seconds
        self._pending: dict[bytes, Row] = {}
        self._flushed_at = time.monotonic()

    def known(self, keys: Iterable[bytes]) -> dict[bytes, Row]:
        """The scores of those of `keys` that need no scoring: on disk, or added in this block."""
        keys = list(keys)
        return _select(self._rows, keys, self._row) | {key: self._pending[key] for key in keys if key in self._pending}

    def add(self, keys: Sequence[bytes], *columns: Iterable[float]) -> None:
        """Keep one row a key, a column for each of its fields: log-probs in nats, and how many tokens each sums over.

        Raises:
            ModelError: a score, the first column, is NaN or +inf (-inf, no support, is a log-probability).
            RunFolderError: the disk is full or the folder cannot be written; the rows stay pending.
        """
        kinds = get_type_hints(self._row).values()
        typed = (map(kind, values) for kind, values in zip(kinds, columns, strict=True))
        scores = [self._row(*values) for values in zip(*typed, strict=True)]
        bad = sum(not score[0] < float("inf") for score in scores)
        if bad:
            what = "log-probabilities" if self._row is CachedScore else "scores"
            fix = "score in float32 or check the model's weights"
            raise ModelError(f"{bad} of {len(scores)} {what} are NaN or infinite", fix=fix)
        self._pending.update(zip(keys, scores, strict=True))
        if len(self._pending) >= self._flush_rows or time.monotonic() - self._flushed_at >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Put what was added on disk now, as one part."""
        import pyarrow as pa

        if self._pending:
            rows = _table(list(self._pending), list(self._pending.values()), self._row).sort_by("key")
            _write_part(self._folder, rows)
            self._rows = pa.concat_tables([self._rows, rows])
            self._pending = {}
        self._flushed_at = time.monotonic()


def _table(keys: Sequence[bytes], scores: Sequence[tuple[Any, ...]], row: type[tuple[Any, ...]]) -> pa.Table:
    import pyarrow as pa

    arrays = {"key": pa.array(keys, pa.binary(_KEY_BYTES))}
    for i, (name, kind) in enumerate(get_type_hints(row).items()):
        arrays[name] = pa.array([score[i] for score in scores], _ARROW_TYPES[kind])
    return pa.table(arrays)


def _select(rows: pa.Table, keys: Iterable[bytes], row: type[Row]) -> dict[bytes, Row]:
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pa.array(list(keys), pa.binary(_KEY_BYTES))
    found = rows.filter(pc.is_in(rows["key"], value_set=wanted))
    scores = map(row, *(found[name].to_pylist() for name in get_type_hints(row)))
    return dict(zip(found["key"].to_pylist(), scores, strict=True))


def _first_of_each(sorted_keys: pa.ChunkedArray) -> pa.Array:
    import pyarrow as pa

    keys = sorted_keys.to_pylist()
    return pa.array([index == 0 or key != keys[index - 1] for index, key in enumerate(keys)], pa.bool_())


def _write_part(folder: Path, rows: pa.Table) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(rows.combine_chunks(), sink, compression="zstd", use_dictionary=False)
    content = sink.getvalue().to_pybytes()
    path = folder / _part_name(content)
    write_bytes(path, content)
    return path


def _decode(content: bytes) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # In this thread only: a pool's thread that lets go of these bytes while the interpreter ends would abort the process.
    with pq.ParquetFile(pa.BufferReader(content), pre_buffer=False) as file:
        return file.read(use_threads=False).combine_chunks()


def _part_name(content: bytes) -> str:
    return f"part-{xxhash.xxh3_128_hexdigest(content)}.parquet"


def _set_aside(path: Path) -> None:
    logger.warning("%s is torn (its checksum is wrong); it is set aside and its rows are scored again", path)
    with suppress(OSError):  # another process was first, or the folder is read-only: either way it is not used
        path.rename(path.with_name(path.name + ".torn"))


def _wait_for(path: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        logger.info("another process is scoring into %s; waiting for what it finds", path.parent)
        lock.acquire()
    return lock
