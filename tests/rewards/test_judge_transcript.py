"""The judge's transcript: nothing answered is asked again, also after a kill; nothing else passes for one."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from judge_world import XYZ, by_length, faulty, judging, lines, settings, shown
from polyref.errors import RunFolderError
from polyref.rewards.judge import Judge
from polyref.serving.transcript import Reply, Transcript

pytestmark = pytest.mark.usefixtures("loopback")


def test_a_finished_run_is_read_from_the_transcript_without_a_server(tmp_path):
    with judging(by_length) as world, Judge(settings(world.url), tmp_path / "deep" / "t") as judge:
        g = judge(*XYZ)
    before = (tmp_path / "deep" / "t").read_bytes()
    with Judge(settings("http://127.0.0.1:9/v1"), tmp_path / "deep" / "t") as judge:
        assert torch.equal(judge(*XYZ), g)
    assert (tmp_path / "deep" / "t").read_bytes() == before and before.count(b"\n") == 2 * len(world.bodies)
    answered = [line for line in lines(tmp_path / "deep" / "t") if line["event"] == "answered"]
    assert {shown(line["request"]) for line in answered} == {shown(body) for body in world.bodies}
    assert all(line["reply"] == f"VERDICT: {round(100 * line['verdict'])}" for line in answered)


@pytest.mark.parametrize(
    "changes", [{"model": "k"}, {"criterion": "Shorter is better."}, {"temperature": 0.5}, {"reply_tokens": 9}]
)
def test_another_judge_is_asked_anew(tmp_path, changes):
    with judging(by_length) as world:
        for change in ({}, changes):
            with Judge(settings(world.url, **change), tmp_path / "t") as judge:
                judge(*XYZ)
    assert len(world.bodies) == 8


@pytest.mark.parametrize(
    "torn", [b"{", b'{"event": "answered", "digest": "00', b'{"event": "asked", "digest": "0", "tokens": 1}']
)
def test_a_torn_last_line_is_dropped(tmp_path, torn, caplog):
    with judging(by_length) as world, Judge(settings(world.url), tmp_path / "t") as judge:
        judge(*XYZ)
    whole = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(whole + torn)
    with caplog.at_level(logging.WARNING), Transcript(tmp_path / "t") as transcript:
        assert len(transcript.replies) == transcript.requests == 4
    assert "torn last line" in caplog.text and (tmp_path / "t").read_bytes() == whole


def test_a_request_without_an_outcome_stays_charged_and_is_asked_again(tmp_path):
    with judging(by_length) as world:
        with Judge(settings(world.url, concurrency=1), tmp_path / "t") as judge:
            judge(["x"], ["aa"], ["a"])
        whole = (tmp_path / "t").read_bytes()
        kept = whole[: whole[:-1].rfind(b"\n") + 1]  # as if killed between the second request and its reply
        (tmp_path / "t").write_bytes(kept)
        with Judge(settings(world.url), tmp_path / "t") as judge:
            most = lines(tmp_path / "t")[-1]["tokens"]
            assert judge.transcript.tokens == 100 + most and judge.transcript.requests == 2
            judge(["x"], ["aa"], ["a"])
            assert judge.transcript.tokens == 200 + most and judge.transcript.requests == 3
    with Transcript(tmp_path / "t") as transcript:
        assert transcript.tokens == 200 + most and transcript.requests == 3


BAD_LINES = (
    "not json",
    "[]",
    "{}",
    '{"event": "paid", "digest": "0", "tokens": 1}',
    '{"event": "asked", "digest": "0", "tokens": -1}',
    '{"event": "asked", "digest": "0", "tokens": 1.5}',
    '{"event": "answered", "digest": "0", "tokens": 1, "verdict": 1, "reply": "VERDICT: 100", "finish_reason": "stop"}',
    '{"event": "failed", "digest": [], "tokens": 1, "error": "x"}',
    '{"event": "asked", "digest": "0", "tokens": 9, "\\u0074okens": 1}',
)


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_file_that_is_no_transcript_is_refused_and_left_alone(tmp_path, bad):
    (tmp_path / "t").write_text('{"event": "asked", "digest": "1", "tokens": 1}\n' + bad + "\n")
    before = (tmp_path / "t").read_bytes()
    for _ in range(2):
        with pytest.raises(RunFolderError, match="t, line 2: is no line of a transcript; restore it, or name another"):
            Transcript(tmp_path / "t")
    assert (tmp_path / "t").read_bytes() == before


def test_two_processes_cannot_share_a_transcript_and_a_full_disk_leaves_no_torn_line(tmp_path, monkeypatch):
    with Transcript(tmp_path / "t") as transcript:
        with pytest.raises(RunFolderError, match="is in use by another process"):
            Transcript(tmp_path / "t")
        transcript.asked("0", 5)
        before = (tmp_path / "t").read_bytes()
        whole = os.write
        monkeypatch.setattr(os, "write", lambda file, content: whole(file, content[:10]))
        with pytest.raises(RunFolderError, match="cannot be written: No space left on device"):
            transcript.answered("0", Reply("VERDICT: 1", "stop", 3), {}, verdict=0.01)
        assert (tmp_path / "t").read_bytes() == before
    transcript.close()  # twice is safe


KILLED = """
import sys
from polyref.rewards.judge import Judge, JudgeSettings

url, transcript, pairs = sys.argv[1], sys.argv[2], int(sys.argv[3])
settings = JudgeSettings(base_url=url, model="j", first_wait=0.01, timeout=0.5, attempts=20, concurrency=3)
with Judge(settings, transcript) as judge:
    judge([f"x{i}" for i in range(pairs)], ["aa"] * pairs, ["a"] * pairs)
"""


def test_after_a_kill_in_mid_run_nothing_answered_is_asked_again(tmp_path):
    pairs, path, killed = 40, tmp_path / "t", threading.Event()

    def share(first, second):
        if upstream.answered >= 20:
            killed.wait(30)  # so that as much as can be is under way at the kill
        return by_length(first, second)

    faults = ["", "429", "", "html", "500", "timeout", "close"]
    with judging(share) as upstream, faulty(upstream.url, faults) as world:
        command = [sys.executable, "-c", KILLED, world.url, str(path), str(pairs)]
        with subprocess.Popen(command) as process:
            while process.poll() is None and (not path.exists() or path.read_bytes().count(b'"answered"') < 15):
                time.sleep(0.005)
            time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
        killed.set()
        assert process.returncode == -signal.SIGKILL
        time.sleep(0.2)  # what was under way reaches the server's books
        known = {shown(line["request"]) for line in lines(path) if line["event"] == "answered"}
        before = len(world.bodies)
        asked, outcomes = count(path, "asked"), count(path, "answered") + count(path, "failed")
        with Judge(settings(world.url), path) as judge:
            g = judge([f"x{i}" for i in range(pairs)], ["aa"] * pairs, ["a"] * pairs)
            transcript = judge.transcript
    again = [shown(body) for body in world.bodies[before:]]
    assert 15 <= len(known) <= 20 and not known & set(again)
    assert len(again) == len(set(again)) == 2 * pairs - len(known)
    assert asked - outcomes <= 3 and asked - 3 <= before <= asked  # at most what was under way is unaccounted for, and charged
    lost = sum(line.get("error", "").startswith(("nothing in", "the answer is")) for line in lines(path))
    assert (
        len(upstream.bodies) <= 2 * pairs + lost + 3
    )  # what the judge itself answered twice was lost on the way, or at the kill
    assert transcript.requests == asked + len(again) and torch.equal(g, torch.full_like(g, g[0].item()))


def count(path, event):
    return sum(line["event"] == event for line in lines(path))
