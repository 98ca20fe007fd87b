"""1 for a completion whose final number is the known answer of its prompt, 0 for any other: a reward that can be verified."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from polyref.data.fields import Refusal, read_text
from polyref.data.records import RowError
from polyref.data.sources import read_rows, source_name
from polyref.errors import DataError
from polyref.rewards.functions import NamedReward, plain_text
from polyref.stages import content_digest
from polyref.types import Text

_MARK = "####"
_WHOLE = (
    r"(?:[1-9]\d{0,2}(?:[ \u00a0\u2009\u202f]\d{3}){1,8}(?!\d)"  # 1 000
    r"|\d{1,3}(?:,\d{2,3}){0,8},\d{3}(?!\d)|\d+)"
)
_SIGN = r"((?<![\w)])[-\u2212][$\u20ac\u00a3]?)?"  # a minus after a word or a bracket is a subtraction
_START = r"(?<![A-Za-z\d_])(?<!\d\.)"  # x2 and v1.5 name things
_DECIMAL = rf"{_WHOLE}(?:\.\d+)?"
_NUMBER = re.compile(rf"{_SIGN}{_START}({_DECIMAL}|(?<![\w.])\.\d+)([eE][-+]?\d{{1,3}}(?!\w))?", re.ASCII)
_FRACTION = re.compile(  # 1/2/2025 holds none
    rf"{_SIGN}{_START}(?<!\d/)(?:(\d+) (?!\d{{3}}\D))?({_DECIMAL})/({_DECIMAL})(?!\d|[./]\d)", re.ASCII
)
_DIGITS = 1000
"""The most characters of a number; a longer one is none."""


def final_number(text: str) -> Fraction | None:
    """The number that `text` ends in, exactly: its last one; after a mark "####", the last one on the first line that has any.

    None where there is none, and for a division by 0. The last mark counts, and with nothing behind it there is no answer.
    Commas and spaces between thousands are dropped (1 000 is 1,000), a sign and a currency before the number and anything
    behind it are allowed: -$1,080.50 is -1080.5, 3% is 3, and of 16-3 it is 3. 3/4 is a fraction, 1 3/4 one and three quarters.
    """
    _, mark, answer = text.rpartition(_MARK)
    for line in answer.splitlines() if mark else [text]:
        if numbers := list(_NUMBER.finditer(line)):
            fractions = list(_FRACTION.finditer(line))
            last = fractions[-1] if fractions and fractions[-1].end() >= numbers[-1].end() else numbers[-1]
            return _value(last) if len(last[0]) <= _DIGITS else None
    return None


def _value(found: re.Match[str]) -> Fraction | None:
    """What a match of `_FRACTION` or `_NUMBER` is worth."""
    if found.re is _NUMBER:
        minus, digits, power = found.groups("")
        value = _decimal(digits + power)
    else:
        minus, whole, above, below = found.groups("")
        if not (divisor := _decimal(below)):
            return None
        value = _decimal(above) / divisor
        value += _decimal(whole) if whole and value < 1 else 0
    return -value if minus else value


def _decimal(digits: str) -> Fraction:
    return Fraction(re.sub(r"[^\d.eE+-]", "", digits))


def exact_answer(data: object, *, columns: Mapping[str, str] | None = None, split: str = "train") -> NamedReward:
    """r(x, y) = 1 if `final_number` of y is the answer to x, else 0. Numbers are compared by value: 18.0 is 18.

    `data` is any source of rows that `load_preferences` takes, with the columns `prompt` and `answer` (or as `columns` maps
    them): the answer a number, or text that ends in one, such as a whole solution. A prompt of messages asks what its last
    message says. DataError, naming the row, for data without a number or with two answers to a prompt, and for prompts asked
    later that it does not hold.
    """
    answers: dict[str, Fraction] = {}
    for source, number, row in read_rows(data, split=split):
        prompt, answer = _read(row, source, number, columns or {})
        if answers.setdefault(prompt, answer) != answer:
            fix = "keep one of the rows"
            raise RowError(f"answers {answer}, a row before it {answers[prompt]}", source=source, row=number, fix=fix)
    name = "exact_answer"
    if not answers:
        raise DataError("holds no row", where=source_name(data), fix="give rows with a prompt and its answer")

    def rewards(prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        values = []
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1):
            if (answer := answers.get(_question(prompt))) is None:
                fix = f"give its answer in {source_name(data)}"
                raise DataError("the answer to this prompt is not known", where=f"{name}, row {row}", fix=fix)
            values.append(float(final_number(plain_text(completion)) == answer))
        return values

    known = {prompt: str(answer) for prompt, answer in answers.items()}
    return NamedReward(name, rewards, f"exact_answer 2 {content_digest(known)}")


def _read(row: Any, source: str, number: int, columns: Mapping[str, str]) -> tuple[str, Fraction]:
    """The question and the answer of one row."""
    if isinstance(row, DataError):
        raise row

    def refuse(what: str, field: str, fix: str) -> RowError:
        return RowError(what, source=source, row=number, column=columns.get(field, field), fix=fix)

    values = {field: row.get(columns.get(field, field)) if isinstance(row, Mapping) else None for field in ("prompt", "answer")}
    for field, value in values.items():
        if value is None:
            raise refuse("is missing", field, "map it to the column that holds it")
    try:
        question = _question(read_text(values["prompt"]))
    except Refusal as refusal:
        raise refuse(refusal.what, "prompt", refusal.fix) from None
    answer = final_number(str(values["answer"]))
    if answer is None:
        raise refuse("holds no number", "answer", "give a number, or text that ends in one")
    return question, answer


def _question(prompt: Text) -> str:
    return (prompt if isinstance(prompt, str) else prompt[-1]["content"]).strip()
