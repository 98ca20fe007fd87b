"""Where preference data comes from: one function for each kind of source, all giving numbered rows."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyref.data.fields import kind
from polyref.data.files import FILE_KINDS, Row, read_file
from polyref.data.packaged import PACKAGED_PREFIX, packaged_path
from polyref.data.records import RowError, parse_record, to_messages
from polyref.errors import ConfigError, DataError
from polyref.types import PreferenceRecord, Text

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_IN_MEMORY = "memory"


def load_preferences(
    source: str | Path | Dataset | DatasetDict | Iterable[Mapping[str, Any]],
    *,
    split: str = "train",
    prompt_format: str = "as_is",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    revision: str | None = None,
) -> list[PreferenceRecord]:
    """The preference pairs of `source`, in order, at most `limit` of them.

    `source` is a .jsonl, .jsonl.gz, .json, .json.gz or .parquet file, a folder saved by datasets, a hub id (at `revision`),
    "packaged:NAME", a datasets object, or rows. `split` picks a part of a hub id, folder or DatasetDict. For `columns` see
    `parse_record`, for `prompt_format` see `to_messages`. The first bad row ends the reading with a `DataError` that names
    file, row and column; data without rows, and rows whose reference weights `check_alike` refuses, are refused too. (Auxiliary
    pairs need be alike only where they are read.)
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"limit is {limit!r}", fix="give a number of rows of at least 1, or leave it out")
    records: list[PreferenceRecord] = []
    for row in read_rows(source, split=split, revision=revision):
        if isinstance(row.value, DataError):
            raise row.value
        if not records:
            _tell_unused(row)
        record = parse_record(row.value, source=row.source, row_number=row.number, columns=columns)
        check_alike(record, records[0] if records else record, "reference_weights", columns)
        records.append(to_messages(record, prompt_format, columns=columns))
        if len(records) == limit:
            break
    if not records:
        raise DataError("there are no rows", where=source_name(source), fix="give data with at least one pair")
    return records


def _tell_unused(row: Row) -> None:
    """Say that precomputed reference log-probs are not read: nothing tells which model, length or template made them."""
    unused = [
        name for name in ("ref_chosen_logps", "ref_rejected_logps") if isinstance(row.value, Mapping) and name in row.value
    ]
    if unused:
        logger.warning("%s: %s not used; references are scored once, through the cache", row.source, " and ".join(unused))


def load_packaged(name: str, *, prompt_format: str = "as_is", limit: int | None = None) -> list[PreferenceRecord]:
    """The pairs of a data set that comes with the library ("pandalm-human"), as `load_preferences` gives them."""
    return load_preferences(PACKAGED_PREFIX + name, prompt_format=prompt_format, limit=limit)


ALIKE: Mapping[str, tuple[str, str]] = {
    "reference_weights": ("weights", "give every row one weight for each reference"),
    "auxiliary_1": ("auxiliary pairs", "give every row as many auxiliary pairs, or none"),
}
"""The fields that are of one length in all rows: what they hold, and how to mend them."""


def check_alike(
    record: PreferenceRecord, first: PreferenceRecord, field: str, columns: Mapping[str, str] | None = None
) -> None:
    """`RowError` unless `record` holds as many in `field`, one of `ALIKE`, as the `first` of its data (or nothing)."""
    count, wanted = (len(getattr(each, field) or ()) for each in (record, first))
    if count != wanted:
        unit, fix = ALIKE[field]
        what = f"holds {count or 'no'} {unit} where row {first.row} holds {wanted or 'none'}"
        raise RowError(what, source=record.source, row=record.row, column=(columns or {}).get(field, field), fix=fix)


def source_name(source: object) -> str:
    """What messages call `source`: its path or id, or "memory"."""
    return str(source) if isinstance(source, str | Path) else _IN_MEMORY


def has_splits(source: object) -> bool:
    """Whether `split` means anything to `source`: a hub id, a folder, or a DatasetDict."""
    if isinstance(source, str | Path):
        return not str(source).startswith(PACKAGED_PREFIX) and not Path(source).expanduser().is_file()
    return type(source).__module__.partition(".")[0] == "datasets" and isinstance(source, Mapping)


def read_rows(source: object, *, split: str = "train", revision: str | None = None) -> Iterator[Row]:
    """The rows of any source (arguments as `load_preferences`); a row that cannot be read has a `DataError` as its value."""
    if isinstance(source, str | Path):
        return _read_named(str(source), split=split, revision=revision)
    if type(source).__module__.partition(".")[0] == "datasets":
        return _read_dataset(source, _IN_MEMORY, split=split)
    if isinstance(source, Mapping | bytes) or not isinstance(source, Iterable):
        fix = "give a path, a hub id, a datasets.Dataset or a list of rows"
        raise DataError(f"preference data cannot be read from {kind(source)}", fix=fix)
    return (Row(_IN_MEMORY, number, value) for number, value in enumerate(source, 1))


def _read_named(name: str, *, split: str, revision: str | None) -> Iterator[Row]:
    if name.startswith(PACKAGED_PREFIX):
        return read_file(packaged_path(name.removeprefix(PACKAGED_PREFIX)))
    path = Path(name).expanduser()
    if path.is_dir():
        return _read_folder(path, split=split)
    if path.exists():
        return read_file(path)
    if name.endswith(FILE_KINDS) or not _HUB_ID.fullmatch(name):
        raise DataError("there is no such file or folder", where=name, fix="check the path")
    return _read_hub(name, split=split, revision=revision)


def _read_folder(path: Path, *, split: str) -> Iterator[Row]:
    import datasets

    if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        fix = "give a folder written by save_to_disk, or one of its files"
        raise DataError("is not a folder saved by datasets", where=str(path), fix=fix)
    with _refusing(str(path), "save or fetch the folder again"):
        data = datasets.load_from_disk(str(path))
    return _read_dataset(data, str(path), split=split)


def _read_hub(name: str, *, split: str, revision: str | None) -> Iterator[Row]:
    import datasets

    with _refusing(name, "check the path or hub id, the split and the connection"):
        data = datasets.load_dataset(name, split=split, revision=revision)
    return _read_dataset(data, name, split=split)


@contextmanager
def _refusing(name: str, fix: str) -> Iterator[None]:
    """datasets lets errors of a dozen libraries through; a user needs one line of any of them."""
    try:
        yield
    except Exception as error:
        raise DataError(f"datasets cannot load it ({error})", where=name, fix=fix) from error


def _read_dataset(data: Any, name: str, *, split: str) -> Iterator[Row]:
    import datasets

    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(f"there is no split {split!r}", where=name, fix=f"choose one of {', '.join(map(str, data))}")
        data = data[split]
    if not isinstance(data, datasets.Dataset):
        fix = "load it without streaming=True, or take rows into a list first"
        raise DataError(f"{type(data).__name__} streams rows that cannot be counted or split", where=name, fix=fix)
    return (Row(name, number, value) for number, value in enumerate(data.with_format(None), 1))


def prompt_key(prompt: Text) -> str:
    """A string equal for equal prompts, and only for them."""
    return json.dumps(prompt, sort_keys=True)


def by_prompt(records: Iterable[PreferenceRecord]) -> dict[str, list[PreferenceRecord]]:
    """The records of each prompt, under its `prompt_key`: prompts as they first appear, records in order."""
    groups: dict[str, list[PreferenceRecord]] = {}
    for record in records:
        groups.setdefault(prompt_key(record.prompt), []).append(record)
    return groups


def split_by_prompt(
    records: Sequence[PreferenceRecord], *, held_out: int | float, seed: int
) -> tuple[list[PreferenceRecord], list[PreferenceRecord]]:
    """(training, held-out) pairs with no prompt on both sides; the draw depends on the prompts and `seed` alone, not on order.

    `held_out` is a number of pairs, or a share of them in (0, 1) (rounded to the nearest number). Prompts in random order are
    held out whole where they still fit, so the held-out side is never larger than asked, and smaller only where no prompt
    with few enough pairs is left. Both sides keep the order of `records`. Errors: `ConfigError`, `DataError`.
    """
    wanted = round(held_out * len(records)) if isinstance(held_out, float) and 0 < held_out < 1 else held_out
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 0 < wanted < len(records):
        fix = "give a share between 0 and 1, or a smaller number, that leaves pairs on both sides"
        raise ConfigError(f"held_out is {held_out!r} of {len(records)} pairs", fix=fix)
    sizes = {prompt: len(group) for prompt, group in by_prompt(records).items()}
    prompts = sorted(sizes)
    random.Random(seed).shuffle(prompts)
    chosen: set[str] = set()
    room = wanted
    for prompt in prompts:
        if sizes[prompt] <= room:
            chosen.add(prompt)
            room -= sizes[prompt]
    sides: tuple[list[PreferenceRecord], list[PreferenceRecord]] = ([], [])
    for record in records:
        sides[prompt_key(record.prompt) in chosen].append(record)
    if not all(sides):
        what = f"{len(sizes)} prompts for {len(records)} pairs cannot be split with at most {wanted} pairs held out"
        raise DataError(what, fix="give data with more prompts, or hold out more pairs")
    return sides
