"""The settings of an engine behind a server: which one, how it is asked, and what it may cost. Checked when made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from polyref.serving.connection import check_connection, check_extra_body, check_limit_name

_OURS = (
    *("model", "prompt", "messages", "n", "stream", "temperature", "top_p", "max_tokens", "max_completion_tokens"),
    *("seed", "logprobs", "return_token_ids"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Which server draws, how it is asked, and what it may cost.

    Args:
        base_url: of an OpenAI-compatible server, as in http://127.0.0.1:8000/v1; completions or chat/completions is added.
        model: the name the server knows the model by.
        key_variable: the environment variable that holds the key; none for a server that asks for none.
        seeds: whether each request carries a seed of its own; off for a server that refuses the field.
        token_ids: whether token ids and their log-probabilities are asked for, as vLLM gives them.
        limit_name: what the server calls the most new tokens: max_tokens or max_completion_tokens.
        extra_body: further fields of every request.
        timeout: seconds until a request counts as lost.
        attempts: how often a request is sent until the server answers it.
        first_wait: seconds before the second attempt; the wait doubles with each.
        longest_wait: the longest wait in seconds; a server that asks for more ends the run.
        concurrency: requests under way at once.
        max_requests: budget of requests, over all runs with one transcript; none for no limit.
        max_tokens: budget of tokens, prompts and completions together; none for no limit.
    """

    base_url: str
    model: str
    key_variable: str | None = None
    seeds: bool = True
    token_ids: bool = False
    limit_name: str = "max_tokens"
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 300.0
    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    concurrency: int = 8
    max_requests: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        check_connection(self)
        check_limit_name(self.limit_name)
        check_extra_body(self.extra_body, _OURS)
