"""Pairs to vote on, and an annotator that speaks HTTP to the page's server."""

from __future__ import annotations

import json
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

from polyref.labelling import Pair, pairs_of
from polyref.types import PreferenceRecord


def some_records(count: int = 6) -> list[PreferenceRecord]:
    """Pairs whose chosen completion sorts first in half of them; labels and margins that must not get through."""
    texts = [("better", "worse") if i % 2 else ("worse", "better") for i in range(count)]
    return [
        PreferenceRecord(f"question {i}?", f"{a} {i}", f"{b} {i}", 0.9, margin=1.0, row=i) for i, (a, b) in enumerate(texts)
    ]


def some_pairs(count: int = 6) -> list[Pair]:
    """The pairs of `some_records`."""
    return pairs_of(some_records(count))


def request(
    address: str, method: str = "GET", path: str = "", body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of a request to `path` below the page; headers by their names with underscores."""
    url = urlsplit(address)
    connection = HTTPConnection(str(url.hostname), url.port, timeout=20)
    try:
        connection.request(method, url.path + path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        reply = connection.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read()
    finally:
        connection.close()


def post(address: str, what: str, given: Any = None, **headers: str) -> tuple[int, Any]:
    """(status, answer) of what the page's own script would send, with `headers` laid over its own."""
    url = urlsplit(address)
    own = {"Origin": f"http://{url.netloc}", "Content_Type": "application/json"} | headers
    status, _, body = request(address, "POST", what, json.dumps(given or {}).encode(), **own)
    return status, json.loads(body)


def vote_for(address: str, wanted: str) -> None:
    """Vote on every pair for the completion that begins with `wanted`."""
    state = post(address, "next")[1]
    while pair := state["pair"]:
        answer = "left" if pair["left"].startswith(wanted) else "right"
        status, state = post(address, "vote", {"id": pair["id"], "answer": answer})
        assert status == 200, state
