"""The "\\n\\nHuman: ...\\n\\nAssistant: ..." form of a conversation."""

from __future__ import annotations

import re
from os.path import commonprefix

from polyref.types import Message, Text

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def parse_transcript(text: Text) -> tuple[Message, ...]:
    """The messages of a transcript that ends in an open "Assistant:" turn; `ValueError` (one line) where it is none.

    The one space after a colon is dropped; the rest of a turn is kept as written.
    """
    if not isinstance(text, str):
        raise ValueError("holds messages, not a transcript")
    before, *parts = _TURN.split(text)
    turns: list[Message] = [
        {"role": _ROLES[speaker], "content": content.removeprefix(" ")}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if before.strip() or not turns:
        raise ValueError("does not begin with a Human: or Assistant: turn")
    if turns[-1]["role"] != "assistant" or turns[-1]["content"].strip():
        raise ValueError("does not end in an open Assistant: turn")
    if len(turns) == 1:
        raise ValueError("has no turn before the open Assistant: turn")
    return tuple(turns[:-1])


def parse_reply(text: Text) -> tuple[Message, ...]:
    """The assistant message that a transcript's completion holds; `ValueError` if it goes on into further turns."""
    if not isinstance(text, str):
        raise ValueError("holds messages, not the text of a reply")
    if HUMAN in text or ASSISTANT in text:
        raise ValueError("holds more turns than one reply")
    return ({"role": "assistant", "content": text.removeprefix(" ")},)


def is_transcript(text: str) -> bool:
    """Whether `text` begins with a Human: turn, whose line breaks may have been stripped where an Assistant: turn follows."""
    return text.startswith(HUMAN) or (text.startswith(HUMAN.strip()) and ASSISTANT in text)


def cut_transcripts(chosen: str, rejected: str) -> int:
    """The length of the prompt two whole transcripts share: up to and with the last "\\n\\nAssistant:" in both.

    `ValueError` where they share none, or where a turn follows the reply (the two then differ before the last reply).
    """
    shared = commonprefix([chosen, rejected])
    cut = shared.rfind(ASSISTANT)
    if cut < 0:
        raise ValueError("the transcripts share no Assistant: turn")
    cut += len(ASSISTANT)
    if any(turn in reply for turn in (HUMAN, ASSISTANT) for reply in (chosen[cut:], rejected[cut:])):
        raise ValueError("the transcripts differ before the last Assistant: turn")
    return cut
