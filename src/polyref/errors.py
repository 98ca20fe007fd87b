"""Every error polyref raises on purpose, and the exit code each one ends the command line with.

Two families matter to a user. `InputError` (exit code 2) means that what was given is wrong: it names what, where, and how
to mend it, in one line. Any other `PolyrefError` (exit code 1) means that the work itself failed.
"""

from __future__ import annotations

_LINE_LIMIT = 600


def one_line(text: object, limit: int = _LINE_LIMIT) -> str:
    """`text` as a single printable line: whitespace folded, control characters escaped, at most `limit` characters.

    Text of a data set or a model may hold terminal escapes; nothing of it reaches a terminal or a log unescaped.
    """
    folded = " ".join(str(text).split())
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in folded)
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"


class PolyrefError(Exception):
    """Root of the tree. `exit_code` is what the command line ends with."""

    exit_code = 1


class InputError(PolyrefError, ValueError):
    """The input is wrong. `str(error)` is one line: where, what, and how to mend it."""

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = one_line(what), where and one_line(where), fix and one_line(fix)
        line = f"{self.where}: {self.what}" if self.where else self.what
        super().__init__(f"{line}; {self.fix}" if self.fix else line)


class DataError(InputError):
    """A row, file or data set cannot be read as preference data. `where` names file, row and column."""


class ConfigError(InputError):
    """A setting is out of range, or settings contradict each other."""


class ModelError(InputError):
    """A model, adapter or tokenizer cannot be found, loaded safely, or used for the task."""


class ReferenceSetError(InputError):
    """Reference weights, composition or support are not usable."""


class RunFolderError(InputError):
    """A run folder is held by another process, cannot be written, or belongs to a different configuration."""


class TrainingDivergedError(PolyrefError):
    """The loss became non-finite. The message names the step and the file that keeps the batch's row numbers."""
