"""1 for a completion whose final number is the known answer of its prompt, 0 for any other: a reward that can be verified."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from polyref.data.fields import Refusal, read_text
from polyref.data.records import RowError
from polyref.data.sources import read_rows, source_name
from polyref.errors import DataError
from polyref.rewards.functions import NamedReward, plain_text
from polyref.stages import content_digest
from polyref.types import Text

_MARK = "####"
_NUMBER = re.compile(
    r"((?<![\w)])[-\u2212][$\u20ac\u00a3]?)?"  # a minus after a word or a bracket is a subtraction
    r"(?<![A-Za-z\d_])(?<!\d\.)"  # x2 and v1.5 name things
    r"((?:\d{1,3}(?:,\d{2,3}){0,8},\d{3}(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"([eE][-+]?\d{1,3}(?!\w))?",
    re.ASCII,
)


def final_number(text: str) -> Decimal | None:
    """The number that `text` ends in: its last one; after a mark "####", the last one on the first line that has any; or None.

    The last mark counts. Commas between thousands are dropped, a sign and a currency before the number and anything behind it
    are allowed: -$1,080.50 is -1080.50, and of 16-3 it is 3.
    """
    _, mark, answer = text.rpartition(_MARK)
    lines = answer.splitlines() if mark else [text]
    for line in lines:
        if found := list(_NUMBER.finditer(line)):
            minus, digits, power = found[-1].groups("")
            return Decimal(("-" if minus else "") + digits.replace(",", "") + power)
    return None


def exact_answer(data: object, *, columns: Mapping[str, str] | None = None, split: str = "train") -> NamedReward:
    """r(x, y) = 1 if `final_number` of y is the answer to x, else 0. Numbers are compared by value: 18.0 is 18.

    `data` is any source of rows that `load_preferences` takes, with the columns `prompt` and `answer` (or as `columns` maps
    them): the answer a number, or text that ends in one, such as a whole solution. A prompt of messages asks what its last
    message says. DataError, naming the row, for data without a number or with two answers to a prompt, and for prompts asked
    later that it does not hold.
    """
    answers: dict[str, Decimal] = {}
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
    return NamedReward(name, rewards, f"exact_answer 1 {content_digest(known)}")


def _read(row: Any, source: str, number: int, columns: Mapping[str, str]) -> tuple[str, Decimal]:
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
