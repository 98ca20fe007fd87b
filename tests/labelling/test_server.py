"""The page's server: what it answers, what it turns down, and that its end is the end of the voting."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from labelling_world import post, request, some_pairs, vote_for
from polyref.errors import ConfigError
from polyref.labelling import Desk, Vote, Votes, pairs_of, served
from polyref.labelling.desk import shown
from polyref.types import PreferenceRecord


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with Votes(tmp_path / "votes.jsonl") as votes:
        yield Desk(some_pairs(), votes, seed=0, annotator="ann")


@pytest.fixture
def address(desk: Desk) -> Iterator[str]:
    with served(desk, grace=2.0) as address:
        yield address


def test_votes_are_kept_in_the_terms_of_the_content(desk: Desk, address: str) -> None:
    vote_for(address, "better")
    assert [(vote.choice, vote.annotator) for vote in desk.votes.all()] == [("first", "ann")] * 6
    assert {vote.left for vote in desk.votes.all()} == {"first", "second"}, "sides differ from pair to pair"
    assert post(address, "next") == (200, {"question": desk.question, "done": 6, "total": 6, "pair": None, "grace": 2.0})


def test_a_vote_can_be_replaced_and_taken_back(desk: Desk, address: str) -> None:
    first = post(address, "next")[1]["pair"]
    second = post(address, "vote", {"id": first["id"], "answer": "tie"})[1]["pair"]
    assert second["id"] != first["id"]
    state = post(address, "vote", {"id": first["id"], "answer": "skip"})[1]  # another tab still showed it
    assert (state["done"], state["pair"]) == (1, second)
    post(address, "vote", {"id": second["id"], "answer": "tie"})
    assert post(address, "undo", {"id": first["id"]})[1]["pair"] == first
    assert [vote.id for vote in desk.votes.all()] == [second["id"]]
    assert post(address, "undo", {"id": first["id"]})[1]["pair"] == first, "nothing is left to take back of it"
    state = post(address, "undo")[1]
    assert (state["done"], state["pair"]) == (0, second)
    assert post(address, "undo")[1]["pair"] == first == post(address, "next")[1]["pair"]


@pytest.mark.parametrize(
    ("what", "given", "headers", "status", "says"),
    [
        ("next", {}, {"Host": "attacker.example"}, 421, "loopback"),
        ("next", {}, {"Host": "127.0.0.1"}, 421, "loopback"),
        ("next", {}, {"Origin": "http://attacker.example"}, 403, "not from this page"),
        ("next", {}, {"Origin": "null"}, 403, "not from this page"),
        ("next", {}, {"Content_Type": "text/plain"}, 415, "not JSON"),
        ("next", [], {}, 200, ""),
        ("next", [1], {}, 400, "no JSON object"),
        ("next", {"a": "b" * 5000}, {}, 413, "too long"),
        ("next", {}, {"Content_Length": "-1"}, 411, "no length"),
        ("next", {}, {"Content_Length": "9" * 5000}, 413, "too long"),
        ("elsewhere", {}, {}, 404, "nothing here"),
        ("vote", {"id": "p0", "answer": "left"}, {}, 400, "there is no such pair; load the page again"),
        ("vote", {"id": ["p0"], "answer": "left"}, {}, 400, "no such pair"),
        ("vote", {"id": None, "answer": "first"}, {}, 400, "no such pair"),
        ("vote", {"id": "KNOWN", "answer": "first"}, {}, 400, "no such answer; give one of left, right, tie, skip"),
        ("vote", {"id": "KNOWN", "answer": ["left"]}, {}, 400, "no such answer"),
        ("undo", {"id": 3}, {}, 400, "no such pair"),
    ],
)
def test_what_is_no_vote_of_the_page_is_turned_down(
    what: str, given: object, headers: dict[str, str], status: int, says: str, desk: Desk, address: str
) -> None:
    if isinstance(given, dict) and given.get("id") == "KNOWN":
        given = given | {"id": next(iter(desk.pairs))}
    found, answer = post(address, what, given, **headers)
    assert (found, says in answer.get("error", "")) == (status, True), answer
    assert not desk.votes.all()


def test_without_the_token_there_is_nothing(desk: Desk, address: str) -> None:
    token = urlsplit(address).path.strip("/")
    assert len(token) > 20
    for other in ("", "x", token[:-1], token + "x", token.swapcase(), "%2e%2e", "%c3%a9"):
        wrong = address.replace(token, other)
        for status, _, body in (request(wrong), request(wrong, "POST", "vote", b"{}", Content_Type="application/json")):
            assert status == 403 and b"of another start" in body and b"question" not in body
    with served(desk) as again:
        assert urlsplit(again).path != urlsplit(address).path
    assert request(address, "GET", "../etc/passwd")[0] == 404 and request(address, "GET", "vote")[0] == 404
    assert request(address, "PUT")[0] == request(address, "OPTIONS")[0] == 501


def test_it_listens_on_the_loopback_interface_alone(address: str) -> None:
    url = urlsplit(address)
    assert url.hostname == "127.0.0.1" and url.port
    assert request(address, Host=f"localhost:{url.port}")[0] == 200, "as a tunnel may call it"
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"]
    assert f"0100007F:{url.port:04X}" in listening and f"00000000:{url.port:04X}" not in listening


def test_the_page_is_complete_in_itself(address: str) -> None:
    status, headers, body = request(address)
    page = body.decode()
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8" and headers["Cache-Control"] == "no-store"
    assert not re.findall(
        r"https?://|@import|url\(|\ssrc=|\bstyle=|\son\w+=|innerHTML|insertAdjacent|document\.write|eval\(", page
    )
    (nonce,) = set(re.findall(r'nonce="([^"]+)"', page))
    policy = headers["Content-Security-Policy"]
    assert policy.startswith(f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}';")
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy and "form-action 'none'" in policy
    assert nonce not in request(address)[2].decode()
    assert "question 0?" not in page, "texts come as data, apart from the page"
    assert "Python" not in headers["Server"]


def test_what_is_shown_hides_nothing() -> None:
    assert shown("a\r\nb\rc\td é 日本語\u3000مرحبا \u200f👩\u200d💻") == "a\nb\nc\td é 日本語\u3000مرحبا \u200f👩\u200d💻"
    assert shown("\x1b[31m \x00 \u202egnp.exe \u2066") == "\\x1b[31m \\x00 \\u202egnp.exe \\u2066"


def test_a_conversation_is_shown_as_its_turns(tmp_path: Path) -> None:
    turns = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi\r\n"})
    record = PreferenceRecord(turns, ({"role": "assistant", "content": "a"},), ({"role": "assistant", "content": "b"},))
    with Votes(tmp_path / "votes.jsonl") as votes:
        pair = Desk(pairs_of([record]), votes, seed=0).next()["pair"]
    assert pair["prompt"] == [{"role": "system", "text": "Be kind."}, {"role": "user", "text": "Hi\n"}]
    assert {pair["left"], pair["right"]} == {"a", "b"}


def test_a_vote_that_is_not_on_disk_is_not_confirmed(desk: Desk, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = post(address, "next")[1]["pair"]

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        status, answer = post(address, "vote", {"id": pair["id"], "answer": "left"})
    assert status == 500 and "No space left on device" in answer["error"] and not desk.votes.all()
    assert post(address, "vote", {"id": pair["id"], "answer": "left"})[0] == 200


def test_it_waits_for_the_last_vote_and_for_a_change_of_mind(desk: Desk, address: str) -> None:
    told: list[tuple[int, int]] = []
    ended = threading.Event()
    waiting = threading.Thread(target=lambda: (desk.wait(lambda *counts: told.append(counts), grace=0.5), ended.set()))
    waiting.start()
    vote_for(address, "worse")
    post(address, "undo")
    time.sleep(0.8)
    assert not ended.is_set() and told[-1] == (5, 6), "the last vote was taken back"
    vote_for(address, "worse")
    assert not ended.is_set()
    assert ended.wait(20)
    waiting.join()
    assert told[0] == (0, 6) and told[-1] == (6, 6) and (6, 6) in told[:-1]


def test_a_connection_that_says_nothing_holds_nobody_up(desk: Desk, address: str) -> None:
    url = urlsplit(address)
    with socket.create_connection((str(url.hostname), url.port or 0)) as silent:
        silent.sendall(b"POST / HTTP/1.1\r\n")
        vote_for(address, "better")
    assert len(desk.votes.all()) == 6


def test_a_port_that_is_taken_is_refused_in_one_line(desk: Desk, address: str) -> None:
    port = urlsplit(address).port or 0
    with (
        pytest.raises(ConfigError, match=f"port {port}: cannot be served on: .*; give another port, or 0"),
        served(desk, port=port),
    ):
        pass
    with served(desk) as other:
        assert urlsplit(other).port != port


def test_votes_on_other_pairs_and_of_others_are_left_alone(desk: Desk, address: str) -> None:
    desk.votes.cast(Vote("p-of-other-data", "tie", "first", "ann"))
    desk.votes.cast(Vote(next(iter(desk.pairs)), "tie", "first", "bob"))
    state = post(address, "undo")[1]
    assert state["done"] == 0 and len(desk.votes.all()) == 2
