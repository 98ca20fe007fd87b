"""A question to a judge as a request to its server, and what of the answer is the reply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from polyref.rewards.judge_settings import JudgeSettings
from polyref.serving.client import TEMPLATE_TOKENS, Client
from polyref.serving.transcript import Reply
from polyref.types import Message


def ask(
    client: Client, settings: JudgeSettings, messages: Sequence[Message], verdict: Callable[[Reply], float | None]
) -> Reply:
    """The reply to `messages`, written down with its `verdict`; errors as `Client.ask` has them."""
    body = {
        "model": settings.model,
        "messages": list(messages),
        settings.limit_name: settings.reply_tokens,
        "stream": False,
    }
    body |= {} if settings.temperature is None else {"temperature": settings.temperature}
    most = sum(len(m["content"].encode()) for m in messages) + TEMPLATE_TOKENS + settings.reply_tokens
    body |= dict(settings.extra_body)
    return client.ask("/chat/completions", body, _reply, most=most, note=lambda reply: {"verdict": verdict(reply)})


def _reply(document: Any, most: int) -> Reply:
    """The first choice of a chat completion; without a believable count of tokens, `most` are charged."""
    choice = document["choices"][0]
    text, reason = choice["message"].get("content"), choice.get("finish_reason")
    tokens = (document.get("usage") or {}).get("total_tokens")
    if not isinstance(text, str | None):
        raise TypeError
    return Reply(text or "", str(reason), tokens if type(tokens) is int and tokens > 0 else most)
