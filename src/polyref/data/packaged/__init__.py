"""Small data sets that come with the library; each is a .jsonl.gz file here, with its licence in NOTICE."""

from __future__ import annotations

from pathlib import Path

from polyref.errors import DataError

PACKAGED_PREFIX = "packaged:"
"""`load_preferences("packaged:NAME")` reads the packaged data set NAME."""

_FILES = {"pandalm-human": "pandalm_human.jsonl.gz"}


def packaged_path(name: str) -> Path:
    """The file of a packaged data set; `DataError` for a name that is none."""
    if name not in _FILES:
        raise DataError(f"no packaged data set is called {name!r}", fix=f"there is {', '.join(_FILES)}")
    return Path(__file__).parent / _FILES[name]
