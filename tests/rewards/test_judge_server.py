"""The judge against a real server: `transformers serve` with a model that babbles and one that keeps to the form."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time

import pytest
import torch

from fakes import byte_tokenizer, saved_llama
from judge_world import HOSTILE, faulty, lines, settings, shown
from polyref.errors import ModelError
from polyref.rewards.judge import Judge
from served_world import saved_verdict_model, transformers_serve

pytestmark = pytest.mark.usefixtures("loopback")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of `transformers serve`, a random model and one that keeps to the form."""
    folder = tmp_path_factory.mktemp("served")
    noise = str(saved_llama(folder / "noise", byte_tokenizer(), max_position_embeddings=8192))
    keeps = saved_verdict_model(folder / "keeps", "VERDICT: 73")
    with transformers_serve(folder) as url:
        yield url, noise, keeps


@pytest.mark.slow
@pytest.mark.ci
def test_a_real_server_whose_model_babbles_gives_no_label(served, tmp_path):
    url, noise, _ = served
    with Judge(settings(url, model=noise, tries=2, timeout=60.0, concurrency=2), tmp_path / "t") as judge:
        found = judge.verdicts(["x", "y"], ["a", "b"], ["b", "c"])
        with pytest.raises(ModelError, match="row 1: 2 of 2 pairs have no verdict: 2 replies were no verdict; the last: "):
            judge(["x", "y"], ["a", "b"], ["b", "c"])
        transcript = judge.transcript
    assert found.probability.isnan().all() and math.isnan(found.position_bias)
    assert (transcript.requests, transcript.not_verdicts, transcript.failed) == (4, 4, 0)
    answered = [line for line in lines(tmp_path / "t") if line["event"] == "answered"]
    most = {line["digest"]: line["tokens"] for line in lines(tmp_path / "t") if line["event"] == "asked"}
    assert all(0 < line["tokens"] <= most[line["digest"]] for line in answered)  # the server's own count is within the bound


@pytest.mark.slow
@pytest.mark.ci
def test_a_real_server_behind_faults_whose_model_keeps_to_the_form(served, tmp_path):
    url, _, keeps = served
    with faulty(url, ["429", "html", "", "close", "cut", "500"]) as world:
        with Judge(settings(world.url, model=keeps, timeout=60.0, concurrency=2, attempts=10), tmp_path / "t") as judge:
            found = judge.verdicts(["x", "y"], ["a", HOSTILE[4]], ["b", "c"])
            transcript = judge.transcript
    assert found.refused == {} and found.as_first.tolist() == [0.73, 0.73] and found.position_bias == pytest.approx(0.23)
    assert torch.allclose(found.probability, torch.full((2,), 0.5, dtype=torch.float64), atol=1e-15)
    assert (transcript.requests, transcript.failed) == (9, 5)


@pytest.mark.slow
@pytest.mark.ci
def test_a_real_server_without_the_model_is_one_line(served, tmp_path):
    with Judge(settings(served[0], model=str(tmp_path / "none"), timeout=60.0, attempts=2), tmp_path / "t") as judge:
        with pytest.raises(ModelError, match=f"^judge at {served[0]}: ") as error:
            judge(["x"], ["a"], ["b"])
    assert "\n" not in str(error.value)


KILLED = """
import sys
from polyref.rewards.judge import Judge, JudgeSettings

url, model, transcript = sys.argv[1:]
settings = JudgeSettings(base_url=url, model=model, first_wait=0.01, timeout=3.0, attempts=50, concurrency=2)
with Judge(settings, transcript) as judge:
    judge([f"x{i}" for i in range(20)], ["a"] * 20, ["b"] * 20)
"""


@pytest.mark.slow
@pytest.mark.ci
def test_a_judge_killed_in_mid_run_asks_a_real_server_nothing_twice(served, tmp_path):
    url, _, keeps = served
    with Judge(settings(url, model=keeps, timeout=60.0), tmp_path / "warm") as judge:  # its weights are read at the first
        judge(["x"], ["a"], ["b"])
    path, prompts = tmp_path / "t", [f"x{i}" for i in range(20)]
    with faulty(url, ["timeout", "timeout", "429", "html", "cut"], silence=4.0) as world:
        with subprocess.Popen([sys.executable, "-c", KILLED, world.url, keeps, str(path)]) as process:
            while process.poll() is None and (not path.exists() or path.read_bytes().count(b'"answered"') < 10):
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        time.sleep(0.5)  # what was under way reaches the proxy's books
        known, before = {shown(line["request"]) for line in lines(path) if line["event"] == "answered"}, len(world.bodies)
        with Judge(settings(world.url, model=keeps, timeout=60.0, concurrency=2), path) as judge:
            found = judge.verdicts(prompts, ["a"] * 20, ["b"] * 20)
    again = [shown(body) for body in world.bodies[before:]]
    assert 10 <= len(known) < 40 and not known & set(again)
    assert len(again) == len(set(again)) == 40 - len(known)
    assert sum(line.get("error") == "nothing in 3 s" for line in lines(path)) >= 2
    assert found.refused == {} and found.as_first.tolist() == [0.73] * 20
