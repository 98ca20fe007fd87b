"""Small stand-ins for tokenizers, built in memory without a download."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, TURN = "<pad>", "<bos>", "<eos>", "<|turn|>"

CHATML = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def byte_tokenizer(
    merges: Sequence[tuple[str, str]] = (), *, bos: bool = True, eos: bool = True, chat_template: str | None = CHATML
) -> PreTrainedTokenizerFast:
    """One token a byte, and one for each of `merges`, which may join any two neighbours, across words too.

    Four special tokens come first: <pad> 0, <bos> 1, <eos> 2, <|turn|> 3; raw text begins with <bos> if there is one.
    """
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    specials = [AddedToken(text, special=True, normalized=False) for text in (PAD, BOS, EOS, TURN)]
    vocabulary = {text: index for index, text in enumerate([*map(str, specials), *tokens])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
        )
    return _wrap(backend, bos=bos, eos=eos, chat_template=chat_template)


def word_tokenizer(words: Sequence[str], *, chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token a word or a run of punctuation, space in front included; other text is <unk>. No BOS."""
    vocabulary = {text: index for index, text in enumerate(dict.fromkeys([PAD, BOS, EOS, TURN, "<unk>", *words]))}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (PAD, BOS, EOS, TURN)])
    return _wrap(backend, bos=False, eos=True, chat_template=chat_template)


def _wrap(backend: Tokenizer, *, bos: bool, eos: bool, chat_template: str | None) -> PreTrainedTokenizerFast:
    names = {"pad_token": PAD} | ({"bos_token": BOS} if bos else {}) | ({"eos_token": EOS} if eos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = chat_template
    return tokenizer
