"""Whether a prompt leaves room for a completion: said once, for every sampler that reads tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polyref.errors import DataError


def context_of(config: Any) -> int | None:
    """The most tokens that a model of this `config` reads, a nested one too; None where it says nothing, or there is none."""
    found: int | None = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    return found


def check_prompt(ids: Sequence[int], row: int, max_new_tokens: int, context: int | None, reader: str = "") -> None:
    """DataError for prompt number `row` if it has no token, or if `context` has no room behind it for `max_new_tokens`.

    `reader` is whose tokens they are, where several models read the prompt.
    """
    where = f"prompt {row}"
    if not ids:
        raise DataError("has no token", where=where, fix="give a prompt, or a tokenizer with a first token")
    if not fits(len(ids), max_new_tokens, context):
        whose = f" for {reader}" if reader else ""
        what = f"has {len(ids)} tokens{whose}, with {max_new_tokens} new ones more than the context of {context}"
        raise DataError(what, where=where, fix="shorten the prompt, or lower max_new_tokens")


def fits(tokens: int, max_new_tokens: int, context: int | None) -> bool:
    """Whether `context` has room for as many tokens; None has room for any."""
    return context is None or tokens + max_new_tokens <= context
