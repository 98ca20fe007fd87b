"""Token ids: what is scored is the whole text, split where prompt and completions truly part."""

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from fakes import CHATML, byte_tokenizer, word_tokenizer
from polyref.data import parse_record, to_messages, tokenize_for_reference, tokenize_record, tokenize_records
from polyref.data.tokenize import tokenizer_fingerprint
from polyref.errors import ConfigError, DataError, ModelError, ReferenceSetError

BYTES = byte_tokenizer()
MERGING = byte_tokenizer([("a", "b"), ("b", "b"), ("ab", "b"), ("Ġ", "a"), ("Ċ", "Ċ")])
NO_BOS = byte_tokenizer([("a", "b")], bos=False)
WORDS = word_tokenizer(["a", "Ġa", "b", "Ġb", "ab", "Ġab", "Ġ", "Ċ", "system", "user", "assistant", "be", "Ġkind"])

TEXT = st.text("ab é不\n", max_size=12)
PROMPT = TEXT.filter(str.strip)


def record(prompt, chosen, rejected, prompt_format="as_is", number=1):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return to_messages(parse_record(row, source="f", row_number=number), prompt_format)


def chat(*args):
    return record(*args, prompt_format="chat")


def whole_ids(tokenizer, text):
    return (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)


@given(PROMPT, TEXT, TEXT, st.sampled_from([BYTES, MERGING]))
@example("xa", "b", "c", MERGING)
@example("a\n", "\nb", "", MERGING)
def test_prompt_and_completion_are_the_tokens_of_the_whole_text(prompt, chosen, rejected, tokenizer):
    assume(chosen != rejected)
    pair = tokenize_record(record(prompt, chosen, rejected), tokenizer)
    assert pair.prompt_ids + pair.chosen_ids == whole_ids(tokenizer, prompt + chosen)
    assert pair.prompt_ids + pair.rejected_ids == whole_ids(tokenizer, prompt + rejected)
    alone = tuple(tokenizer(prompt)["input_ids"])
    assert pair.prompt_ids == alone[: len(pair.prompt_ids)]
    if len(pair.prompt_ids) < len(alone):
        own_next = alone[len(pair.prompt_ids)]
        assert own_next != pair.chosen_ids[0] or own_next != pair.rejected_ids[0]


def test_the_boundary_moves_back_where_a_token_spans_it():
    pair = tokenize_record(record("xa", "b", "c"), MERGING)
    assert MERGING.convert_ids_to_tokens(pair.prompt_ids) == ["<bos>", "x"]
    assert MERGING.convert_ids_to_tokens(pair.chosen_ids) == ["ab", "<eos>"]
    assert MERGING.convert_ids_to_tokens(pair.rejected_ids) == ["a", "c", "<eos>"]
    data = tokenize_records([record("xa", "b", "c"), record("xa", "c", "d")], MERGING)
    assert data.report.moved_boundaries == 1 and len(data.pairs[1].prompt_ids) == 3


def test_nothing_is_scored_without_a_condition():
    assert tokenize_record(record("a", "b", "c"), byte_tokenizer([("a", "b")])).prompt_ids == (BYTES.bos_token_id,)
    with pytest.raises(
        DataError, match="^f, row 1, column prompt: no token of the prompt is left whole before the completions"
    ):
        tokenize_record(record("a", "b", "c"), NO_BOS)


def test_end_of_sequence_comes_once_and_only_where_there_is_one():
    assert tokenize_record(record("q", "a<eos>", ""), BYTES).completions == ((*BYTES("a")["input_ids"][1:], 2), (2,))
    assert tokenize_record(record("q<eos>", "", "a"), BYTES).chosen_ids == (2,)
    without = byte_tokenizer(eos=False)
    data = tokenize_records([record("q", "", "a"), record("q", "b", "a", number=2)], without)
    assert data.report.dropped_rows == (("f", 1),) and data.pairs[0].chosen_ids == tuple(without("b")["input_ids"][1:])


def test_special_tokens_behind_raw_text_are_not_kept():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert tokenize_record(record("q", "b", "a"), tokenizer) == tokenize_record(record("q", "b", "a"), BYTES)


@given(TEXT, TEXT, TEXT, st.none() | PROMPT, st.sampled_from([BYTES, MERGING]))
def test_messages_end_with_the_turn(prompt, chosen, rejected, system_prompt, tokenizer):
    assume(chosen != rejected and prompt.strip())
    pair = tokenize_record(chat(prompt, chosen, rejected), tokenizer, system_prompt=system_prompt)
    opening = f"<|turn|>system\n{system_prompt}<eos>\n" if system_prompt else ""
    for text, ids in ((chosen, pair.chosen_ids), (rejected, pair.rejected_ids)):
        whole = f"{opening}<|turn|>user\n{prompt}<eos>\n<|turn|>assistant\n{text}<eos>"
        assert tokenizer.decode(pair.prompt_ids + ids) == whole
        assert pair.prompt_ids + ids == tuple(tokenizer(whole, add_special_tokens=False)["input_ids"])


def test_a_prompt_that_the_template_writes_otherwise_when_it_is_answered():
    template = CHATML + "{% if add_generation_prompt %}<think></think>{% endif %}"
    tokenizer = byte_tokenizer(chat_template=template)
    data = tokenize_records([chat("q", "yes", "no")], tokenizer)
    assert data.pairs == [tokenize_record(chat("q", "yes", "no"), BYTES)] and data.report.moved_boundaries == 1


def test_a_template_without_an_end_of_turn_is_left_as_it_is():
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    pair = tokenize_record(chat("q", "yes", "no"), byte_tokenizer(chat_template=template))
    assert BYTES.decode(pair.chosen_ids) == "yes\n"


def test_a_template_that_closes_twice_ends_at_the_first():
    template = CHATML + "{% if not add_generation_prompt %}<|turn|><pad>{% endif %}"
    pair = tokenize_record(chat("q", "yes", "no"), byte_tokenizer(chat_template=template))
    assert BYTES.decode(pair.chosen_ids) == "yes<eos>"


def test_system_prompts_on_raw_text_and_beside_a_system_message():
    pair = tokenize_record(record("q", "b", "a"), BYTES, system_prompt="Be kind.")
    assert BYTES.decode(pair.prompt_ids) == "<bos>Be kind.\n\nq"
    row = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}
    row |= {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    having = parse_record(row, source="f", row_number=3)
    assert "system\ns" in BYTES.decode(tokenize_record(having, BYTES).prompt_ids)
    with pytest.raises(ReferenceSetError, match="^f, row 3: a system prompt is set, but the record has a system message; drop"):
        tokenize_record(having, BYTES, system_prompt="t")


def test_templates_that_cannot_be_used():
    with pytest.raises(ModelError, match="there is no chat template, and the data holds messages; use a model that has one"):
        tokenize_record(chat("q", "b", "a"), byte_tokenizer(chat_template=None))
    deaf = byte_tokenizer(chat_template="{{ messages[-1]['role'] }}: {{ messages[-1]['content'] }}")
    with pytest.raises(ModelError, match="the chat template leaves the system prompt out; use a model whose template"):
        tokenize_record(chat("q", "b", "a"), deaf, system_prompt="Be kind.")
    strict = byte_tokenizer(chat_template="{{ raise_exception('roles must\nalternate \x1b[1m') }}")
    with pytest.raises(DataError) as caught:
        tokenize_record(chat("q", "b", "a"), strict)
    assert str(caught.value).startswith(
        r"f, row 1: the chat template refuses the messages (roles must alternate \x1b[1m); change"
    )


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
        ("{{ 1 // 0 }}", "division or modulo by zero"),
        ("{{ messages[0]['content'].index('z') }}", "substring not found"),
        ("{{ messages[9].role.name }}", "has no element 9"),
        ({"rag": CHATML}, "multiple chat templates with no default"),
    ],
)
def test_whatever_a_template_raises_is_one_line(template, said):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=f"^f, row 1: the chat template refuses the messages .*{said}.*; change the roles"):
        tokenize_record(chat("q", "b", "a"), tokenizer)


def test_records_are_tokenised_as_one_by_one_and_counted():
    records = [record(f"question {i}", "b" * (i % 7), "a" * (i % 11 + 1), number=i) for i in range(600)]
    data = tokenize_records(records, MERGING, max_length=16)
    alone = [tokenize_record(r, MERGING) for r in records]
    assert data.report.kept == len(data.pairs) == len(data.records) == 600 - data.report.dropped
    assert [r.row for r in data.records] == [i for i, pair in enumerate(alone) if len(pair.prompt_ids) < 16]
    for r, pair in zip(data.records, data.pairs, strict=True):
        room = 16 - len(pair.prompt_ids)
        assert pair.completions == (alone[r.row].chosen_ids[:room], alone[r.row].rejected_ids[:room])
    assert data.report.cut_completions == sum(p.chosen_cut + p.rejected_cut for p in data.pairs) > 0
    assert data.report.dropped_rows == tuple(("f", i) for i, pair in enumerate(alone) if len(pair.prompt_ids) >= 16)
    assert f"{data.report.kept} pairs kept, {data.report.dropped} dropped" in str(data.report)


def test_pairs_that_differ_only_after_the_cut_are_told():
    records = [record("q", "the same, then yes", "the same, then no"), record("q", "yes", "no", number=2)]
    said = ", 1 with two completions of the same tokens, which teach nothing"
    assert said in str(tokenize_records(records, BYTES, max_length=12).report)
    assert "teach nothing" not in str(tokenize_records(records, BYTES).report)


def test_settings_are_checked_before_the_work():
    with pytest.raises(ConfigError, match="max_length is 1; give at least 2 tokens"):
        tokenize_records([], BYTES, max_length=1)
    with pytest.raises(ConfigError, match="truncation_mode is 'left'; choose one of keep_start, keep_end"):
        tokenize_records([], BYTES, truncation_mode="left")


SYSTEM = st.none() | st.just("be kind") | st.just("é")


@given(
    st.lists(st.tuples(PROMPT, TEXT, TEXT), min_size=1, max_size=4),
    SYSTEM,
    SYSTEM,
    st.integers(2, 60),
    st.booleans(),
    st.booleans(),
)
def test_a_reference_with_the_same_tokenizer_scores_the_policys_tokens(rows, own, policys, max_length, keep_end, messages):
    rows = [row for row in rows if row[1] != row[2]]
    records = [(chat if messages else record)(*row) for row in rows]
    mode = "keep_end" if keep_end else "keep_start"
    data = tokenize_records(records, MERGING, system_prompt=policys, max_length=max_length, truncation_mode=mode)
    twin = byte_tokenizer([("a", "b"), ("b", "b"), ("ab", "b"), ("Ġ", "a"), ("Ċ", "Ċ")])
    scored = tokenize_for_reference(data.records, data.pairs, MERGING, twin, system_prompt=own, policy_system_prompt=policys)
    assert tokenize_for_reference(data.records, data.pairs, MERGING, system_prompt=own, policy_system_prompt=policys) == scored
    if own == policys:
        assert scored == data.pairs
    for r, pair, mine in zip(data.records, data.pairs, scored, strict=True):
        assert mine.completions == pair.completions
        assert (mine.chosen_cut, mine.rejected_cut) == (pair.chosen_cut, pair.rejected_cut)
        if own is not None and own != policys:
            assert own in MERGING.decode(mine.prompt_ids)
        if mode == "keep_start":
            assert mine.prompt_ids == tokenize_record(r, MERGING, system_prompt=own).prompt_ids


def test_a_reference_sees_its_system_prompt_and_then_the_policys_window():
    data = tokenize_records([chat("a long question", "yes", "no")], BYTES, max_length=30, truncation_mode="keep_end")
    (mine,) = tokenize_for_reference(data.records, data.pairs, BYTES, system_prompt="Be kind.")
    window = BYTES.decode(data.pairs[0].prompt_ids)
    assert window == "long question<eos>\n<|turn|>assistant\n"
    head = "<|turn|>system\nBe kind.<eos>\n"
    assert BYTES.decode(mine.prompt_ids) == head + window


@given(PROMPT, TEXT, TEXT, SYSTEM, st.integers(2, 60), st.booleans(), st.booleans())
@example("xa", "b" * 9, "c", None, 4, False, False)
@example("q", "不" * 9, "", None, 30, False, True)
def test_a_reference_with_another_tokenizer_scores_the_text(
    prompt, chosen, rejected, system_prompt, max_length, keep_end, messages
):
    assume(chosen != rejected)
    made = (chat if messages else record)(prompt, chosen, rejected)
    mode = "keep_end" if keep_end else "keep_start"
    data = tokenize_records([made], MERGING, max_length=max_length, truncation_mode=mode)
    scored = tokenize_for_reference(data.records, data.pairs, MERGING, BYTES, system_prompt=system_prompt)
    uncut = tokenize_record(made, BYTES, system_prompt=system_prompt)
    assert len(scored) == len(data.pairs)
    for pair, mine in zip(data.pairs, scored, strict=True):
        for whole, ids, cut in (
            (uncut.chosen_ids, mine.chosen_ids, pair.chosen_cut),
            (uncut.rejected_ids, mine.rejected_ids, pair.rejected_cut),
        ):
            text, full = mine.prompt_ids + ids, uncut.prompt_ids + whole
            assert ids and (full[: len(text)] == text if cut else full == text)
            assert not cut or BYTES.eos_token_id != ids[-1]
            assert "\ufffd" not in BYTES.decode(text)


def test_cut_text_stops_before_a_character_in_parts():
    made = record("q", "不不", "no")
    data = tokenize_records([made], BYTES, max_length=7)
    assert data.pairs[0].chosen_cut and len(data.pairs[0].chosen_ids) == 5
    other = byte_tokenizer([("n", "o")])
    (mine,) = tokenize_for_reference(data.records, data.pairs, BYTES, other)
    assert other.decode(mine.chosen_ids) == "不" and mine.chosen_cut and not mine.rejected_cut
    assert other.convert_ids_to_tokens(mine.rejected_ids) == ["no", "<eos>"]


def test_a_word_level_reference_scores_its_own_rendering():
    data = tokenize_records([chat("a b", "ab", "b")], BYTES)
    (mine,) = tokenize_for_reference(data.records, data.pairs, BYTES, WORDS, system_prompt="be kind")
    assert mine == tokenize_record(chat("a b", "ab", "b"), WORDS, system_prompt="be kind")
    assert WORDS.decode(mine.chosen_ids) == "ab<eos>"


def test_fingerprints_tell_tokenizers_apart_and_nothing_else():
    same = byte_tokenizer()
    same(["a", "bbb"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(same) == tokenizer_fingerprint(BYTES)
    others = [MERGING, NO_BOS, WORDS, byte_tokenizer(eos=False), byte_tokenizer(chat_template=CHATML + " ")]
    assert len({tokenizer_fingerprint(t) for t in (BYTES, *others)}) == 6
