"""A prompt and two completions as one sequence of token ids, in which no text can pretend to be a separator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from polyref.errors import ModelError
from polyref.types import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]


class PairIds(NamedTuple):
    """What two completions of a prompt share in front, their own ids, and whether any of it was cut."""

    prompt: Ids
    first: Ids
    second: Ids
    cut: bool

    def sequence(self, separator: int, *, swapped: bool = False) -> list[int]:
        """prompt, first, separator, second, separator; `swapped`: with the completions the other way round."""
        a, b = (self.second, self.first) if swapped else (self.first, self.second)
        return [*self.prompt, *a, separator, *b, separator]

    @property
    def length(self) -> int:
        """Of the sequence, whichever way round."""
        return len(self.prompt) + len(self.first) + len(self.second) + 2


def separator_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id between the parts: the tokenizer's separator, or else its end of sequence. ModelError where it has neither."""
    for token in (tokenizer.sep_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    what = "its tokenizer has neither a separator nor an end-of-sequence token"
    raise ModelError(what, where=str(tokenizer.name_or_path), fix="set one of them on the tokenizer")


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    first: Sequence[Text],
    second: Sequence[Text],
    *,
    max_length: int,
) -> Iterator[PairIds]:
    """N rows -> their ids, at most `max_length` in sequence.

    The prompt opens with the tokenizer's class or beginning token, if it has one, and every turn of it ends in a separator; a
    turn reads "role: content", plain text and completions are as they are. Special tokens are never read out of the text:
    what spells one is tokenised as the letters it is. Where it is too long the prompt loses its start, down to a quarter of the
    room, then the longer completion its end, both to one length: nothing depends on which completion comes first.
    """
    separator = separator_of(tokenizer)
    opening = next(((int(t),) for t in (tokenizer.cls_token_id, tokenizer.bos_token_id) if t is not None), ())
    room = max_length - len(opening) - 2
    if room < 8:
        raise ModelError(f"a max_length of {max_length} leaves no room for a pair", where=str(tokenizer.name_or_path))

    def ids(texts: list[str]) -> list[Ids]:
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [tuple(row) for row in encoded["input_ids"]]

    for prompt, *completions in zip(prompts, first, second, strict=True):
        *turns, a, b = ids([*_turns(prompt), *(_words(completion) for completion in completions)])
        shared = tuple(token for turn in turns for token in (*turn, separator))
        spare = room - min(len(shared), room // 4)  # what the completions may take together
        longest = max(spare // 2, spare - min(len(a), len(b)))
        kept_a, kept_b = a[:longest], b[:longest]
        start = max(0, len(shared) - (room - len(kept_a) - len(kept_b)))
        yield PairIds(opening + shared[start:], kept_a, kept_b, bool(start) or len(kept_a + kept_b) < len(a + b))


def _turns(prompt: Text) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [f"{turn['role']}: {turn['content']}" for turn in prompt]


def _words(completion: Text) -> str:
    return completion if isinstance(completion, str) else "\n\n".join(turn["content"] for turn in completion)
