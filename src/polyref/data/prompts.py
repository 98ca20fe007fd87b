"""Bring the three texts of a row into one form, cutting an implicit prompt off the completions."""

from __future__ import annotations

from os.path import commonprefix
from typing import cast

from polyref.data.fields import Refusal
from polyref.data.transcripts import cut_transcripts, is_transcript
from polyref.types import Message, Text

IDENTICAL = "is identical to chosen"
_NO_PROMPT = Refusal(
    "there is no prompt, and chosen and rejected begin differently",
    "add a prompt column, or map it with columns={'prompt': 'NAME'}",
    "prompt",
)


def settle_texts(prompt: Text | None, chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected, all strings or all messages; a `prompt` of None is implicit in the completions.

    Messages: the leading messages alike; transcripts: up to the last "\\n\\nAssistant:" alike; other strings: as TRL cuts.
    A prompt of text beside completions of whole conversations is dropped where it repeats their last shared message.
    """
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise Refusal("is not of one kind with chosen", "give both as text, or both as messages", "rejected")
    if chosen == rejected:
        raise Refusal(IDENTICAL, "remove the row: it states no preference", "rejected")
    if isinstance(chosen, str):
        return _settle_strings(prompt, chosen, cast(str, rejected))
    return _settle_messages(prompt, chosen, cast(tuple[Message, ...], rejected))


def _settle_strings(prompt: Text | None, chosen: str, rejected: str) -> tuple[Text, Text, Text]:
    if prompt is None:
        cut = _shared_characters(chosen, rejected)
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
        if not prompt.strip():
            raise _NO_PROMPT
    elif not isinstance(prompt, str):
        raise Refusal("holds messages while chosen and rejected are text", "give all three in one form", "prompt")
    elif not prompt.strip():
        raise Refusal("is empty", "fill it in or remove the row", "prompt")
    return prompt, chosen, rejected


def _shared_characters(chosen: str, rejected: str) -> int:
    if is_transcript(chosen) and is_transcript(rejected):
        try:
            return cut_transcripts(chosen, rejected)
        except ValueError as error:
            raise Refusal(str(error), "add a prompt column or remove the row", "chosen") from None
    length = len(commonprefix([chosen, rejected]))
    if length == min(len(chosen), len(rejected)):
        return max(length - 1, 0)
    return length - 1 if chosen[:length].endswith(" ") else length


def _settle_messages(
    prompt: Text | None, chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[Text, Text, Text]:
    if prompt is None or isinstance(prompt, str):
        shared = _shared_messages(chosen, rejected)
        if prompt is not None and (not shared or shared[-1]["content"] != prompt):
            fix = "give the prompt as messages, or leave the column out"
            raise Refusal("is text that does not end the messages chosen and rejected share", fix, "prompt")
        prompt, chosen, rejected = shared, chosen[len(shared) :], rejected[len(shared) :]
        if not prompt:
            raise _NO_PROMPT
    for field, completion in (("chosen", chosen), ("rejected", rejected)):
        roles = [message["role"] for message in completion]
        if roles != ["assistant"]:
            found = ", ".join(roles) or "nothing"
            raise Refusal(f"has after the prompt: {found}", "a completion is exactly one assistant message", field)
    return prompt, chosen, rejected


def _shared_messages(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[Message, ...]:
    length = 0
    while length < min(len(chosen), len(rejected)) and chosen[length] == rejected[length]:
        length += 1
    return chosen[:length]
