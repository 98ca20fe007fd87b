"""The judge behind faults: what is retried, what ends a run, and that no budget is exceeded."""

from __future__ import annotations

import json
import socket
import time

import pytest
import torch

from fakes import byte_tokenizer
from judge_world import XYZ, Answer, by_length, completion, faulty, judging, lines, listening, settings, shown
from polyref.errors import ConfigError, ModelError
from polyref.rewards.judge import Judge
from polyref.serving.client import _retry_after

pytestmark = pytest.mark.usefixtures("loopback")


@pytest.mark.parametrize("fault", ["timeout", "429", "500", "close", "html", "cut", "empty"])
def test_a_fault_is_retried_counted_and_charged_at_the_most_it_may_have_cost(tmp_path, fault):
    with judging(by_length) as upstream, faulty(upstream.url, [fault]) as world:
        with Judge(settings(world.url, timeout=0.4, concurrency=1), tmp_path / "t") as judge:
            g = judge(["x"], ["aa"], ["a"])
            transcript = judge.transcript
    assert g.item() == pytest.approx(0.73, abs=0.01)
    assert (transcript.requests, transcript.failed, transcript.not_verdicts) == (3, 1, 0)
    [failed] = [line for line in lines(tmp_path / "t") if line["event"] == "failed"]
    assert failed["tokens"] == (0 if fault == "429" else lines(tmp_path / "t")[0]["tokens"])
    assert transcript.tokens == failed["tokens"] + 2 * 100


def test_a_storm_of_faults_ends_with_every_label_right(tmp_path):
    faults = ["429", "500", "close", "html", "cut", "empty", "timeout"] * 2
    prompts, first, second = [f"x{i}" for i in range(12)], ["aaa"] * 12, ["aa"] * 12
    with judging(by_length, seconds=0.05) as upstream, faulty(upstream.url, faults) as world:
        with Judge(settings(world.url, timeout=0.4, attempts=15), tmp_path / "t") as judge:
            g = judge(prompts, first, second)
            transcript = judge.transcript
    assert torch.equal(g, torch.full_like(g, g[0].item())) and g[0].item() == pytest.approx(0.73, abs=0.01)
    assert transcript.failed == len(faults) and transcript.requests == 24 + len(faults) == len(world.bodies)
    assert 1 < upstream.most_at_once <= 4, "where requests that the client has given up are not held back"


def test_retry_after_is_honoured_by_every_thread(tmp_path):
    with judging(by_length) as upstream, faulty(upstream.url, ["429 soon"]) as world:
        with Judge(settings(world.url, concurrency=1), tmp_path / "t") as judge:
            start = time.monotonic()
            judge(["x"], ["aa"], ["a"])
    assert time.monotonic() - start >= 0.3


def test_a_wait_longer_than_allowed_ends_the_run_and_says_how_long(tmp_path):
    with judging(by_length) as upstream, faulty(upstream.url, ["", "429 long"]) as world:
        with Judge(settings(world.url, concurrency=1), tmp_path / "t") as judge:
            with pytest.raises(
                ModelError, match=r"asks to wait 3600 s; wait that long, or raise longest_wait; 1 replies are kept in"
            ):
                judge(["x"], ["aa"], ["a"])


def test_retry_after_is_read_in_both_forms():
    assert _retry_after(None) == _retry_after("soon") == _retry_after("-5") == _retry_after("nan") == 0
    assert _retry_after(" 2.5 ") == 2.5
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert _retry_after("Wed, 21 Oct 2099 07:28:00 GMT") > 1e9


def test_an_endless_and_a_dripping_answer_are_given_up(tmp_path):
    huge = b" " * (2 << 20)
    with listening(lambda *_: (200, {}, huge)) as world, Judge(settings(world.url, attempts=1), tmp_path / "t") as judge:
        with pytest.raises(ModelError, match="the last: the answer has no end"):
            judge(["x"], ["a"], ["b"])
    with listening(lambda *_: (200, {"Drip": "0.1"}, b" " * 20)) as world:
        with Judge(settings(world.url, attempts=1, timeout=0.3), tmp_path / "t") as judge:
            start = time.monotonic()
            with pytest.raises(ModelError, match=r"the last: nothing in 0\.3 s"):
                judge(["x"], ["a"], ["b"])
    assert time.monotonic() - start < 1.5


def test_what_is_under_way_when_the_run_fails_is_waited_for_and_kept(tmp_path):
    def answer(body, _):
        if "fatal" in shown(body):
            time.sleep(0.1)
            return 403, {}, b"no"
        time.sleep(0.3)
        return completion("VERDICT: 50")

    prompts = ["fatal", *(f"x{i}" for i in range(30))]
    with listening(answer) as world, Judge(settings(world.url, concurrency=4), tmp_path / "t") as judge:
        with pytest.raises(ModelError, match="status 403"):
            judge(prompts, ["a"] * 31, ["b"] * 31)
        assert len(world.bodies) == 4 and len(judge.transcript.replies) == 3 and judge.transcript.tokens == 300
        assert judge(prompts[1:3], ["a"] * 2, ["b"] * 2).tolist() == [0.5, 0.5]  # and the judge can be asked again


def test_without_the_extra_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"^asking a judge needs the package httpx2; pip install 'polyref\[judge\]'$"):
        Judge(settings("http://127.0.0.1/v1"), tmp_path / "t")
    assert not any(tmp_path.iterdir())


def test_no_server_no_model_no_key_and_no_redirect_are_one_line(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with Judge(settings(closed, attempts=2), tmp_path / "t") as judge:
        with pytest.raises(
            ModelError, match=f"^judge at {closed}: no answer in 2 attempts; the last: cannot connect .*; 0 replies"
        ):
            judge(["x"], ["a"], ["b"])
        assert judge.transcript.requests <= 2 * 4 and judge.transcript.tokens == 0
    for status in (301, 400, 401, 403, 404):
        said = (status, {"Location": closed}, b'{"error": "no\nsuch \x1b[31mmodel"}')
        with listening(lambda *_, said=said: said) as world, Judge(settings(world.url), tmp_path / "t") as judge:
            with pytest.raises(ModelError, match=f"the request is refused: status {status}, ") as error:
                judge(["x"], ["a"], ["b"])
        assert len(world.bodies) == 1 and error.value.exit_code == 2
        assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


def test_no_key_comes_back_by_the_finish_reason_or_escaped(tmp_path, monkeypatch, caplog):
    key = 'sk-"very\\secret'
    spellings = (key, json.dumps(key)[1:-1])
    monkeypatch.setenv("JUDGE_KEY", key)
    with listening(lambda *_: completion("VERDICT: no", finish_reason=f"bad key {key} " + "x" * 5000)) as world:
        with Judge(settings(world.url, key_variable="JUDGE_KEY", tries=1), tmp_path / "t") as judge:
            judge.verdicts(["x"], ["a"], ["b"])
            assert all(len(reply.finish_reason) <= 200 for reply in judge.transcript.replies.values())
    with listening(lambda *_: (401, {}, json.dumps({"error": f"bad key {key}"}).encode())) as world:
        with Judge(settings(world.url, key_variable="JUDGE_KEY"), tmp_path / "u") as judge:
            with pytest.raises(ModelError, match=r"bad key \[key\]") as error:
                judge(["x"], ["a"], ["b"])
    for text in ((tmp_path / "t").read_text(), (tmp_path / "u").read_text(), caplog.text, str(error.value)):
        assert not any(spelling in text for spelling in (*spellings, *(json.dumps(each)[1:-1] for each in spellings)))


def test_no_key_comes_back_in_any_escapes_of_json(tmp_path, monkeypatch, caplog):
    key = 'sk-"very\\secret/0'
    plain, in_hex = json.dumps(key)[1:-1], "".join(f"\\u{ord(c):04X}" for c in key)
    nested = json.dumps(json.dumps(key))[3:-3]
    monkeypatch.setenv("JUDGE_KEY", key)
    told = ""
    spellings = (plain, plain.replace("/", "\\/"), plain.replace("e", "\\u0065"), in_hex, in_hex.lower(), nested)
    for number, spelt in enumerate(spellings):
        with listening(lambda *_, spelt=spelt: (401, {}, f'{{"error": "bad key {spelt}!"}}'.encode())) as world:
            with Judge(settings(world.url, key_variable="JUDGE_KEY"), tmp_path / str(number)) as judge:
                with pytest.raises(ModelError, match=r"bad key \[key\]!") as error:
                    judge(["x"], ["a"], ["b"])
        told += str(error.value) + (tmp_path / str(number)).read_text()
    assert "secret" not in told + caplog.text and "0063" not in told, "nor a part of it"


def test_an_answer_is_what_its_json_says_and_one_that_says_it_twice_is_none(tmp_path):
    def raw(content: str, more: str = "") -> Answer:
        return 200, {}, f'{{"choices": [{{"message": {{"content": "{content}"{more}}}, "finish_reason": "stop"}}]}}'.encode()

    with listening(lambda *_: raw("\\u0056ERDICT\\u003a\\u0020\\u00360")) as world:
        with Judge(settings(world.url, average="probability"), tmp_path / "escaped") as judge:
            assert judge.verdicts(["x"], ["a"], ["b"]).as_first.item() == 0.6
    twice = [raw("VERDICT: 60", ', "content": "VERDICT: 90"'), raw("VERDICT: 60", ', "\\u0063ontent": "VERDICT: 90"')]
    for number, answer in enumerate(twice):
        with listening(lambda *_, answer=answer: answer) as world:
            with Judge(settings(world.url, attempts=2), tmp_path / str(number)) as judge:
                with pytest.raises(ModelError, match="no answer in 2 attempts; the last: the answer is no chat completion"):
                    judge(["x"], ["a"], ["b"])
    replies = ['{"verdict": 60}', "VERDICT\\\\u003a 60", "VERDICT: 60\\nVERDICT: 60"]
    for number, reply in enumerate(replies):
        with listening(lambda *_, reply=reply: raw(reply.replace('"', '\\"'))) as world:
            with Judge(settings(world.url, tries=1), tmp_path / f"reply {number}") as judge:
                assert judge.verdicts(["x"], ["a"], ["b"]).refused.keys() == {0}


def test_one_question_that_the_server_refuses_does_not_stop_the_others(tmp_path):
    def answer(body, _):
        return (400, {}, b"context too long") if "long" in shown(body) else completion("VERDICT: 60")

    with listening(answer) as world, Judge(settings(world.url, concurrency=1), tmp_path / "t") as judge:
        found = judge.verdicts(["x"] * 3, ["a", "long", "c"], ["b", "b", "b"])
    assert found.refused == {1: "the server refused it: status 400, context too long"}
    assert found.probability.isnan().tolist() == [False, True, False] and len(world.bodies) == 5


def test_requests_never_exceed_their_budget_through_retries_and_resumptions(tmp_path):
    with judging(by_length) as upstream, faulty(upstream.url, ["500", "", "500"]) as world:
        for most in (3, 3, 4):
            with Judge(settings(world.url, max_requests=most), tmp_path / "t") as judge:
                with pytest.raises(
                    ConfigError, match=rf"t: the budget of {most} requests is spent; \d+ replies are kept; raise max_"
                ):
                    judge(*XYZ)
            assert len(world.bodies) == most
        with Judge(settings(world.url, max_requests=6), tmp_path / "t") as judge:
            assert judge(*XYZ).shape == (3,) and judge.transcript.requests == 6 == len(world.bodies)


def test_tokens_never_exceed_their_budget_though_many_are_asked_at_once(tmp_path):
    prompts, first, second = [f"x{i}" for i in range(20)], ["aa"] * 20, ["a"] * 20
    with judging(by_length, seconds=0.01) as world:
        with Judge(settings(world.url, max_tokens=4000), tmp_path / "t") as judge:
            with pytest.raises(
                ConfigError, match=r"of 4000 tokens are spent, and the next request may take \d+; \d+ replies are"
            ):
                judge(prompts, first, second)
            spent = judge.transcript.tokens
    most = lines(tmp_path / "t")[0]["tokens"]
    assert 4000 - most - 10 < spent <= 4000 and spent == 100 * world.answered  # settled at what the server says it took


def test_without_a_count_of_tokens_the_most_is_charged_and_it_bounds_any_tokenizer(tmp_path):
    with listening(lambda *_: completion("VERDICT: 50", tokens=None)) as world:
        with Judge(settings(world.url), tmp_path / "t") as judge:
            judge(["日本語"], ["a"], ["b"])
            spent = judge.transcript.tokens
    tokenizer = byte_tokenizer()  # no tokenizer makes more tokens than bytes
    used = sum(
        len(tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)["input_ids"]) for body in world.bodies
    )
    assert used + 2 * 32 <= spent <= used + 2 * (32 + 128)
