"""What the settings of anything that asks a server have in common, and what of them is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

from polyref.errors import ConfigError


class Connection(Protocol):
    """Which server, the variable that holds its key, how long and how often it is asked, and what it may cost."""

    @property
    def base_url(self) -> str: ...
    @property
    def key_variable(self) -> str | None: ...
    @property
    def timeout(self) -> float: ...
    @property
    def attempts(self) -> int: ...
    @property
    def first_wait(self) -> float: ...
    @property
    def longest_wait(self) -> float: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def max_requests(self) -> int | None: ...
    @property
    def max_tokens(self) -> int | None: ...


def check_connection(settings: Connection) -> None:
    """ConfigError for an address that is none or holds a password, counts below 1, and waits that are not above 0."""
    try:
        address = urlsplit(settings.base_url)
        usable = address.scheme in ("http", "https") and bool(address.hostname) and not address.query
        usable = usable and address.port != 0 and settings.base_url.isprintable() and " " not in settings.base_url
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError("base_url is no address of a server", fix="give one like http://127.0.0.1:8000/v1")
    if address.username is not None or address.password is not None:
        raise ConfigError("base_url holds a password", fix="name an environment variable in key_variable")
    check_counts(settings, "attempts", "concurrency", "max_requests", "max_tokens")
    for name in ("timeout", "first_wait", "longest_wait"):
        if not 0 < getattr(settings, name) < math.inf:
            raise ConfigError(f"{name} is {getattr(settings, name)}", fix="give seconds above 0")


def check_counts(settings: object, *names: str) -> None:
    """ConfigError for a setting of these names that is neither None nor a whole number from 1."""
    for name in names:
        if (value := getattr(settings, name)) is not None and not (type(value) is int and value >= 1):
            raise ConfigError(f"{name} is {value!r}", fix="give a whole number from 1")


def check_limit_name(name: str) -> None:
    """ConfigError unless a server may call the most new tokens so."""
    if name not in ("max_tokens", "max_completion_tokens"):
        raise ConfigError(f"limit_name is {name!r}", fix="use 'max_tokens' or 'max_completion_tokens'")


def check_extra_body(extra_body: Mapping[str, Any], ours: Sequence[str]) -> None:
    """ConfigError for fields that JSON cannot hold, or that are `ours` to set."""
    try:
        json.dumps(dict(extra_body))
    except (TypeError, ValueError):
        raise ConfigError("extra_body cannot be written as JSON", fix="give names with plain values") from None
    if taken := sorted(set(ours) & set(extra_body)):
        fix = "these have settings of their own, or must stay as they are"
        raise ConfigError(f"extra_body holds {', '.join(taken)}", fix=fix)
