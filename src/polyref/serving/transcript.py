"""What a server was asked and what it answered, kept so that nothing answered is paid for twice, however a run ends.

JSON Lines, each on disk (fsync) before anything rests on it, in the order in which things happened:

    {"event": "asked", "digest", "tokens"}                    before it is sent; `tokens`: the most it may cost
    {"event": "answered", "digest", "tokens", "reply", "finish_reason", "request", ...}             what it cost
    {"event": "failed", "digest", "tokens", "error"}          what it may have cost all the same

An answer has "token_ids" and "logps" where the server gave them, and what the asker noted: a judge, its "verdict". The digest
is the SHA-256 of the request's body, and of whatever else tells the request from others: another model, question or setting is
another request. A request that a kill left without an outcome counts against the budget at the most it may have cost, and is
asked again. No key is ever part of a body, so none is written.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from polyref.errors import ConfigError, RunFolderError
from polyref.files import hold, sync, write_errors

logger = logging.getLogger(__name__)

_EVENTS = {"asked": (), "answered": ("reply", "finish_reason"), "failed": ("error",)}
_LISTS = {"token_ids": int, "logps": float}


class Reply(NamedTuple):
    """What the server wrote, why it stopped there ("stop": it was done), and the tokens of request and reply together.

    `token_ids` and their log-probabilities `logps` in nats are those of the text, where the server gave them.
    """

    text: str
    finish_reason: str
    tokens: int
    token_ids: tuple[int, ...] | None = None
    logps: tuple[float, ...] | None = None


def read_json(text: str | bytes) -> Any:
    """The value that `text` spells, however its strings are escaped; ValueError where an object says a name twice."""

    def distinct(members: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(members)
        if len(found) < len(members):
            raise ValueError("a name occurs twice in an object")
        return found

    return json.loads(text, object_pairs_hook=distinct)


class Transcript:
    """The open transcript at `path`, held against other processes until `close`; its budget runs through all resumptions.

    `replies`: the replies by digest. `requests`, `tokens`: spent so far; `failed`: requests that brought no reply;
    `not_verdicts`: replies in which a judge's verdict was looked for and not found. A torn last line is dropped.

    Raises:
        RunFolderError: another process holds it, it cannot be read or written, or a line of it is not of a transcript.
    """

    def __init__(self, path: str | Path, *, max_requests: int | None = None, max_tokens: int | None = None) -> None:
        self.path, self.max_requests, self.max_tokens = Path(path), max_requests, max_tokens
        self.replies: dict[str, Reply] = {}
        self.requests = self.tokens = self.failed = self.not_verdicts = 0
        self._in_flight: dict[str, int] = {}
        self._changed = threading.Condition()
        self._lock = hold(self.path, Path(f"{self.path}.lock"), "another transcript")
        try:
            self._load()
            with write_errors(self.path):
                self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                sync(self.path)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the file go. Safe to call twice."""
        if self._lock.is_locked:
            os.close(self._file)
            self._lock.release()

    def asked(self, digest: str, tokens: int) -> None:
        """Write that a request of at most `tokens` goes out now; waits while requests under way may give tokens back.

        Raises:
            ConfigError: the budget has no room for it; nothing is written and nothing may be sent.
        """
        with self._changed:
            while self.max_tokens is not None and self.tokens + tokens > self.max_tokens and self._in_flight:
                self._changed.wait()
            said = f"{len(self.replies)} replies are kept"
            if self.max_requests is not None and self.requests >= self.max_requests:
                raise self._spent(f"the budget of {self.max_requests} requests is spent; {said}", "max_requests")
            if self.max_tokens is not None and self.tokens + tokens > self.max_tokens:
                what = f"{self.tokens} of {self.max_tokens} tokens are spent, and the next request may take {tokens}; {said}"
                raise self._spent(what, "max_tokens")
            self._append({"event": "asked", "digest": digest, "tokens": tokens})
            self._in_flight[digest] = tokens
            self.requests, self.tokens = self.requests + 1, self.tokens + tokens

    def answered(self, digest: str, reply: Reply, request: Any, **noted: Any) -> None:
        """Write the reply to a request that was `asked`, the body of the request, and what else is `noted`."""
        line = {"event": "answered", "digest": digest, "tokens": reply.tokens} | noted
        line |= {name: value for name in _LISTS if (value := getattr(reply, name)) is not None}
        with self._settled(digest, reply.tokens):
            self._append(line | {"reply": reply.text, "finish_reason": reply.finish_reason, "request": request})
            self.replies[digest] = reply
            self.not_verdicts += noted.get("verdict", 0) is None

    def failed_with(self, digest: str, error: str, tokens: int) -> None:
        """Write that a request that was `asked` brought no reply, and the `tokens` it may have cost all the same."""
        with self._settled(digest, tokens):
            self._append({"event": "failed", "digest": digest, "tokens": tokens, "error": error})
            self.failed += 1

    @contextmanager
    def _settled(self, digest: str, tokens: int) -> Iterator[None]:
        with self._changed:
            try:
                yield
            finally:
                self.tokens += tokens - self._in_flight.pop(digest)
                self._changed.notify_all()

    def _spent(self, what: str, setting: str) -> ConfigError:
        return ConfigError(what, where=str(self.path), fix=f"raise {setting}; a new run goes on from here")

    def _append(self, line: dict[str, Any]) -> None:
        content = (json.dumps(line) + "\n").encode()
        with write_errors(self.path):
            size = os.fstat(self._file).st_size
            try:
                if os.write(self._file, content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._file)
            except BaseException:
                os.ftruncate(self._file, size)
                raise

    def _load(self) -> None:
        if not self.path.exists():
            return
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise RunFolderError(f"cannot be read: {error.strerror}", where=str(self.path), fix="mend or move it") from error
        whole = content.rfind(b"\n") + 1
        asked: dict[str, int] = {}
        for number, text in enumerate(content[:whole].splitlines(), 1):
            try:
                self._replay(read_json(text), asked)
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                fix = "restore it, or name another transcript"
                raise RunFolderError("is no line of a transcript", where=f"{self.path}, line {number}", fix=fix) from error
        if whole < len(content):
            logger.warning("%s: the torn last line is dropped", self.path)
            with write_errors(self.path):
                os.truncate(self.path, whole)

    def _replay(self, line: dict[str, Any], asked: dict[str, int]) -> None:
        event, digest, tokens = line["event"], line["digest"], line["tokens"]
        if type(tokens) is not int or tokens < 0 or any(type(line[name]) is not str for name in _EVENTS[event]):
            raise ValueError
        if event == "asked":
            asked[digest] = tokens
            self.requests, self.tokens = self.requests + 1, self.tokens + tokens
            return
        self.tokens += tokens - asked.pop(digest)
        if event == "answered":
            lists = {name: tuple(map(kind, line[name])) if name in line else None for name, kind in _LISTS.items()}
            self.replies[digest] = Reply(line["reply"], line["finish_reason"], tokens, **lists)
            self.not_verdicts += line.get("verdict", 0) is None
        else:
            self.failed += 1
