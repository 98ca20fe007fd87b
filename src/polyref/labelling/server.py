"""A page to vote on, for a person at this machine: served on the loopback interface, under an address that no one can guess.

What keeps others out: the address holds a random token, without which nothing is served, neither to other users of the machine
nor to other pages in the browser. The Host header must name the loopback interface, so that a name that was bound to it anew
(DNS rebinding) is refused. What changes something is JSON that is posted from the page itself. The page loads nothing, and runs
no script but its own.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from polyref.errors import ConfigError, InputError, RunFolderError
from polyref.labelling.desk import Desk

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
MOST_BYTES = 4096
"""The largest body of a request; a vote takes about a hundred bytes."""

_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@contextmanager
def served(desk: Desk, *, port: int = 0, grace: float = 0.0) -> Iterator[str]:
    """Serve the page of `desk` on `port` (0: any that is free) while the body runs, which is given its address.

    `grace`: the seconds in which the last vote can be taken back, for the page to say; `Desk.wait` keeps them.

    Raises:
        ConfigError: the port is taken, or not to be had.
    """
    try:
        server = _Server(desk, port, grace)
    except (OSError, OverflowError) as error:
        fix = "give another port, or 0 for any that is free"
        raise ConfigError(f"cannot be served on: {error}", where=f"port {port}", fix=fix) from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://{LOOPBACK}:{server.server_port}/{server.token}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, desk: Desk, port: int, grace: float) -> None:
        super().__init__((LOOPBACK, port), _Handler)
        self.desk, self.grace, self.token = desk, grace, secrets.token_urlsafe(16)
        self.hosts = {f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost")}
        self.page = files("polyref.labelling").joinpath("templates/page.html").read_text(encoding="utf-8")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is not worth a traceback on the terminal."""
        logger.debug("a request failed", exc_info=True)


class _Refused(Exception):
    """A request that is turned down: the status, and why."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = sys_version = "polyref"
    timeout = 10

    def do_GET(self) -> None:
        """The page."""
        try:
            if self._below_token() != "":
                raise _Refused(404, "there is nothing here")
        except _Refused as refusal:
            return self._refuse(refusal)
        nonce = secrets.token_urlsafe(16)
        body = self.server.page.replace("{{nonce}}", nonce).encode()
        self._send(200, "text/html; charset=utf-8", body, {"Content-Security-Policy": _POLICY.format(nonce)})

    def do_POST(self) -> None:
        """next, vote or undo, with an object of arguments; answered with what to show now."""
        desk = self.server.desk
        try:
            what, given = self._below_token(), self._arguments()
            if what == "next":
                state = desk.next()
            elif what == "vote":
                state = desk.vote(given.get("id"), given.get("answer"))
            elif what == "undo":
                state = desk.undo(given.get("id"))
            else:
                raise _Refused(404, "there is nothing here")
        except _Refused as refusal:
            return self._refuse(refusal)
        except InputError as error:
            if isinstance(error, RunFolderError):
                logger.warning("a vote is not kept: %s", error)
            return self._refuse(_Refused(500 if isinstance(error, RunFolderError) else 400, str(error)))
        self._send(200, "application/json", json.dumps(state | {"grace": self.server.grace}).encode())

    def _below_token(self) -> str:
        """What follows the token in the path of a request that may be answered."""
        if self.headers.get("Host") not in self.server.hosts:
            raise _Refused(421, "this page is served on the loopback interface alone")
        token, _, rest = self.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            raise _Refused(403, "this address is of another start; open the one that polyref printed last")
        return rest

    def _arguments(self) -> dict[str, Any]:
        """The object in the body, once it is known to come from the page itself."""
        if self.headers.get("Origin") != f"http://{self.headers.get('Host')}":
            raise _Refused(403, "the request is not from this page")
        if self.headers.get("Content-Type") != "application/json":
            raise _Refused(415, "the request is not JSON")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise _Refused(411, "the request has no length")
        if len(length) > len(str(MOST_BYTES)) or int(length) > MOST_BYTES:
            raise _Refused(413, "the request is too long")
        try:
            given = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise _Refused(400, "the request is no JSON object")
        return given

    def _refuse(self, refusal: _Refused) -> None:
        status, why = refusal.args
        self._send(status, "application/json", json.dumps({"error": why}).encode())

    def _send(self, status: int, kind: str, body: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (_HEADERS | {"Content-Type": kind, "Content-Length": str(len(body))} | (more or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are no news."""
