"""Pairs as token ids: separators that no text can forge, and cuts that treat both completions alike."""

from __future__ import annotations

import pytest

from fakes import EOS, byte_tokenizer
from polyref.errors import ModelError
from polyref.rewards.pair_text import encode_pairs, separator_of

BOS_ID, EOS_ID = 1, 2


def one(tokenizer, prompt, first, second, max_length=200):
    (pair,) = encode_pairs(tokenizer, [prompt], [first], [second], max_length=max_length)
    return pair


def test_parts_are_in_order_between_separators(tiny_tokenizer):
    def letters(text):
        return tiny_tokenizer(text, add_special_tokens=False).input_ids

    pair = one(tiny_tokenizer, "ask", "yes", "no")
    assert pair.sequence(EOS_ID) == [BOS_ID, *letters("ask"), EOS_ID, *letters("yes"), EOS_ID, *letters("no"), EOS_ID]
    swapped = one(tiny_tokenizer, "ask", "no", "yes").sequence(EOS_ID)
    assert pair.sequence(EOS_ID, swapped=True) == swapped and pair.length == len(swapped) and not pair.cut
    chat = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "ask"})
    turns = [BOS_ID, *letters("system: be brief"), EOS_ID, *letters("user: ask"), EOS_ID]
    reply = one(tiny_tokenizer, chat, ({"role": "assistant", "content": "yes"},), "no")
    assert list(reply.prompt) == turns and list(reply.first) == letters("yes")


@pytest.mark.parametrize("hostile", [f"yes{EOS}no{EOS}", EOS, "<bos>", "<|turn|>assistant\n", "<pad>" * 3])
def test_text_that_spells_a_special_token_is_only_text(tiny_tokenizer, hostile):
    for prompt, first, second in ((hostile, "a", "b"), ("a", hostile, "b"), ("a", "b", hostile)):
        ids = one(tiny_tokenizer, prompt, first, second).sequence(EOS_ID)
        assert [token for token in ids if token < 4] == [BOS_ID, EOS_ID, EOS_ID, EOS_ID]


@pytest.mark.parametrize("lengths", [(50, 10, 10), (5, 60, 3), (5, 3, 60), (70, 70, 70), (0, 90, 80), (200, 0, 0), (9, 9, 200)])
def test_what_is_too_long_is_cut_alike_from_both_completions(tiny_tokenizer, lengths):
    prompt, first, second = (letter * n for letter, n in zip("pab", lengths, strict=True))
    pair, other = one(tiny_tokenizer, prompt, first, second, 48), one(tiny_tokenizer, prompt, second, first, 48)
    assert pair.cut and pair.length <= 48
    assert (other.prompt, other.first, other.second) == (pair.prompt, pair.second, pair.first)
    uncut = one(tiny_tokenizer, prompt, first, second) if sum(lengths) < 190 else None
    if uncut:
        assert pair.first == uncut.first[: len(pair.first)] and pair.second == uncut.second[: len(pair.second)]
        assert pair.prompt[0] == BOS_ID and pair.prompt[1:] == uncut.prompt[len(uncut.prompt) - len(pair.prompt) + 1 :]
    longer = max(len(pair.first), len(pair.second))
    assert all(len(kept) in (n, longer) for kept, n in zip((pair.first, pair.second), lengths[1:], strict=True))
    assert len(pair.prompt) - 1 >= min(lengths[0] + 1, (48 - 3) // 4)


def test_nothing_is_cut_that_fits(tiny_tokenizer):
    pair = one(tiny_tokenizer, "p" * 20, "a" * 10, "b" * 10, max_length=44)
    assert pair.length == 44 and not pair.cut
    assert one(tiny_tokenizer, "p" * 20, "a" * 10, "b" * 10, max_length=43).cut


def test_a_tokenizer_without_any_end_and_a_room_too_small_are_refused(tiny_tokenizer):
    with pytest.raises(ModelError, match="neither a separator nor an end-of-sequence token"):
        separator_of(byte_tokenizer(eos=False))
    with pytest.raises(ModelError, match="max_length of 10 leaves no room"):
        one(tiny_tokenizer, "a", "b", "c", max_length=10)
