"""Ask an OpenAI-compatible server: retries with back-off, a concurrency limit, a budget, and a transcript that resumes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from polyref.errors import ConfigError, ModelError, one_line
from polyref.serving.connection import Connection
from polyref.serving.transcript import Reply, Transcript, read_json

if TYPE_CHECKING:
    import httpx2
    import tenacity

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_RETRIED = (408, 409, 425, 429)
_UNASKED = (400, 413, 422)  # the server will not answer this question; others it may
_LONGEST_BODY = 1 << 20
TEMPLATE_TOKENS = 128
"""The most tokens that a chat template is taken to put around messages."""

Read = Callable[[Any, int], Reply]
"""The reply in the JSON of an answer; given too what it is taken to cost if that is not said. Any error: there is none."""

Note = Callable[[Reply], Mapping[str, Any]]
"""What to write beside a reply in the transcript."""


class Unanswered(Exception):
    """The server refuses this one question; `str` says why, in one line."""


class _Transient(Exception):
    """A failure that another attempt may not meet."""


class _Stopped(Exception):
    """Another request failed for good; this one is not sent."""


class Client:
    """A server and its open transcript; `who` names it in errors. The key is in no log, error, file or `repr`."""

    def __init__(self, settings: Connection, transcript: str | Path, *, who: str) -> None:
        for package in ("httpx2", "tenacity"):
            if importlib.util.find_spec(package) is None:
                raise ModelError(f"asking a {who} needs the package {package}", fix="pip install 'polyref[judge]'")
        import httpx2

        self.settings, self.who, self._key = settings, who, _key(settings.key_variable)
        self._spelt = _spellings(self._key)
        self._turn, self._stop, self._not_before = threading.Lock(), threading.Event(), 0.0
        self.transcript = Transcript(transcript, max_requests=settings.max_requests, max_tokens=settings.max_tokens)
        self._http = httpx2.Client(
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            timeout=httpx2.Timeout(settings.timeout, pool=None),
            limits=httpx2.Limits(max_connections=settings.concurrency),
        )

    def close(self) -> None:
        """Let server and transcript go. Safe to call twice."""
        self._http.close()
        self.transcript.close()

    def each(self, task: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """`task` of every item, `concurrency` at once, in order. The first error stops what has not been sent, and is raised.

        Requests under way then, or when Ctrl-C comes, are waited for and written down: they are paid for.
        """
        failures: list[Exception] = []

        def stopping(item: _Item) -> _Result:
            try:
                return task(item)
            except Exception as error:
                failures.append(error)
                self._stop.set()  # here, so that this thread does not begin another item first
                raise

        with self._turn, ThreadPoolExecutor(self.settings.concurrency) as pool:
            self._stop.clear()
            try:
                futures = [pool.submit(stopping, item) for item in items]
                wait(futures, return_when=FIRST_EXCEPTION)
                if failures:
                    raise failures[0]
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in futures]

    def ask(
        self, path: str, body: Mapping[str, Any], read: Read, *, most: int, mark: str = "", note: Note | None = None
    ) -> Reply:
        """The reply to `body`, posted to `path` and read by `read`: from the transcript, or else asked for and written down.

        `most`: the tokens that it may cost. `mark` tells requests of equal bodies apart.

        Raises:
            Unanswered: the server refuses this question.
            ConfigError: the budget is spent.
            ModelError: the server cannot be reached, refuses the key or the model, or does not speak the protocol.
        """
        import tenacity

        settings = self.settings
        content = json.dumps(body, sort_keys=True).encode()
        digest = hashlib.sha256(content + mark.encode()).hexdigest()
        if digest in self.transcript.replies:
            return self.transcript.replies[digest]
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Transient),
            stop=tenacity.stop_after_attempt(settings.attempts),
            wait=lambda state: self._backoff(digest, state),
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return retrying(self._attempt, path, content, digest, read, most, note)
        except _Transient as error:
            self._give_up(f"no answer in {settings.attempts} attempts; the last: {error}", "check that the server runs")

    def _attempt(self, path: str, content: bytes, digest: str, read: Read, most: int, note: Note | None) -> Reply:
        """Send once, and write down what became of it. A request lost on the way is taken to have cost the most it may."""
        import httpx2

        while (left := self._not_before - time.monotonic()) > 0:
            self._sleep(left)
        self._sleep(0)
        self.transcript.asked(digest, most)
        reply, said, cost, status, headers = None, "interrupted", most, 0, httpx2.Headers()
        try:
            status, headers, answer = self._post(path, content)
            if status == 200:
                reply = self._reply(path, answer, read, most)
            else:
                said, cost = self._status(status, answer), most if status >= 500 else 0
        except httpx2.ConnectError as error:
            said, cost = self._clean(f"cannot connect ({error})"), 0
        except httpx2.TimeoutException:
            said = f"nothing in {self.settings.timeout:g} s"
        except (httpx2.HTTPError, httpx2.InvalidURL, UnicodeError, _Transient) as error:
            said = self._clean(str(error) or type(error).__name__)
        finally:
            if reply is None:
                self.transcript.failed_with(digest, said, cost)
        if reply is not None:
            self.transcript.answered(digest, reply, json.loads(content), **(note(reply) if note else {}))
            return reply
        self._refuse(status, said, headers)
        raise _Transient(said)

    def _post(self, path: str, content: bytes) -> tuple[int, httpx2.Headers, bytes]:
        import httpx2

        deadline, body = time.monotonic() + self.settings.timeout, bytearray()
        url = self.settings.base_url.rstrip("/") + path
        with self._http.stream("POST", url, content=content) as response:
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > _LONGEST_BODY:
                    raise _Transient("the answer has no end")
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout("slow")
            return response.status_code, response.headers, bytes(body)

    def _refuse(self, status: int, said: str, headers: httpx2.Headers) -> None:
        """Raise what no retry mends; keep the wait that the server asks for, which holds for every thread."""
        if status in (0, 200):  # nothing came, or what came was broken
            return
        if status in _UNASKED and self.transcript.replies:
            raise Unanswered(f"the server refused it: {said}")
        if status < 500 and status not in _RETRIED:
            self._give_up(f"the request is refused: {said}", "check base_url, model and the key")
        seconds = _retry_after(headers.get("Retry-After"))
        if seconds > self.settings.longest_wait:
            self._give_up(f"{said}, and asks to wait {seconds:.0f} s", "wait that long, or raise longest_wait")
        self._not_before = max(self._not_before, time.monotonic() + seconds)

    def _give_up(self, what: str, fix: str) -> NoReturn:
        kept = f"{fix}; {len(self.transcript.replies)} replies are kept in {self.transcript.path}"
        raise ModelError(what, where=f"{self.who} at {self.settings.base_url}", fix=kept) from None

    def _status(self, status: int, answer: bytes) -> str:
        return f"status {status}, {self._clean(answer.decode(errors='replace')) or 'nothing said'}"

    def _reply(self, path: str, answer: bytes, read: Read, most: int) -> Reply:
        """What `read` makes of an answer, without the key."""
        try:
            reply = read(read_json(answer), most)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _Transient(f"the answer is no {_kind(path)}") from None
        return reply._replace(text=self._hide(reply.text), finish_reason=self._clean(reply.finish_reason))

    def _clean(self, text: str) -> str:
        return one_line(self._hide(text), 200)

    def _hide(self, text: str) -> str:
        """`text` without the key, bare or as a JSON string may spell it, itself perhaps within a string."""
        return self._spelt.sub("[key]", text) if self._key else text

    def _backoff(self, digest: str, state: tenacity.RetryCallState) -> float:
        """first_wait 2^(n-1) s after attempt n; the digest takes off up to half, so that not all return together."""
        share = int(hashlib.sha256(f"{digest}{state.attempt_number}".encode()).hexdigest()[:8], 16) / 2**32
        doubled = self.settings.first_wait * 2.0 ** min(state.attempt_number - 1, 64)
        return min(doubled, self.settings.longest_wait) * (1 - share / 2)

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise _Stopped


def _key(variable: str | None) -> str:
    key = os.environ.get(variable, "").strip() if variable else ""
    if variable and not key:
        raise ConfigError("holds no key", where=f"environment variable {variable}", fix="set it, or leave key_variable out")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("is no key: it holds characters that a header cannot", where=f"environment variable {variable}")
    return key


def _spellings(key: str) -> re.Pattern[str]:
    r"""What spells `key`: each character as itself, behind backslashes (\/), or as \u and its number; at most four deep."""
    return re.compile("".join(rf"(?:\\{{0,4}}{re.escape(c)}|\\{{1,4}}u(?i:{ord(c):04x}))" for c in key))


def _kind(path: str) -> str:
    """What /chat/completions gives: a chat completion."""
    return path.strip("/").removesuffix("s").replace("/", " ")


def _retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, given in seconds or as a date; 0 without one that can be read."""
    if header is None:
        return 0.0
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", header.strip()):
        return float(header)
    try:
        return max(parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return 0.0
