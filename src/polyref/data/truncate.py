"""Cut a tokenised pair, or other completions of one prompt, to a maximum length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from polyref.errors import ConfigError
from polyref.types import TokenizedPair

TRUNCATION_MODES = ("keep_start", "keep_end")


def check_truncation(max_length: int | None, mode: str) -> None:
    """`ConfigError` unless a pair can be cut so: at least one token of prompt and one of completion."""
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2):
        raise ConfigError(f"max_length is {max_length!r}", fix="give at least 2 tokens, or leave it out to cut nothing")
    if mode not in TRUNCATION_MODES:
        raise ConfigError(f"truncation_mode is {mode!r}", fix=f"choose one of {', '.join(TRUNCATION_MODES)}")


def truncate_pair(pair: TokenizedPair, max_length: int, mode: str = "keep_start") -> TokenizedPair | None:
    """`pair` with prompt and any completion within `max_length` tokens together; None where a completion has nothing left.

    "keep_start" cuts the ends of the completions. "keep_end" cuts the start of the shared prompt, down to one token, and only
    then the ends of the completions. A completion that is cut loses its end-of-turn and is marked so.
    """
    prompt, room = prompt_and_room(pair.prompt_ids, pair.completions, max_length, mode)
    if room == 0 or not all(pair.completions):
        return None
    return replace(
        pair,
        prompt_ids=prompt,
        chosen_ids=pair.chosen_ids[:room],
        rejected_ids=pair.rejected_ids[:room],
        chosen_cut=pair.chosen_cut or len(pair.chosen_ids) > room,
        rejected_cut=pair.rejected_cut or len(pair.rejected_ids) > room,
        auxiliary_ids=tuple(ids[:room] for ids in pair.auxiliary_ids),
        auxiliary_cut=tuple(cut or len(ids) > room for cut, ids in zip(pair.auxiliary_cut, pair.auxiliary_ids, strict=True)),
    )


def prompt_and_room(
    prompt: tuple[int, ...], completions: Sequence[Sequence[int]], max_length: int, mode: str
) -> tuple[tuple[int, ...], int]:
    """What is left of `prompt`, and how many tokens of each of its `completions` there is room for, as `truncate_pair` cuts."""
    check_truncation(max_length, mode)
    if mode == "keep_end":
        prompt = prompt[-max(1, max_length - max(map(len, completions))) :]
    return prompt, max(0, max_length - len(prompt))
