"""The engine behind a server: what is asked, what becomes of faults and restarts, whose log-probabilities count."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fakes import byte_tokenizer, saved_llama, tiny_llama
from judge_world import Answer, World, faulty, lines, listening
from polyref.errors import ConfigError, DataError, ModelError
from polyref.samplers.engine import Completion, SamplingParameters
from polyref.samplers.rescore import LocalScorer
from polyref.samplers.server import ServerEngine
from polyref.samplers.server_settings import ServerSettings
from served_world import transformers_serve

pytestmark = pytest.mark.usefixtures("loopback")

PARAMETERS = SamplingParameters(8)
HI = ({"role": "user", "content": "hi"},)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def settings(url: str, **changes: Any) -> ServerSettings:
    return ServerSettings(**{"base_url": url, "model": "m", "first_wait": 0.01, "timeout": 5.0} | changes)


def said(body: dict[str, Any]) -> str:
    """What the stub draws: it depends on the prompt and the seed alone."""
    return f" {len(json.dumps(body.get('prompt', body.get('messages'))))} and {body.get('seed', 0) % 1000}"


def answer(body: dict[str, Any], text: str | None, *, finish_reason: str = "stop", **more: Any) -> Answer:
    """A completion or a chat completion of one choice, as `body` asks for."""
    written = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
    choice = {"index": 0, "finish_reason": finish_reason, **written, **more}
    return 200, {"Content-Type": "application/json"}, json.dumps({"choices": [choice], "usage": {"total_tokens": 9}}).encode()


@contextmanager
def drawing(port: int = 0) -> Iterator[World]:
    with listening(lambda body, _: answer(body, said(body)), port=port) as world:
        yield world


def texts(drawn: list[list[Completion]]) -> list[list[str]]:
    return [[completion.text for completion in row] for row in drawn]


def test_each_completion_is_one_request_with_a_seed_of_its_own(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with drawing() as world:
        with ServerEngine(settings(world.url), tokenizer, tmp_path / "t", system_prompt="be kind") as engine:
            drawn = engine(["a", HI, "a"], 3, SamplingParameters(8, 0.7, 0.9), seed=1)
        with ServerEngine(settings(world.url), tokenizer, tmp_path / "u", system_prompt="be kind") as engine:
            turned = engine([HI, "a"], 2, SamplingParameters(8, 0.7, 0.9), seed=1)
            assert texts(engine(["a"], 2, SamplingParameters(8, 0.7, 0.9), seed=2)) != texts(turned[1:])
    first = world.bodies[:9]
    assert {body["seed"] for body in first if "prompt" in body} and len({body["seed"] for body in first}) == 9
    assert all(0 <= body["seed"] < 2**31 for body in first)
    plain = next(body for body in first if "prompt" in body)
    assert {k: v for k, v in plain.items() if k != "seed"} == {
        "prompt": "be kind\n\na", "model": "m", "max_tokens": 8, "stream": False, "temperature": 0.7, "top_p": 0.9
    }  # fmt: skip
    chat = next(body for body in first if "messages" in body)
    assert chat["messages"] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert texts(turned) == [texts(drawn)[1][:2], texts(drawn)[0][:2]], "neither order nor company nor n matters"
    assert not set(texts(drawn)[0]) & set(texts(drawn)[2]), "equal prompts have draws of their own"


def test_canonical_tokens_and_nobodys_log_probabilities(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    def reply(body: dict[str, Any], _: World) -> Answer:
        return answer(body, " yes", finish_reason="length" if "prompt" in body else "stop")

    with listening(reply) as world, ServerEngine(settings(world.url), tokenizer, tmp_path / "t") as engine:
        [[cut], [whole]] = engine(["a", HI], 1, PARAMETERS, seed=0)
    ids = tuple(tokenizer(" yes", add_special_tokens=False)["input_ids"])
    assert (cut.token_ids, cut.ended, whole.token_ids, whole.ended) == (ids, False, (*ids, 2), True)
    assert math.isnan(cut.logp) and math.isnan(whole.drawn_logp)


def test_a_completion_that_ends_at_once_is_empty_and_ended(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    def reply(body: dict[str, Any], _: World) -> Answer:
        return answer(body, None if "messages" in body else "")

    with listening(reply) as world, ServerEngine(settings(world.url), tokenizer, tmp_path / "t") as engine:
        drawn = engine(["a", HI], 1, PARAMETERS, seed=0)
    assert [(one.token_ids, one.text, one.ended) for (one,) in drawn] == [((2,), "", True)] * 2


def test_a_scorer_gives_what_the_server_does_not(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama(tokenizer, seed=1).double()
    warm = SamplingParameters(8, temperature=0.5)
    scorer = LocalScorer(model, tokenizer)
    ids = (*tokenizer(" no", add_special_tokens=False)["input_ids"], 2)

    def reply(body: dict[str, Any], _: World) -> Answer:
        logps = [-0.5, -1.0, -1.5, -2.0]
        given = {"content": [{"logprob": x} for x in logps]} if "messages" in body else {"token_logprobs": logps}
        kept = list(ids[:-1] if body["max_tokens"] == 9 else ids)
        return answer(body, " no", token_ids=kept, logprobs=given | {"tokens": []})

    with listening(reply) as world:
        with ServerEngine(settings(world.url, token_ids=True), tokenizer, tmp_path / "t", scorer=scorer) as engine:
            for prompt in ("a", HI):
                [[told]] = engine([prompt], 1, PARAMETERS, seed=0)
                [[warmed]] = engine([prompt], 1, warm, seed=0)
                [[endless]] = engine([prompt], 1, SamplingParameters(9), seed=0)
                assert (told.token_ids, told.logp, told.drawn_logp) == (ids, -5.0, -5.0)
                assert warmed.token_ids == endless.token_ids == ids, "the end is part of a completion that has ended"
                assert (warmed.logp, warmed.drawn_logp) == scorer(prompt, [ids], warm)[0] and warmed.logp != warmed.drawn_logp
                assert endless.logp == scorer(prompt, [ids], PARAMETERS)[0][0] != -5.0
        with ServerEngine(settings(world.url, token_ids=True), tokenizer, tmp_path / "t") as engine:
            before = len(world.bodies)
            assert engine(["a"], 1, PARAMETERS, seed=0)[0][0].logp == -5.0 and len(world.bodies) == before, "it is kept too"
    assert world.bodies[0]["return_token_ids"] is True and all(body["logprobs"] == 1 for body in world.bodies)


def test_a_storm_of_faults_loses_nothing_and_repeats_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    faults = ["timeout", "429", "500", "close", "html", "cut", "torn", "empty"] * 2
    prompts = [({"role": "user", "content": f"q{i}"},) for i in range(4)]
    with drawing() as upstream, faulty(upstream.url, faults, silence=2.5) as world:
        with ServerEngine(settings(world.url, timeout=1.5, attempts=20), tokenizer, tmp_path / "t") as engine:
            drawn = engine(prompts, 4, PARAMETERS, seed=0)
            transcript = engine.transcript
        with ServerEngine(settings(upstream.url), tokenizer, tmp_path / "calm") as engine:
            assert texts(engine(prompts, 4, PARAMETERS, seed=0)) == texts(drawn)
    assert transcript.failed == len(faults) and transcript.requests == 16 + len(faults)
    answered = Counter(line["digest"] for line in lines(tmp_path / "t") if line["event"] == "answered")
    assert len(answered) == 16 and set(answered.values()) == {1}


def test_a_server_that_is_restarted_in_mid_run_is_waited_for(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts, ready, drawn = [f"q{i}" for i in range(6)], threading.Event(), list[Any]()

    def slowly(body: dict[str, Any], world: World) -> Answer:
        if len(world.bodies) > 8:
            ready.set()
            return None
        return answer(body, said(body))

    with listening(slowly) as world:
        port = int(world.url.split(":")[2].split("/")[0])
        engine = ServerEngine(settings(world.url, attempts=60, longest_wait=0.2), tokenizer, tmp_path / "t")
        thread = threading.Thread(target=lambda: drawn.extend(engine(prompts, 4, PARAMETERS, seed=0)))
        thread.start()
        assert ready.wait(30)
    time.sleep(0.1)  # nobody listens
    with drawing(port) as again:
        thread.join(60)
    engine.close()
    assert len(drawn) == 6 and all(len(set(row)) == 4 for row in texts(drawn))
    asked = Counter((body["prompt"], body["seed"]) for body in again.bodies)
    assert set(asked.values()) == {1} and len(asked) == 24 - 8
    assert not {(body["prompt"], body["seed"]) for body in world.bodies[:8]} & asked.keys(), "what was answered stays so"


def test_an_interrupted_run_goes_on_from_its_transcript(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    kept, told = dict[int, list[Completion]](), list[tuple[int, int, float]]()

    def finished(prompt: int, completions: list[Completion]) -> None:
        kept[prompt] = completions
        if len(kept) == 2:
            raise OSError("the disk is full")

    prompts = [f"q{i}" for i in range(5)]
    with drawing() as world:
        with ServerEngine(settings(world.url, concurrency=1), tokenizer, tmp_path / "t", finished=finished) as engine:
            with pytest.raises(OSError, match="disk is full"):
                engine(prompts, 3, PARAMETERS, seed=0)
        before = len(world.bodies)
        with ServerEngine(settings(world.url), tokenizer, tmp_path / "t", progress=lambda *at: told.append(at)) as engine:
            drawn = engine(prompts, 3, PARAMETERS, seed=0)
    assert len(kept) == 2 and before == 6 and len(world.bodies) == 15
    assert all(texts([drawn[i]]) == texts([completions]) for i, completions in kept.items())
    assert [at[:2] for at in told] == [(3 * i, 15) for i in range(1, 6)] and all(at[2] > 0 for at in told)


def test_without_seeds_draws_are_still_requests_of_their_own(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with drawing() as world, ServerEngine(settings(world.url, seeds=False), tokenizer, tmp_path / "t") as engine:
        engine(["a", "a"], 3, PARAMETERS, seed=0)
        engine(["a", "a"], 3, PARAMETERS, seed=0)
        engine(["a", "a"], 3, PARAMETERS, seed=1)
    assert len(world.bodies) == 12 and not any("seed" in body for body in world.bodies)


def test_what_cannot_be_is_one_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reply(body: dict[str, Any], _: World) -> Answer:
        if body["prompt"] == "long":
            return 400, {}, b'{"error": "longer than the context"}'
        if body["prompt"] == "full":
            return answer(body, "x", finish_reason="length", token_ids=[5, 6])
        return answer(body, "x", finish_reason="content_filter" if body["prompt"] == "bad" else "stop")

    with listening(reply) as world, ServerEngine(settings(world.url, concurrency=1), tokenizer, tmp_path / "t") as engine:
        with pytest.raises(DataError, match="^prompt 2: is not answered: .*longer than the context"):
            engine(["a", "long"], 1, PARAMETERS, seed=0)
        with pytest.raises(ModelError, match="^server m: the server ended a completion of prompt 1 by content_filter"):
            engine(["bad"], 1, PARAMETERS, seed=0)
        with pytest.raises(ModelError, match="^server m, prompt 1: a completion was cut after 2 tokens"):
            engine(["full"], 1, PARAMETERS, seed=0)
        with pytest.raises(ConfigError, match="n is 0"):
            engine(["a"], 0, PARAMETERS, seed=0)
    with ServerEngine(settings("http://127.0.0.1:9/v1", attempts=1), tokenizer, tmp_path / "t") as engine:
        with pytest.raises(ModelError, match=r"^server at http://127.0.0.1:9/v1: no answer in 1 attempts"):
            engine(["other"], 1, PARAMETERS, seed=0)
    monkeypatch.delenv("SERVER_KEY", raising=False)
    with pytest.raises(ConfigError, match="^environment variable SERVER_KEY: holds no key"):
        ServerEngine(settings(world.url, key_variable="SERVER_KEY"), tokenizer, tmp_path / "t")
    for wrong in (
        {"concurrency": 0},
        {"limit_name": "n"},
        {"extra_body": {"n": 2}},
        *({"extra_body": {name: 1}} for name in ("stop", "stream", "logprobs", "top_logprobs", "echo", "response_format")),
        *({"extra_body": {name: 5}} for name in ("top_k", "min_tokens", "repetition_penalty", "presence_penalty")),
        {"timeout": 0.0},
        {"model": "m", "attempts": 0},
    ):
        with pytest.raises(ConfigError):
            settings(world.url, **wrong)
    with pytest.raises(ConfigError, match="^extra_body holds stop, tools; these have settings of their own"):
        settings(world.url, extra_body={"stop": ["x"], "tools": []})
    with pytest.raises(ConfigError, match="^extra_body sets top_k to 50: it would change the law.* turn it off by 0 or -1$"):
        settings(world.url, extra_body={"top_k": 50})
    assert settings(world.url, extra_body={"top_k": -1, "repetition_penalty": 1.0, "min_p": None, "user": "me"})


def test_a_field_that_is_not_known_is_refused_unless_it_is_trusted() -> None:
    url, unknown = "http://127.0.0.1/v1", {"samplers": ["temperature"], "dynasty": 1}
    with pytest.raises(ConfigError, match="^extra_body holds dynasty, samplers, which may change the law.* trusted_fields"):
        settings(url, extra_body=unknown)
    assert settings(url, extra_body=unknown | {"mirostat": 0}, trusted_fields=["samplers", "dynasty"])
    for name, value in (("mirostat", 2), ("xtc_probability", 0.5), ("dry_multiplier", 0.8), ("top_n_sigma", 1.0)):
        with pytest.raises(ConfigError, match=f"^extra_body sets {name} to {value}: it would change the law"):
            settings(url, extra_body={name: value}, trusted_fields=[name])
    with pytest.raises(ConfigError, match="^extra_body holds stop; these have settings of their own"):
        settings(url, extra_body={"stop": "x"}, trusted_fields=["stop"])
    with pytest.raises(ConfigError, match="^trusted_fields is text; give a list of names"):
        settings(url, trusted_fields="samplers")


def test_the_key_goes_to_the_server_and_nowhere_else(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVER_KEY", "sk-very-secret")
    with listening(lambda body, _: answer(body, "sk-very-secret")) as world:
        with ServerEngine(settings(world.url, key_variable="SERVER_KEY"), tokenizer, tmp_path / "t") as engine:
            [[drawn]] = engine(["a"], 1, PARAMETERS, seed=0)
    assert world.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert "sk-very-secret" not in (tmp_path / "t").read_text() + drawn.text + repr(engine.settings)


def test_every_setting_is_documented_with_its_default() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "samplers.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", page, flags=re.M))
    made = ServerSettings(base_url="http://127.0.0.1/v1", model="m")
    for field in dataclasses.fields(ServerSettings):
        default = getattr(made, field.name)
        required = field.name in ("base_url", "model")
        shown = "required" if required else "none" if default in (None, {}, ()) else f"`{str(default).lower()}`"
        assert rows[field.name] == shown, field.name


@pytest.mark.slow
@pytest.mark.ci
def test_a_real_server_behind_faults_and_a_restart(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = str(saved_llama(tmp_path / "model", tokenizer, max_position_embeddings=8192))
    chats = [({"role": "user", "content": f"q{i}"},) for i in range(2)]
    drawn_freely = json.dumps({"do_sample": True, "top_k": 0, "eos_token_id": 2, "pad_token_id": 0})
    usual: dict[str, Any] = {
        "model": folder,
        "timeout": 60.0,
        "concurrency": 2,
        "extra_body": {"generation_config": drawn_freely},
        "trusted_fields": ["generation_config"],
    }
    scorer = LocalScorer(tiny_llama(tokenizer, max_position_embeddings=8192), tokenizer)
    with transformers_serve(tmp_path) as url, faulty(url, ["429", "html", "", "close", "cut", "torn", "500"]) as world:
        options = settings(world.url, attempts=10, **usual)
        with ServerEngine(options, tokenizer, tmp_path / "t", scorer=scorer) as engine:
            first = engine(chats[:1], 3, PARAMETERS, seed=0)
            assert (engine.transcript.requests, engine.transcript.failed) == (9, 6)
    with transformers_serve(tmp_path) as url:
        with ServerEngine(settings(url, **usual), tokenizer, tmp_path / "t", scorer=scorer) as engine:
            again = engine(chats, 3, PARAMETERS, seed=0)
            plain = engine(["some text"], 3, PARAMETERS, seed=0)
            assert engine.transcript.requests == 9 + 3 + 3
    assert again[0] == first[0] and len({completion.text for row in again for completion in row}) > 2
    for completion in (completion for row in (*again, *plain) for completion in row):
        assert completion.logp == completion.drawn_logp < 0 and (2 in completion.token_ids) == completion.ended


@pytest.mark.slow
@pytest.mark.ci
def test_a_real_server_killed_in_mid_run_and_started_again_is_waited_for(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Its process dies while requests are under way, and comes back on its port; a proxy of it then times out."""
    folder = str(saved_llama(tmp_path / "model", tokenizer, max_position_embeddings=8192))
    drawn_freely = json.dumps({"do_sample": True, "top_k": 0, "eos_token_id": 2, "pad_token_id": 0})
    usual: dict[str, Any] = {"model": folder, "concurrency": 2, "extra_body": {"generation_config": drawn_freely}}
    usual["trusted_fields"] = ["generation_config"]
    chats, ready, drawn = [({"role": "user", "content": f"q{i}"},) for i in range(5)], threading.Event(), list[Any]()
    with transformers_serve(tmp_path) as url:
        options = settings(url, attempts=2000, longest_wait=0.2, timeout=60.0, **usual)
        engine = ServerEngine(options, tokenizer, tmp_path / "t", finished=lambda *_: ready.set())
        thread = threading.Thread(target=lambda: drawn.extend(engine(chats[:4], 6, PARAMETERS, seed=0)), daemon=True)
        thread.start()
        assert ready.wait(120)
    before = (tmp_path / "t").read_bytes()
    assert not drawn, "it was in mid-run"
    with transformers_serve(tmp_path, port=int(url.split(":")[2].split("/")[0])):
        thread.join(180)
        engine.close()
        with faulty(url, ["timeout", "timeout", "", "timeout"], silence=11.0) as world:
            hasty = settings(world.url, attempts=20, timeout=10.0, **usual)
            with ServerEngine(hasty, tokenizer, tmp_path / "t") as engine:
                again = engine(chats, 6, PARAMETERS, seed=0)
    assert [len(row) for row in again] == [6] * 5 and texts(again[:4]) == texts(drawn)
    assert (tmp_path / "t").read_bytes().startswith(before), "what was answered stays so"
    events = lines(tmp_path / "t")
    answered = Counter(line["digest"] for line in events if line["event"] == "answered")
    failures = [line["error"] for line in events if line["event"] == "failed"]
    assert len(answered) == 30 and set(answered.values()) == {1}, "nothing is lost, and nothing is there twice"
    assert answered.keys() == {line["digest"] for line in events if line["event"] == "asked"}
    assert any("cannot connect" in error for error in failures) and failures.count("nothing in 10 s") >= 3
