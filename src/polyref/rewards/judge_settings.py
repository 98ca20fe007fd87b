"""The settings of a judge: which one, how it is asked, and what it may cost. Checked when made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from polyref.errors import ConfigError
from polyref.serving.connection import check_connection, check_counts, check_extra_body, check_limit_name

_OURS = ("model", "messages", "n", "stream", "temperature", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeSettings:
    """Which judge is asked, how, and what it may cost.

    Args:
        base_url: of an OpenAI-compatible server, as in http://127.0.0.1:8000/v1; chat/completions is added.
        model: the name the server knows the judge by.
        key_variable: the environment variable that holds the key; none for a server that asks for none.
        criterion: the sentence that tells the judge what better means.
        average: how the verdicts in both orders become one probability: log_odds or probability.
        tries: how often a question is asked until the reply is a verdict.
        temperature: of the judge; none leaves it to the server.
        reply_tokens: the longest reply in tokens; one that is cut is no verdict.
        limit_name: what the server calls that limit: max_tokens or max_completion_tokens.
        extra_body: further fields of every request.
        timeout: seconds until a request counts as lost.
        attempts: how often a request is sent until the server answers it.
        first_wait: seconds before the second attempt; the wait doubles with each.
        longest_wait: the longest wait in seconds; a server that asks for more ends the run.
        concurrency: requests under way at once.
        max_requests: budget of requests, over all runs with one transcript; none for no limit.
        max_tokens: budget of tokens, requests and replies together; none for no limit.
    """

    base_url: str
    model: str
    key_variable: str | None = None
    criterion: str = "Better means more helpful, honest and harmless."
    average: str = "log_odds"
    tries: int = 3
    temperature: float | None = 0.0
    reply_tokens: int = 32
    limit_name: str = "max_tokens"
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 60.0
    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    concurrency: int = 4
    max_requests: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        check_connection(self)
        check_counts(self, "tries", "reply_tokens")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}", fix="give a number from 0")
        check_limit_name(self.limit_name)
        check_extra_body(self.extra_body, _OURS)
