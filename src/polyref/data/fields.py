"""The value of one column -> what a record holds, or a `Refusal` that says what is wrong and how to mend it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

from polyref.types import SIMPLEX_TOLERANCE, Message, Text

Read = TypeVar("Read")


class Refusal(Exception):
    """A value that cannot be used, before it is known where it stands; `field` names it where the reader's caller does not."""

    def __init__(self, what: str, fix: str, field: str | None = None) -> None:
        super().__init__(what)
        self.what, self.fix, self.field = what, fix, field


def kind(value: object) -> str:
    """What `value` is, in the words of a data file, without showing any of it."""
    names = {type(None): "null", bool: "true or false", str: "text", dict: "an object", list: "a list", tuple: "a list"}
    return names.get(type(value)) or ("a number" if isinstance(value, Real) else f"a {type(value).__name__}")


def read_text(value: object) -> Text:
    """Text as it is, or a list of messages as a tuple."""
    if isinstance(value, str):
        return _check_unicode(value)
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise Refusal(f"is {kind(value)}", "give text, or a list of {'role', 'content'} messages")
    if not value:
        raise Refusal("is an empty list of messages", "remove the row")
    return tuple(_read_message(message, number) for number, message in enumerate(value, 1))


def _read_message(value: object, number: int) -> Message:
    fix = "a message is {'role': TEXT, 'content': TEXT}"
    if not isinstance(value, Mapping):
        raise Refusal(f"message {number} is {kind(value)}", fix)
    for key in ("role", "content"):
        if not isinstance(value.get(key), str):
            found = f"is {kind(value[key])}" if key in value else "is missing"
            raise Refusal(f"the {key} of message {number} {found}", fix)
    if not value["role"]:
        raise Refusal(f"the role of message {number} is empty", "use system, user or assistant")
    return {"role": _check_unicode(value["role"]), "content": _check_unicode(value["content"])}


def _check_unicode(text: str) -> str:
    """Tokenizers cannot encode half of a surrogate pair, which JSON's backslash-u escapes can write."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise Refusal(f"character {error.start + 1} is half of a surrogate pair ({code})", "repair the text") from None
    return text


def read_number(value: object) -> float:
    """A finite number; true, false and numbers written as text are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise Refusal(f"is {kind(value)}, not a number", "write a plain number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Refusal(f"is {number}, not a finite number", "correct the value or remove the row")
    return number


def read_margin(value: object) -> float | None:
    return None if value is None else read_number(value)


def read_ended(value: object) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise Refusal(f"is {kind(value)}, not true or false", "say whether the completion ended by itself")
    return value


def read_probability(value: object) -> float | None:
    if value is None:
        return None
    number = read_number(value)
    if not 0 <= number <= 1:
        raise Refusal(f"is {number:g}, outside 0 to 1", "give the probability that chosen is preferred")
    return number


def read_texts(value: object) -> tuple[Text, ...] | None:
    """One text, or a list of them, as a tuple; a list of messages is one text."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or isinstance(value, bytes):
        return (read_text(value),)
    if not value:
        raise Refusal("is an empty list", "give at least one completion, or leave the auxiliary columns out")
    if all(isinstance(each, Mapping) for each in value):
        return (read_text(value),)
    return tuple(_numbered(read_text, each, number) for number, each in enumerate(value, 1))


def read_probabilities(value: object) -> tuple[float, ...] | None:
    """One probability, or a list of them, as a tuple."""
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return (_chance(value),)
    if not value:
        raise Refusal("is an empty list", "give one probability for each auxiliary pair")
    return tuple(_numbered(_chance, each, number) for number, each in enumerate(value, 1))


def _numbered(read: Callable[[object], Read], value: object, number: int) -> Read:
    """`read(value)`, a refusal of which says that it is the `number`-th of a list."""
    try:
        return read(value)
    except Refusal as refusal:
        raise Refusal(f"entry {number} {refusal.what}", refusal.fix) from None


def _chance(value: object) -> float:
    number = read_number(value)
    if not 0 <= number <= 1:
        raise Refusal(f"is {number:g}, outside 0 to 1", "give the probability that the first of the pair is preferred")
    return number


def read_prediction(value: object) -> float | None:
    return None if value is None else _chance(value)


def read_weights(value: object) -> tuple[float, ...] | None:
    """Weights on the simplex, to within SIMPLEX_TOLERANCE of sum 1."""
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise Refusal(f"is {kind(value)}, not a list of numbers", "give one weight for each reference")
    weights = tuple(map(read_number, value))
    if not weights:
        raise Refusal("is an empty list", "give one weight for each reference")
    if min(weights) < 0:
        raise Refusal(f"holds the negative weight {min(weights):g}", "weights are at least 0 and sum to 1")
    if abs(math.fsum(weights) - 1) > SIMPLEX_TOLERANCE:
        raise Refusal(f"sums to {math.fsum(weights):.9g}", "weights are at least 0 and sum to 1")
    return weights


READERS: dict[str, Callable[[object], Any]] = {
    "prompt": read_text,
    "chosen": read_text,
    "rejected": read_text,
    "chosen_probability": read_probability,
    "reference_weights": read_weights,
    "margin": read_margin,
    "chosen_ended": read_ended,
    "rejected_ended": read_ended,
    "predicted_probability": read_prediction,
    "auxiliary_1": read_texts,
    "auxiliary_2": read_texts,
    "auxiliary_probability": read_probabilities,
}
"""How each field of a row is read; its keys are all the fields there are."""
