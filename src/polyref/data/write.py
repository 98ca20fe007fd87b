"""Records -> a file that `load_preferences` reads them back from."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyref.data.records import record_to_row
from polyref.errors import ConfigError
from polyref.files import atomic_write
from polyref.types import PreferenceRecord

WRITTEN_KINDS = (".jsonl", ".jsonl.gz", ".parquet")


def check_written(name: str | Path) -> None:
    """ConfigError unless `name` ends as one of `WRITTEN_KINDS`."""
    if not str(name).endswith(WRITTEN_KINDS):
        raise ConfigError("the kind of file is not known", where=str(name), fix=f"name one of {', '.join(WRITTEN_KINDS)}")


def write_preferences(path: str | Path, records: Sequence[PreferenceRecord]) -> None:
    """Write `records` to a .jsonl, .jsonl.gz or .parquet file, whole or not at all; equal records give equal bytes.

    Columns that no record sets are left out. Errors: those of `check_written`; RunFolderError where it cannot be written.
    """
    write_rows(path, [record_to_row(record) for record in records])


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write plain `rows` as `write_preferences` does; in a .parquet file a column that a row lacks is null there."""
    check_written(path)
    with atomic_write(path) as temporary:
        if str(path).endswith(".parquet"):
            import pyarrow as pa
            import pyarrow.parquet as pq

            columns = dict.fromkeys(name for row in rows for name in row)
            pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns}), temporary)
            return
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        temporary.write_bytes(gzip.compress(content, mtime=0) if str(path).endswith(".gz") else content)
