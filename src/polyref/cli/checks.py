"""What the settings of several verbs are held to. ConfigError, which names the setting, its value and what to give."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from polyref.errors import ConfigError


class Divided(Protocol):
    """Settings of data that some are held out of."""

    eval_data: str | None
    limit: int | None
    held_out: float


def named(output_dir: str) -> None:
    """The run folder has a name."""
    if not output_dir.strip():
        raise ConfigError("output_dir is empty", fix="name the run folder")


def one_of(name: str, given: str, choices: Iterable[str]) -> None:
    """`given` is one of `choices`."""
    if given not in (choices := tuple(choices)):
        raise ConfigError(f"unknown {name} {given!r}", fix=f"use one of {', '.join(choices)}")


def counts(settings: object, *names: str) -> None:
    """These attributes of `settings` are None or at least 1."""
    for name in names:
        if (value := getattr(settings, name)) is not None and value < 1:
            raise ConfigError(f"{name} is {value}", fix="give at least 1")


def not_negative(settings: object, *names: str) -> None:
    """These attributes of `settings` are finite and at least 0."""
    for name in names:
        if not 0 <= (value := getattr(settings, name)) < math.inf:
            raise ConfigError(f"{name} is {value}", fix="give a finite number of at least 0")


def positive(name: str, value: float) -> None:
    """`value` is finite and above 0."""
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value:g}", fix="give a finite number above 0")


def finite_bound(r_max: float | None) -> None:
    """The upper bound of a reward is None or finite."""
    if r_max is not None and not math.isfinite(r_max):
        raise ConfigError(f"r_max is {r_max}", fix="give a finite upper bound of the reward, or none")


def whole(name: str, value: int) -> None:
    """`value` is no less than 0."""
    if value < 0:
        raise ConfigError(f"{name} is {value}", fix="give a whole number from 0")


def amount(held_out: float, what: str) -> None:
    """A number of `what`, or a share of them below 1, is held out."""
    if not held_out >= 0 or (held_out > 1 and held_out % 1):
        raise ConfigError(f"held_out is {held_out:g}", fix=f"give a number of {what}, or a share below 1")


def division(settings: Divided, what: str) -> None:
    """`limit` leaves some `what`, and what is evaluated on comes from one place."""
    if settings.limit is not None and settings.limit < 1:
        raise ConfigError(f"limit is {settings.limit}", fix=f"give a number of {what} of at least 1, or leave it out")
    if settings.eval_data is not None and settings.held_out:
        raise ConfigError("eval_data and held_out are both given", fix="give one of them")


def own_file(name: str, taken: Iterable[str]) -> None:
    """`name` is a file of the run folder itself, and none of `taken`."""
    if Path(name).name != name or name in taken:
        raise ConfigError(f"file_name is {name}", fix="name a file of the run folder that nothing else is kept in")
