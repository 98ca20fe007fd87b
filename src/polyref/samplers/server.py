"""Completions drawn by any OpenAI-compatible server: one request each, kept for good, asked for again where they were lost.

A prompt of text is posted to /completions as it is, messages to /chat/completions. The server reads them with a tokenizer and a
template of its own, and draws with whatever else its settings say (top_k, penalties): that they are the model's is for who runs
it to see to. A completion depends on its seed as far as the server heeds seeds, and is read from the transcript ever after.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import xxhash

from polyref.data.encode import render_prompt
from polyref.data.sources import prompt_key
from polyref.errors import ConfigError, DataError, ModelError
from polyref.samplers.engine import Collected, Completion, Finished, Progress, SamplingParameters
from polyref.samplers.rescore import Scorer, Told, canonical_ids, check_cut, completed
from polyref.samplers.server_settings import ServerSettings
from polyref.serving.client import TEMPLATE_TOKENS, Client, Unanswered
from polyref.serving.transcript import Reply
from polyref.types import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Request(NamedTuple):
    """One completion to ask for: which prompt, which of its draws, what is posted where, and what marks it."""

    prompt: int
    draw: int
    path: str
    body: dict[str, Any]
    mark: str


class ServerEngine:
    """An `Engine` behind `settings.base_url`; what it is told is in the file `transcript`, one for each server's model.

    `tokenizer` is the server's model's. Token ids and log-probabilities are the server's if `settings.token_ids` and it gives
    them; else the ids are the canonical tokenisation of the text, and the `scorer`, if there is one, gives the rest (see
    `polyref.samplers.rescore`). `progress`, `finished` and `scorer` are called one at a time, in the threads that ask. Safe to
    interrupt and to kill: a new run asks for what is lacking. ConfigError for n < 1 or a spent budget; DataError for a prompt
    that the server refuses; ModelError for a server that cannot be reached, refuses key or model, or cuts a completion short
    for a reason of its own.
    """

    def __init__(
        self,
        settings: ServerSettings,
        tokenizer: PreTrainedTokenizerBase,
        transcript: str | Path,
        *,
        scorer: Scorer | None = None,
        system_prompt: str | None = None,
        progress: Progress | None = None,
        finished: Finished | None = None,
    ) -> None:
        self.settings, self.tokenizer, self.scorer, self.system_prompt = settings, tokenizer, scorer, system_prompt
        self.progress, self.finished, self.name = progress, finished, f"server {settings.model}"
        self._client = Client(settings, transcript, who="server")
        self.transcript, self._lock = self._client.transcript, threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let server and transcript go. Safe to call twice."""
        self._client.close()

    def __call__(self, prompts: Sequence[Text], n: int, parameters: SamplingParameters, *, seed: int) -> list[list[Completion]]:
        """`n` completions of each prompt, as the protocol says."""
        if n < 1:
            raise ConfigError(f"n is {n}", fix="draw at least one completion a prompt")
        requests = self._requests(prompts, n, parameters, seed)
        collected = Collected(len(prompts), n, self.progress, self.finished)
        replies: list[dict[int, Reply]] = [{} for _ in prompts]

        def draw(request: _Request) -> None:
            most = len(str(request.body).encode()) + TEMPLATE_TOKENS + parameters.max_new_tokens
            try:
                reply = self._client.ask(request.path, request.body, _reply, most=most, mark=request.mark)
            except Unanswered as error:
                fix = "shorten the prompt, or leave it out"
                raise DataError(f"is not answered: {error}", where=f"prompt {request.prompt + 1}", fix=fix) from None
            with self._lock:
                row = request.prompt
                replies[row][request.draw] = reply
                if len(replies[row]) == n:
                    told = [self._told(row, prompts[row], replies[row][i], parameters.max_new_tokens) for i in range(n)]
                    completions = completed(prompts[row], told, parameters, self.scorer)
                    collected.add((row, i, completion) for i, completion in enumerate(completions))

        self._client.each(draw, requests)
        return collected.completions()

    def _requests(self, prompts: Sequence[Text], n: int, parameters: SamplingParameters, seed: int) -> list[_Request]:
        """Every draw has a seed of its own, of 31 bits, made of the seed, the prompt and its place among equal ones."""
        settings, places, requests = self.settings, Counter[str](), list[_Request]()
        for row, prompt in enumerate(prompts):
            path, body = self._question(prompt)
            body |= {"model": settings.model, settings.limit_name: parameters.max_new_tokens, "stream": False}
            body |= {"temperature": parameters.temperature, "top_p": parameters.top_p, **settings.extra_body}
            if settings.token_ids:
                body |= {"return_token_ids": True, "logprobs": True if "messages" in body else 1}
            key = prompt_key(prompt)
            place = f"{seed} {places[key]}"
            places[key] += 1
            first = xxhash.xxh3_64_intdigest(f"{place} {key}".encode())
            for draw in range(n):
                own = {"seed": (first + draw) % 2**31} if settings.seeds else {}
                requests.append(_Request(row, draw, path, body | own, f"{place} {draw}"))
        return requests

    def _question(self, prompt: Text) -> tuple[str, dict[str, Any]]:
        rendered = render_prompt(prompt, self.tokenizer, self.system_prompt)  # which refuses what it does not suit
        if isinstance(prompt, str):
            return "/completions", {"prompt": rendered}
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return "/chat/completions", {"messages": [*system, *prompt]}

    def _told(self, row: int, prompt: Text, reply: Reply, most: int) -> Told:
        if reply.finish_reason not in ("stop", "length"):
            what = f"the server ended a completion of prompt {row + 1} by {reply.finish_reason}: it is of another law"
            raise ModelError(what, where=self.name, fix="leave the prompt out, or ask another server")
        ended = reply.finish_reason == "stop"
        if reply.token_ids is None:
            ids = canonical_ids(prompt, reply.text, ended, self.tokenizer, self.system_prompt)
            return Told(reply.text, ids, None, ended)
        ids, logps = reply.token_ids, reply.logps
        check_cut(len(ids), most, ended, f"{self.name}, prompt {row + 1}")
        if ended and (not ids or ids[-1] not in self.tokenizer.all_special_ids):  # the server keeps the end token to itself
            return Told(reply.text, (*ids, *canonical_ids(prompt, "", True, self.tokenizer)), None, ended)
        return Told(reply.text, ids, logps if logps is not None and len(logps) == len(ids) else None, ended)


def _reply(document: Any, most: int) -> Reply:
    """The first choice of a completion or a chat completion, with token ids and log-probabilities where there are some."""
    choice = document["choices"][0]
    text = choice["message"].get("content") if "message" in choice else choice["text"]
    tokens = (document.get("usage") or {}).get("total_tokens")
    ids, said = choice.get("token_ids"), choice.get("logprobs") or {}
    logps = [entry["logprob"] for entry in said["content"]] if said.get("content") else said.get("token_logprobs")
    if not isinstance(text, str | None) or not isinstance(choice["finish_reason"], str):
        raise TypeError
    if not all(type(i) is int for i in ids or ()) or not all(type(x) in (int, float) and x <= 1e-6 for x in logps or ()):
        raise TypeError
    cost = tokens if type(tokens) is int and tokens > 0 else most
    return Reply(text or "", choice["finish_reason"], cost, _tuple(ids), _tuple(logps) if ids else None)


def _tuple(values: Any) -> Any:
    return None if values is None else tuple(values)
