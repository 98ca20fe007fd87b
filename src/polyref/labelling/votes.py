"""People's votes, kept so that none that was confirmed is lost, however a labelling ends.

JSON Lines, each on disk (fsync) before it is confirmed, in the order in which they were cast:

    {"id", "choice", "left", "annotator"}

`choice` is "first", "second", "tie" or "skip" in the terms of the `Pair`, not of the screen, or "undo", which takes the vote of
that annotator on that pair back. `left` says which completion was shown on the left. An annotator's last line on a pair counts.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from polyref.errors import ConfigError, RunFolderError
from polyref.files import hold, write_bytes, write_errors
from polyref.labelling.pairs import Place

logger = logging.getLogger(__name__)

CHOICES = ("first", "second", "tie", "skip")
_UNDO = "undo"
_ANNOTATOR = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}|")


@dataclass(frozen=True, slots=True)
class Vote:
    """What `annotator` ("" is one without a name) says of the pair `id`; `choice` is one of `CHOICES`."""

    id: str
    choice: str
    left: Place
    annotator: str = ""


def check_annotator(name: str) -> None:
    """ConfigError unless `name` can name an annotator, in files too."""
    if not _ANNOTATOR.fullmatch(name):
        fix = "give at most 64 letters, digits, dots, dashes and underscores"
        raise ConfigError(f"annotator is {name!r}", fix=fix)


class Votes:
    """The open file of votes at `path`, held against other processes until `close`. Threads may share it.

    A torn last line, as a kill leaves it, is dropped: its vote was never confirmed.

    Raises:
        RunFolderError: another process holds it, it cannot be read or written, or a line of it is no vote.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._cast: dict[tuple[str, str], Vote] = {}
        self._writing = threading.Lock()
        self._held = hold(self.path, Path(f"{self.path}.lock"), "another file")
        try:
            self._load()
            with write_errors(self.path):
                self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        except BaseException:
            self._held.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the file go; a vote cast later is refused. An empty file is removed. Safe to call twice."""
        with self._writing:
            if self._held.is_locked:
                empty = os.fstat(self._file).st_size == 0
                os.close(self._file)
                for name in (self.path, self._held.lock_file) if empty else ():
                    Path(name).unlink(missing_ok=True)
                self._held.release()

    def all(self) -> list[Vote]:
        """The votes that count, in the order in which they were cast."""
        with self._writing:
            return list(self._cast.values())

    def of(self, annotator: str) -> dict[str, Vote]:
        """The votes of `annotator` by pair, in the order in which they were cast."""
        return {vote.id: vote for vote in self.all() if vote.annotator == annotator}

    def cast(self, vote: Vote) -> None:
        """Write `vote`; it is on disk when this returns, and replaces an earlier one of its annotator on its pair.

        Raises:
            RunFolderError: it cannot be written, and does not count.
        """
        self._append(asdict(vote))

    def take_back(self, vote: Vote) -> None:
        """Write that `vote` no longer counts; errors as `cast`."""
        self._append(asdict(vote) | {"choice": _UNDO})

    def _append(self, line: dict[str, Any]) -> None:
        content = (json.dumps(line) + "\n").encode()
        with self._writing, write_errors(self.path):
            if not self._held.is_locked:
                raise RunFolderError("is closed", where=str(self.path), fix="open it again")
            size = os.fstat(self._file).st_size
            try:
                if os.write(self._file, content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._file)
            except BaseException:
                os.ftruncate(self._file, size)
                raise
            self._replay(line)

    def _load(self) -> None:
        if not self.path.exists():
            write_bytes(self.path, b"")
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise RunFolderError(f"cannot be read: {error.strerror}", where=str(self.path), fix="mend or move it") from error
        whole = content.rfind(b"\n") + 1
        for number, text in enumerate(content[:whole].split(b"\n")[:-1], 1):
            try:
                self._replay(json.loads(text))
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                fix = "mend or remove the line"
                raise RunFolderError("is no vote", where=f"{self.path}, line {number}", fix=fix) from error
        if whole < len(content):
            self._mend_last(content[whole:], whole)

    def _mend_last(self, last: bytes, whole: int) -> None:
        """End a last line that lacks only its line end, as an editor may leave it; drop one that is torn."""
        try:
            self._replay(json.loads(last))
            size, end = whole + len(last), b"\n"
        except (ValueError, LookupError, TypeError, RecursionError):
            size, end = whole, b""
            logger.warning("%s: the torn last line is dropped", self.path)
        with write_errors(self.path), open(self.path, "ab") as file:
            file.truncate(size)
            file.write(end)
            file.flush()
            os.fsync(file.fileno())

    def _replay(self, line: dict[str, Any]) -> None:
        vote = Vote(line["id"], line["choice"], line["left"], line.get("annotator", ""))
        known = vote.choice in (*CHOICES, _UNDO) and vote.left in ("first", "second")
        if not (known and isinstance(vote.id, str) and isinstance(vote.annotator, str)):
            raise ValueError
        self._cast.pop((vote.annotator, vote.id), None)
        if vote.choice != _UNDO:
            self._cast[vote.annotator, vote.id] = vote
