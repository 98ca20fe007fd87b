"""The settings of an engine behind a server: which one, how it is asked, and what it may cost. Checked when made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polyref.errors import ConfigError
from polyref.serving.connection import check_connection, check_extra_body, check_limit_name

_OURS = (
    *("model", "prompt", "messages", "n", "stream", "temperature", "top_p", "max_tokens", "max_completion_tokens"),
    *("seed", "logprobs", "top_logprobs", "prompt_logprobs", "return_token_ids", "stream_options", "best_of", "echo", "suffix"),
    *("stop", "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens", "truncate_prompt_tokens", "bad_words"),
    *(
        "use_beam_search",
        "allowed_token_ids",
        "logits_processors",
        "response_format",
        "structured_outputs",
        "tools",
        "tool_choice",
    ),
    *("functions", "function_call", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
)
"""What the engine sets itself, or what would change the law drawn from or the shape of a reply."""

_OFF: Mapping[str, tuple[Any, ...]] = {
    "top_k": (0, -1),
    "min_p": (0,),
    "typical_p": (1,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "repeat_penalty": (1,),
    "length_penalty": (1,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "mirostat": (0,),
    "dynatemp_range": (0,),
    "top_n_sigma": (-1,),
}
"""What would change the law drawn from, and the values that turn it off."""

_HARMLESS = (
    *("user", "metadata", "store", "service_tier", "priority", "request_id", "safety_identifier"),
    *("prompt_cache_key", "cache_salt", "cache_prompt", "keep_alive"),
)
"""What has no part in the law or in what a reply looks like."""


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
        extra_body: further fields of every request, known to change neither the law drawn from nor what a reply looks like.
        trusted_fields: names in extra_body that polyref does not know, and that you know to change neither.
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
    trusted_fields: Sequence[str] = ()
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
        for name, values in _OFF.items():
            if (value := self.extra_body.get(name)) is not None and value not in values:
                fix = f"leave it out, or turn it off by {' or '.join(map(str, values))}"
                raise ConfigError(f"extra_body sets {name} to {value!r}: it would change the law drawn from", fix=fix)
        if isinstance(self.trusted_fields, str):
            raise ConfigError("trusted_fields is text", fix="give a list of names")
        if unknown := sorted(self.extra_body.keys() - {*_OFF, *_HARMLESS, *self.trusted_fields}):
            what = f"extra_body holds {', '.join(unknown)}, which may change the law drawn from"
            raise ConfigError(what, fix="leave it out, or name it in trusted_fields if you know that it does not")
