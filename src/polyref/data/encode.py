"""The text a tokenizer's model reads for a record, its token ids, and where the prompt ends in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from polyref.data.auxiliary import auxiliary_completions
from polyref.data.records import RowError
from polyref.errors import ModelError, ReferenceSetError
from polyref.types import Message, PreferenceRecord, Text, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]
Turns = tuple[Message, ...]

_RECORDS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Rendering:
    """What the model reads for a record: `prompt`, and `chosen`, `rejected`, `auxiliary` as prompt and completion together.

    `chat` says that a chat template wrote it, special tokens included; a completion that is `cut` gets no end-of-turn.
    """

    prompt: str
    chosen: str
    rejected: str
    chat: bool
    chosen_cut: bool = False
    rejected_cut: bool = False
    auxiliary: tuple[str, ...] = ()
    auxiliary_cut: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class Encoding:
    """Token ids of a `Rendering`, ends of turn settled. `prompt` need not be a beginning of the others."""

    prompt: Ids
    chosen: Ids
    rejected: Ids
    chosen_cut: bool = False
    rejected_cut: bool = False
    auxiliary: tuple[Ids, ...] = ()
    auxiliary_cut: tuple[bool, ...] = ()

    @property
    def boundary(self) -> int:
        """The number of leading tokens that the prompt and all whole texts share."""
        return min(common_start(self.prompt, ids) for ids in (self.chosen, self.rejected, *self.auxiliary))

    def split(self, at: int) -> TokenizedPair:
        """The pair whose prompt is the first `at` tokens."""
        return TokenizedPair(
            self.chosen[:at],
            self.chosen[at:],
            self.rejected[at:],
            chosen_cut=self.chosen_cut,
            rejected_cut=self.rejected_cut,
            auxiliary_ids=tuple(ids[at:] for ids in self.auxiliary),
            auxiliary_cut=self.auxiliary_cut,
        )


def common_start(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of leading tokens two sequences share."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)


def render_record(record: PreferenceRecord, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> Rendering:
    """`record` as the text that `tokenizer`'s model reads.

    Strings are raw text, after the system prompt and a blank line if there is one. Messages go through the chat template, the
    prompt with its generation prompt; the system prompt becomes the first message. Errors: `ReferenceSetError` where the
    record has a system message already; `RowError` where the template refuses its messages; `ModelError` where there is no
    template, or it leaves the system prompt out. A completion that has not ended is rendered without its end.
    """
    place: dict[str, Any] = {"source": record.source, "row": record.row}
    prompt = render_prompt(record.prompt, tokenizer, system_prompt, **place)
    texts = (record.chosen, record.rejected, *auxiliary_completions(record))
    ends = (record.chosen_ended is not False, record.rejected_ended is not False, *(True,) * len(texts[2:]))
    chosen, rejected, *auxiliary = (
        render_whole(record.prompt, prompt, text, tokenizer, system_prompt, ended=ended, **place)
        for text, ended in zip(texts, ends, strict=True)
    )
    cuts, chat = tuple(not ended for ended in ends), not isinstance(record.prompt, str)
    return Rendering(prompt, chosen, rejected, chat, cuts[0], cuts[1], tuple(auxiliary), cuts[2:])


def render_whole(
    prompt: Text,
    rendered: str,
    completion: Text,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str | None = None,
    *,
    ended: bool = True,
    source: str = "memory",
    row: int = 0,
) -> str:
    """Prompt and completion as the model reads them, `rendered` being the prompt alone, with the errors of `render_record`.

    One that has not `ended` follows the prompt as it was drawn, without a last character that its tokens spell in part.
    """
    if ended and not isinstance(prompt, str):
        messages, place = [*_with_system(prompt, system_prompt), *cast(Turns, completion)], {"source": source, "row": row}
        return _apply_template(tokenizer, messages, place, add_generation_prompt=False)
    text = completion if isinstance(completion, str) else completion[0]["content"]
    return rendered + (text if ended else text.rstrip("\ufffd") or text)


def render_prompt(
    prompt: Text, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None, *, source: str = "memory", row: int = 0
) -> str:
    """The prompt's part of what `render_record` gives, with its errors: what a completion of it is drawn after."""
    if isinstance(prompt, str):
        return f"{system_prompt}\n\n{prompt}" if system_prompt else prompt
    if system_prompt and any(message["role"] == "system" for message in prompt):
        what, fix = (
            "a system prompt is set, but the record has a system message",
            "drop the system message of the data, or the system prompt of the model",
        )
        raise ReferenceSetError(what, where=f"{source}, row {row}", fix=fix)
    messages, place = _with_system(prompt, system_prompt), {"source": source, "row": row}
    rendered = _apply_template(tokenizer, messages, place, add_generation_prompt=True)
    if system_prompt and system_prompt.strip() not in rendered:
        fix = "use a model whose template takes a system prompt, or set none"
        raise ModelError("the chat template leaves the system prompt out", where=_name(tokenizer), fix=fix)
    return rendered


def _with_system(messages: Turns, system_prompt: str | None) -> list[Message]:
    return [{"role": "system", "content": system_prompt}, *messages] if system_prompt else list(messages)


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}"


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], place: dict[str, Any], *, add_generation_prompt: bool
) -> str:
    if not tokenizer.chat_template:
        fix = "use a model that has one, or data as plain text with prompt_format 'as_is'"
        raise ModelError("there is no chat template, and the data holds messages", where=_name(tokenizer), fix=fix)
    try:
        rendered = tokenizer.apply_chat_template(
            cast(Any, messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program: whatever it raises, it refuses
        what, fix = f"the chat template refuses the messages ({error})", "change the roles of the row, or use another model"
        raise RowError(what, fix=fix, **place) from error
    return str(rendered)


class Encoder:
    """Turns renderings into token ids with one `tokenizer`, whose special tokens are spelt `special_texts`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.eos: int | None = tokenizer.eos_token_id
        added = tokenizer.added_tokens_decoder
        self._special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        self.special_texts = tuple(str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(self._special))
        self._blank: dict[int, bool] = {}
        self._opening = self._opening_ids()

    def _opening_ids(self) -> Ids:
        """The special tokens that the tokenizer puts before raw text; those behind it, if any, are not wanted."""
        text = "a"
        bare, dressed = self._ids([text])[0], tuple(self.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])
        starts = (i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare)
        return dressed[: next(starts, 0)]

    def _ids(self, texts: list[str]) -> list[Ids]:
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [tuple(ids) for ids in encoded["input_ids"]]

    def encode_prompt(self, prompt: Text, system_prompt: str | None = None) -> Ids:
        """The token ids that a completion of `prompt` is drawn after, as records with that prompt are encoded."""
        ids = self._ids([render_prompt(prompt, self.tokenizer, system_prompt)])[0]
        return ids if not isinstance(prompt, str) else self._opening + ids

    def encode(self, renderings: Iterable[Rendering]) -> Iterator[Encoding]:
        """The encoding of each rendering, in order; many are tokenised at once."""
        waiting = iter(renderings)
        while some := list(islice(waiting, _RECORDS_AT_ONCE)):
            ids = iter(self._ids([text for r in some for text in (r.prompt, r.chosen, r.rejected, *r.auxiliary)]))
            for rendering in some:
                yield self._settle(rendering, *islice(ids, 3 + len(rendering.auxiliary)))

    def encode_texts(self, prompt: str, wholes: Sequence[str], cuts: Sequence[bool], *, chat: bool) -> tuple[Ids, list[Ids]]:
        """Token ids of a prompt and of `wholes`, prompt and completion together; those that are not cut with their end of turn.

        `chat`: a chat template wrote the texts, special tokens included. As pairs are encoded.
        """
        ids, *of_wholes = self._ids([prompt, *wholes])
        return self._ends_settled(ids, of_wholes, cuts, chat=chat)

    def _settle(self, rendering: Rendering, prompt: Ids, *wholes: Ids) -> Encoding:
        cuts = (rendering.chosen_cut, rendering.rejected_cut, *rendering.auxiliary_cut)
        ids, (chosen, rejected, *auxiliary) = self._ends_settled(prompt, wholes, cuts, chat=rendering.chat)
        return Encoding(ids, chosen, rejected, cuts[0], cuts[1], tuple(auxiliary), rendering.auxiliary_cut)

    def _ends_settled(self, prompt: Ids, wholes: Sequence[Ids], cuts: Sequence[bool], *, chat: bool) -> tuple[Ids, list[Ids]]:
        close: Callable[[Ids, int], Ids] = self._without_tail if chat else self._with_eos
        opening = () if chat else self._opening
        whole_ids = [
            opening + (whole if cut else close(whole, common_start(prompt, whole)))
            for whole, cut in zip(wholes, cuts, strict=True)
        ]
        return opening + prompt, whole_ids

    def _with_eos(self, ids: Ids, start: int) -> Ids:
        """`ids` with the end-of-sequence token at the end, where the tokenizer has one and the completion has none."""
        if self.eos is None or (len(ids) > start and ids[-1] == self.eos):
            return ids
        return (*ids, self.eos)

    def _without_tail(self, ids: Ids, start: int) -> Ids:
        """`ids` up to the token that ends the turn: a model never generates what a template writes after it."""
        end = len(ids)
        for i in range(len(ids) - 1, start - 1, -1):
            if ids[i] in self._special:
                end = i + 1
            elif not self._is_blank(ids[i]):
                break
        return ids[:end]

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False)).strip()
        return self._blank[token]


def checked_boundary(encoding: Encoding, record: PreferenceRecord) -> int:
    """`encoding.boundary`, refused where nothing of the prompt is left before it: the first token would have no condition."""
    boundary = encoding.boundary
    if boundary == 0:
        what = "no token of the prompt is left whole before the completions"
        fix = "lengthen the prompt, or use a tokenizer with a beginning-of-sequence token"
        raise RowError(what, source=record.source, row=record.row, column="prompt", fix=fix)
    return boundary
