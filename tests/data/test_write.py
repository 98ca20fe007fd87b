"""What is written is read back, and equal records give equal bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fakes import auxiliary_columns, pair_rows
from polyref.data.records import parse_record, to_messages
from polyref.data.sources import load_preferences
from polyref.data.write import WRITTEN_KINDS, write_preferences
from polyref.errors import ConfigError
from polyref.types import PreferenceRecord


def some_records(prompt_format: str) -> list[PreferenceRecord]:
    rows = pair_rows(5, **auxiliary_columns(2))
    rows[2] |= {"chosen_ended": False, "rejected_ended": True}
    rows[1] |= {"chosen_probability": 0.1 + 0.2, "prompt": "näïve 果物\u2028?"}
    records = [parse_record(row, source="memory", row_number=i) for i, row in enumerate(rows, 1)]
    return [to_messages(record, prompt_format) for record in records]


@pytest.mark.parametrize("prompt_format", ["as_is", "chat"])
@pytest.mark.parametrize("kind", WRITTEN_KINDS)
def test_records_come_back(kind: str, prompt_format: str, tmp_path: Path) -> None:
    records, files = some_records(prompt_format), [tmp_path / f"{name}{kind}" for name in "ab"]
    for file in files:
        write_preferences(file, records)
    assert files[0].read_bytes() == files[1].read_bytes()
    back = load_preferences(files[0])
    assert [replace(record, source="memory") for record in back] == records


def test_another_kind_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the kind of file is not known; name one of .jsonl, .jsonl.gz, .parquet"):
        write_preferences(tmp_path / "a.csv", some_records("as_is"))
    assert not list(tmp_path.iterdir())
