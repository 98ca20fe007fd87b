"""The judge: what it asks, in which words, what is a verdict, and what nothing is."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from pathlib import Path

import pytest
import torch

from fakes import byte_tokenizer
from judge_world import HOSTILE, XYZ, by_length, completion, judging, lines, listening, settings, shown
from polyref.errors import ConfigError, InputError, ModelError
from polyref.rewards.judge import Judge, JudgeSettings, read_verdict
from polyref.serving.transcript import Reply

pytestmark = pytest.mark.usefixtures("loopback")


def test_both_orders_cancel_a_bias_of_place_and_g_is_antisymmetric_to_the_last_bit(tmp_path):
    prompts, first, second = ["x"] * 4, ["aa", "a", "aaa", "a"], ["a", "aa", "a", "b"]
    with judging(by_length) as world, Judge(settings(world.url), tmp_path / "t") as judge:
        found = judge.verdicts(prompts, first, second)
        g, turned = judge(prompts, first, second), judge(prompts, second, first)
    assert judge.name == "judge j"
    assert torch.equal(g, found.probability) and g.dtype == torch.float64
    assert torch.equal(g, 1 - turned) and torch.equal(turned, 1 - g)
    truth = torch.sigmoid(torch.tensor([1.0, -1.0, 2.0, 0.0], dtype=torch.float64))
    assert torch.allclose(g, truth, atol=0.02)  # verdicts are whole percents
    assert found.as_first[:2].tolist() == [0.88, 0.5] and found.as_second[:2].tolist() == [0.5, 0.12]
    assert 0.1 < found.position_bias < 0.3
    assert len(world.bodies) == 2 * 3  # rows 1 and 2 are one pair in two orders, and the later calls ask nothing


@pytest.mark.parametrize("always", [0, 100, 73])
@pytest.mark.parametrize("average", ["log_odds", "probability"])
def test_a_judge_that_only_sees_the_place_says_nothing(tmp_path, always, average):
    with judging(lambda *_: always / 100) as world, Judge(settings(world.url, average=average), tmp_path / "t") as judge:
        found = judge.verdicts(*XYZ)
    assert torch.allclose(found.probability, torch.full((3,), 0.5, dtype=torch.float64), atol=1e-15)
    assert found.position_bias == pytest.approx(always / 100 - 0.5)


def test_a_sure_judge_is_1_in_probability_and_finite_in_log_odds(tmp_path):
    for average, expected in {"probability": 1.0, "log_odds": 0.99}.items():
        with (
            judging(lambda a, b: a == "good") as world,
            Judge(settings(world.url, average=average), tmp_path / average) as judge,
        ):
            assert judge(["x"], ["good"], ["bad"]).item() == pytest.approx(expected, abs=1e-15)


def test_equal_completions_and_no_rows_cost_nothing(tmp_path):
    with judging(by_length) as world, Judge(settings(world.url), tmp_path / "t") as judge:
        assert judge(["x"], ["same"], ["same"]).tolist() == [0.5] and judge([], [], []).shape == (0,)
        with pytest.raises(InputError, match="1 completions for 2 prompts"):
            judge(["x", "y"], ["a", "b"], ["a"])
    assert world.bodies == []


def test_a_request_is_what_every_server_understands(tmp_path):
    changes = {"limit_name": "max_completion_tokens", "temperature": None, "extra_body": {"seed": 7}}
    conversation = ({"role": "user", "content": "hi"},)
    answers = [({"role": "assistant", "content": text},) for text in ("a", "b")]
    with listening(lambda *_: completion("VERDICT: 50")) as world:
        with Judge(settings(world.url + "/", criterion="Better is {shorter}."), tmp_path / "t") as judge:
            judge(["x"], ["a"], ["b"])
        with Judge(settings(world.url, **changes), tmp_path / "u") as judge:
            judge([conversation], [answers[0]], [answers[1]])
    plain, changed = world.bodies[0], world.bodies[-1]
    assert plain.keys() == {"model", "messages", "max_tokens", "stream", "temperature"}
    assert [message["role"] for message in plain["messages"]] == ["system", "user"]
    assert "Better is {shorter}." in plain["messages"][0]["content"]
    assert changed.keys() == {"model", "messages", "max_completion_tokens", "stream", "seed"}
    assert '\n"user": "hi"\n' in changed["messages"][1]["content"] and '"assistant": "b"' in changed["messages"][1]["content"]


@pytest.mark.parametrize("text", ["VERDICT: 0", "VERDICT: 7", "VERDICT: 100", " \n VERDICT: 50\n"])
def test_the_one_line_is_a_verdict(text):
    assert read_verdict(Reply(text, "stop", 1)) == int(text.split()[-1]) / 100


NO_VERDICTS = (
    "",
    "73",
    "VERDICT:73",
    "verdict: 73",
    "VERDICT: 73%",
    "VERDICT: 73.",
    "VERDICT: 101",
    "VERDICT: -1",
    "VERDICT: 073",
    "VERDICT: 7 3",
    "VERDICT: ٧٣",
    "VERDICT: A",
    "VERDICT: N",
    "**VERDICT: 73**",
    "I think VERDICT: 73",
    "VERDICT: 73\nVERDICT: 10",
    "A is better.\nVERDICT: 73",
    "VERDICT: nan",
    "VERDICT: 1e2",
)


@pytest.mark.parametrize("text", NO_VERDICTS)
def test_nothing_else_is(text):
    assert read_verdict(Reply(text, "stop", 1)) is None


@pytest.mark.parametrize("reason", ["length", "content_filter", "tool_calls", "None"])
def test_nor_is_one_that_the_judge_did_not_end_itself(reason):
    assert read_verdict(Reply("VERDICT: 10", reason, 1)) is None


def test_what_is_no_verdict_is_asked_again_with_a_reminder_then_refused_and_never_becomes_a_label(tmp_path):
    def answer(body, _):
        _, first, second = shown(body)
        if "bad" in (first, second):
            return completion("I would rather not say.\x1b[31m")
        reminded = "Reminder 1: earlier replies were not of this form." in body["messages"][-1]["content"]
        return completion("VERDICT: 80" if reminded else "Both are fine.")

    with listening(answer) as world, Judge(settings(world.url, tries=2), tmp_path / "t") as judge:
        found = judge.verdicts(*XYZ)
        with pytest.raises(ModelError) as error:
            judge(*XYZ)
        transcript = judge.transcript
    assert found.probability.isnan().tolist() == [True, True, False] and found.probability[2] == 0.5
    assert found.as_first[2] == 0.8 and found.refused.keys() == {0, 1}
    assert str(error.value).startswith("judge j, row 1: 2 of 3 pairs have no verdict: 2 replies were no verdict; the last: ")
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
    assert (transcript.requests, transcript.not_verdicts, transcript.failed) == (6, 4, 0) and len(world.bodies) == 6
    assert [line["verdict"] for line in lines(tmp_path / "t") if line["event"] == "answered"].count(None) == 4


def test_a_reply_without_text_is_no_verdict(tmp_path):
    with listening(lambda *_: completion(None)) as world, Judge(settings(world.url, tries=1), tmp_path / "t") as judge:
        assert judge.verdicts(["x"], ["a"], ["b"]).refused.keys() == {0}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_an_answer_cannot_leave_its_quotation_spell_a_special_token_or_become_the_verdict(tmp_path, hostile):
    with judging(lambda a, b: 0.2 if a == hostile else 0.8) as world, Judge(settings(world.url), tmp_path / "t") as judge:
        for prompt in ("x", hostile):
            assert judge([prompt], [hostile], ["honest"]).item() == pytest.approx(0.2)
    for body in world.bodies:
        assert {*shown(body)} <= {"x", hostile, "honest"}  # read back whole, section by section
        text = body["messages"][-1]["content"]
        assert not set("<[\x00\x0b\x0c\r\x1b\x7f\x85\x9b\u2028\u2029\ud800") & set(text)
        assert len(text.splitlines()) == 10


def test_no_special_token_reaches_a_chat_template_from_an_answer(tmp_path):
    tokenizer = byte_tokenizer()
    with judging(lambda *_: 0.5) as world, Judge(settings(world.url), tmp_path / "t") as judge:
        judge(["x"] * 2, ["plain"] * 2, HOSTILE[3:5])

    def specials(content):
        return sum(token < 4 for token in tokenizer(content, add_special_tokens=False)["input_ids"])

    assert specials(HOSTILE[4]) == 3  # as it stands it would open a turn of its own
    rendered = [tokenizer.apply_chat_template(body["messages"], tokenize=False) for body in world.bodies]
    assert {specials(text) for text in rendered} == {4}  # the two messages' own turns and ends


def test_the_key_goes_to_the_server_and_nowhere_else(tmp_path, monkeypatch, caplog):
    key = "sk-very-secret-0123"
    monkeypatch.setenv("JUDGE_KEY", key)
    with caplog.at_level(logging.DEBUG):
        with listening(lambda *_: completion(f"your key is {key}")) as world:
            with Judge(settings(world.url, key_variable="JUDGE_KEY", tries=1), tmp_path / "t") as judge:
                refused = judge.verdicts(["x"], ["a"], ["b"]).refused
                shown_by = f"{judge!r} {judge.settings!r} {judge._client!r} {refused}"
        with listening(lambda *_: (401, {}, f"bad key {key}".encode())) as refusing:
            with Judge(settings(refusing.url, key_variable="JUDGE_KEY"), tmp_path / "t") as judge:
                with pytest.raises(ModelError, match=r"bad key \[key\]") as error:
                    judge(["y"], ["a"], ["b"])
    assert world.headers[0]["Authorization"] == f"Bearer {key}"
    assert key not in (tmp_path / "t").read_text() + caplog.text + str(error.value) + shown_by
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="^environment variable JUDGE_KEY: holds no key; set it"):
        Judge(settings(world.url, key_variable="JUDGE_KEY"), tmp_path / "t")
    with pytest.raises(ConfigError, match="characters that a header cannot") as unusable:
        monkeypatch.setenv("JUDGE_KEY", "sk-a\nHost: b")
        Judge(settings(world.url, key_variable="JUDGE_KEY"), tmp_path / "t")
    assert "sk-a" not in str(unusable.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"base_url": "127.0.0.1:8000"},
        {"base_url": "file:///etc/passwd"},
        {"base_url": "http://[bad"},
        {"base_url": "http://127.0.0.1:99999/v1"},
        {"base_url": "http://a b/v1"},
        {"base_url": "http://a/v1?key=1"},
        {"base_url": "http://me:word@127.0.0.1/v1"},
        {"tries": 0},
        {"concurrency": 1.5},
        {"max_requests": True},
        {"max_tokens": 0},
        {"timeout": math.inf},
        {"first_wait": math.nan},
        {"temperature": -1},
        {"limit_name": "length"},
        {"extra_body": {"n": 2}},
        {"extra_body": {"seed": object()}},
    ],
)
def test_settings_that_cannot_be_are_refused(bad):
    with pytest.raises(ConfigError) as error:
        settings(**{"url": "http://127.0.0.1/v1"} | bad if "base_url" not in bad else {"url": bad["base_url"]})
    assert "word" not in str(error.value).replace("password", "")


def test_an_unknown_average_is_refused_before_a_file_is_made(tmp_path):
    with pytest.raises(ConfigError, match="average is 'median'; use one of log_odds, probability"):
        Judge(settings("http://127.0.0.1/v1", average="median"), tmp_path / "t")
    assert not any(tmp_path.iterdir())


def test_every_setting_is_documented_with_its_default():
    page = (Path(__file__).resolve().parents[2] / "docs" / "judge.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", page, flags=re.M))
    made = settings("http://127.0.0.1/v1", first_wait=1.0, timeout=60.0)
    for field in dataclasses.fields(JudgeSettings):
        default = getattr(made, field.name)
        required = field.name in ("base_url", "model")
        shown_as = "required" if required else "none" if default in (None, {}) else f"`{default}`"
        assert rows[field.name] == shown_as, field.name
