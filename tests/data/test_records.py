"""Rows become records, or one line that says where and how to mend it."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from polyref.data.records import RowError, parse_record, read_record, record_to_row, to_messages
from polyref.errors import ConfigError, DataError

GOOD = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
USER = {"role": "user", "content": "Q"}
YES, NO = ({"role": "assistant", "content": text} for text in ("yes", "no"))
CHAT = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}


def parse(row, **kwargs):
    return parse_record(row, source="pairs.jsonl", row_number=7, **kwargs)


def test_a_row_with_everything():
    row = GOOD | {"chosen_probability": np.float32(0.75), "reference_weights": [0.25, 0.75], "margin": 1, "note": object()}
    record = parse(row | {"chosen_ended": False, "rejected_ended": True})
    assert (record.chosen_ended, record.rejected_ended) == (False, True)
    assert (record.prompt, record.chosen, record.rejected) == ("Q", "yes", "no")
    assert (record.chosen_probability, record.reference_weights, record.margin) == (0.75, (0.25, 0.75), 1.0)
    assert (record.source, record.row) == ("pairs.jsonl", 7)


def test_optional_columns_may_be_null_or_absent():
    record = parse(GOOD | {"chosen_probability": None, "margin": None, "chosen_ended": None})
    assert (record.chosen_probability, record.reference_weights, record.margin) == (None, None, None)
    assert (record.chosen_ended, record.rejected_ended) == (None, None)


def test_an_empty_reply_is_a_reply():
    assert parse(GOOD | {"rejected": ""}).rejected == ""


def test_messages_keep_role_and_content_only():
    record = parse(CHAT | {"prompt": [USER | {"name": None}]})
    assert (record.prompt, record.chosen, record.rejected) == ((USER,), (YES,), (NO,))


BAD = [
    ({"prompt": "Q", "chosen": "yes"}, "rejected", "is missing (the row has prompt, chosen)"),
    ({}, "chosen", "is missing (the row has none)"),
    (GOOD | {"prompt": None}, "prompt", "is null; give text, or a list of {'role', 'content'} messages"),
    (GOOD | {"prompt": "  \n"}, "prompt", "is empty; fill it in or remove the row"),
    (GOOD | {"prompt": 5}, "prompt", "is a number"),
    (GOOD | {"prompt": b"Q"}, "prompt", "is a bytes"),
    (GOOD | {"chosen": True}, "chosen", "is true or false"),
    (GOOD | {"chosen": {"text": "yes"}}, "chosen", "is an object"),
    (GOOD | {"chosen": []}, "chosen", "is an empty list of messages"),
    (GOOD | {"chosen": ["yes"]}, "chosen", "message 1 is text; a message is {'role': TEXT, 'content': TEXT}"),
    (GOOD | {"chosen": [{"role": "assistant"}]}, "chosen", "the content of message 1 is missing"),
    (GOOD | {"chosen": [{"from": "gpt", "value": "yes"}]}, "chosen", "the role of message 1 is missing"),
    (
        GOOD | {"chosen": [YES, {"role": "user", "content": [{"type": "image"}]}]},
        "chosen",
        "the content of message 2 is a list",
    ),
    (GOOD | {"chosen": [{"role": "", "content": "yes"}]}, "chosen", "the role of message 1 is empty"),
    (GOOD | {"chosen": "a\ud800"}, "chosen", "character 2 is half of a surrogate pair (U+D800); repair the text"),
    (GOOD | {"chosen_ended": 1}, "chosen_ended", "is a number, not true or false; say whether the completion ended by itself"),
    (GOOD | {"rejected_ended": "false"}, "rejected_ended", "is text, not true or false"),
    (GOOD | {"rejected": "yes"}, "rejected", "is identical to chosen; remove the row: it states no preference"),
    (GOOD | {"rejected": [NO]}, "rejected", "is not of one kind with chosen"),
    (GOOD | {"prompt": [USER]}, "prompt", "holds messages while chosen and rejected are text"),
    (CHAT | {"prompt": "another"}, "prompt", "is text that does not end the messages chosen and rejected share"),
    (
        CHAT | {"chosen": [YES, USER]},
        "chosen",
        "has after the prompt: assistant, user; a completion is exactly one assistant message",
    ),
    (CHAT | {"rejected": [USER]}, "rejected", "has after the prompt: user"),
    ({"chosen": [USER, YES], "rejected": [USER]}, "rejected", "has after the prompt: nothing"),
    (
        {"chosen": "yes", "rejected": "no"},
        "prompt",
        "there is no prompt, and chosen and rejected begin differently; "
        "add a prompt column, or map it with columns={'prompt': 'NAME'}",
    ),
    ({"chosen": [YES], "rejected": [NO]}, "prompt", "there is no prompt, and chosen and rejected begin differently"),
    (GOOD | {"chosen_probability": float("nan")}, "chosen_probability", "is nan, not a finite number"),
    (GOOD | {"chosen_probability": 1.5}, "chosen_probability", "is 1.5, outside 0 to 1"),
    (GOOD | {"chosen_probability": -0.1}, "chosen_probability", "is -0.1, outside 0 to 1"),
    (GOOD | {"chosen_probability": "0.7"}, "chosen_probability", "is text, not a number; write a plain number"),
    (GOOD | {"chosen_probability": True}, "chosen_probability", "is true or false, not a number"),
    (GOOD | {"margin": float("inf")}, "margin", "is inf, not a finite number"),
    (GOOD | {"margin": 10**400}, "margin", "is inf, not a finite number"),
    (GOOD | {"reference_weights": [0.5, 0.6]}, "reference_weights", "sums to 1.1; weights are at least 0 and sum to 1"),
    (GOOD | {"reference_weights": [1.5, -0.5]}, "reference_weights", "holds the negative weight -0.5"),
    (GOOD | {"reference_weights": []}, "reference_weights", "is an empty list"),
    (GOOD | {"reference_weights": 1.0}, "reference_weights", "is a number, not a list of numbers"),
    (GOOD | {"reference_weights": [1.0, float("nan")]}, "reference_weights", "is nan, not a finite number"),
    (GOOD | {"reference_weights": ["1"]}, "reference_weights", "is text, not a number"),
]


@pytest.mark.parametrize(("row", "column", "line"), BAD, ids=[f"{column}: {line[:40]}" for _, column, line in BAD])
def test_a_bad_row_is_one_line_with_its_place(row, column, line):
    with pytest.raises(DataError) as caught:
        parse(row)
    message = str(caught.value)
    assert message.startswith(f"pairs.jsonl, row 7, column {column}: {line}")
    assert "; " in message and message.isprintable() and caught.value.exit_code == 2


def test_a_row_that_is_no_object():
    with pytest.raises(DataError, match="^pairs.jsonl, row 7: is a list, not an object; a row is an object"):
        parse([1, 2])


def test_every_problem_of_a_row_is_found():
    record, problems = read_record(
        {"prompt": 1, "chosen": None, "rejected": "no", "margin": "x"}, source="f", row_number=1, columns=None
    )
    assert record is None and [problem.column for problem in problems] == ["prompt", "chosen", "margin"]


def test_hostile_text_is_escaped_in_messages():
    with pytest.raises(RowError) as caught:
        parse_record({"\x1b[2J\u202e<script>\n": 1}, source="evil\x1b]0;title\x07.jsonl", row_number=1)
    message = str(caught.value)
    assert message.startswith(
        r"evil\x1b]0;title\x07.jsonl, row 1, column chosen: is missing (the row has \x1b[2J\u202e<script> )"
    )
    assert message.isprintable()


def test_columns_are_mapped_and_named_in_errors():
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    record = parse({"question": "Q", "good": "yes", "bad": "no", "prompt": "not this"}, columns=columns)
    assert (record.prompt, record.chosen, record.rejected) == ("Q", "yes", "no")
    with pytest.raises(DataError, match="row 7, column good: is null"):
        parse({"question": "Q", "good": None, "bad": "no"}, columns=columns)
    with pytest.raises(DataError, match="row 7, column question: is missing"):
        parse(GOOD, columns={"prompt": "question"})
    with pytest.raises(ConfigError, match="columns maps 'answer', which is no field; the fields are prompt, chosen"):
        parse(GOOD, columns={"answer": "x"})
    with pytest.raises(ConfigError, match="columns maps 'prompt' to null; give the name of a column"):
        parse(GOOD, columns={"prompt": None})


def test_implicit_prompt_of_messages_is_what_they_begin_with():
    record = parse({"chosen": [USER, YES, USER, YES], "rejected": [USER, YES, USER, NO]})
    assert (record.prompt, record.chosen, record.rejected) == ((USER, YES, USER), (YES,), (NO,))


def test_a_text_prompt_that_whole_conversations_repeat():
    record = parse({"prompt": "Q", "chosen": [USER, YES], "rejected": [USER, NO]})
    assert (record.prompt, record.chosen, record.rejected) == ((USER,), (YES,), (NO,))


def test_implicit_prompt_of_transcripts_ends_at_the_last_shared_reply():
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    record = parse({"chosen": start + " I do", "rejected": start + " I don't"})
    assert (record.prompt, record.chosen, record.rejected) == (start, " I do", " I don't")
    stripped = parse({"chosen": start.strip() + " I do", "rejected": start.strip() + " I don't"})
    assert (stripped.prompt, stripped.chosen, stripped.rejected) == (start.strip(), " I do", " I don't")
    assert to_messages(stripped, "transcript").prompt == to_messages(record, "transcript").prompt
    prose = parse({"chosen": "Human: that is what we are", "rejected": "Human: that is what they are"})
    assert prose.prompt == "Human: that is what"
    with pytest.raises(DataError, match="column chosen: the transcripts differ before the last Assistant: turn"):
        parse({"chosen": start + " x", "rejected": "\n\nHuman: a\n\nAssistant: other\n\nHuman: c\n\nAssistant: x"})
    with pytest.raises(DataError, match="column chosen: the transcripts share no Assistant: turn"):
        parse({"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: x"})


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="the trl extra is not installed")
@pytest.mark.filterwarnings("ignore")
@given(st.text("ab ", min_size=1), st.text("ab ", max_size=4), st.text("ab ", max_size=4))
@example("Is it", " yes", " no")
def test_implicit_prompt_of_strings_is_cut_where_trl_cuts(shared, first, second):
    from trl.data_utils import extract_prompt

    chosen, rejected = shared + first, shared + second
    assume(chosen != rejected)
    expected = extract_prompt({"chosen": chosen, "rejected": rejected})
    assume(expected["prompt"].strip())
    record = parse({"chosen": chosen, "rejected": rejected})
    assert {"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected} == expected


def test_chat_format_wraps_text_and_leaves_messages():
    record = to_messages(parse(GOOD), "chat")
    assert (record.prompt, record.chosen, record.rejected) == ((USER,), (YES,), (NO,))
    assert to_messages(record, "chat") is record
    assert to_messages(parse(GOOD), "as_is") == parse(GOOD)


def test_transcript_format_reads_turns():
    row = {"prompt": "\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman:  d\n\nAssistant:", "chosen": " yes", "rejected": ""}
    record = to_messages(parse(row), "transcript")
    assert [(m["role"], m["content"]) for m in record.prompt] == [("user", "a\n\nb"), ("assistant", "c"), ("user", " d")]
    assert (record.chosen, record.rejected[0]["content"]) == ((YES,), "")


@pytest.mark.parametrize(
    ("change", "column", "line"),
    [
        ({"prompt": "Q"}, "prompt", "does not begin with a Human: or Assistant: turn"),
        ({"prompt": "Hi\n\nHuman: a\n\nAssistant:"}, "prompt", "does not begin with a Human: or Assistant: turn"),
        ({"prompt": "\n\nHuman: a"}, "prompt", "does not end in an open Assistant: turn"),
        ({"prompt": "\n\nHuman: a\n\nAssistant: Well,"}, "prompt", "does not end in an open Assistant: turn"),
        ({"prompt": "\n\nAssistant:"}, "prompt", "has no turn before the open Assistant: turn"),
        ({"chosen": " a\n\nHuman: b"}, "chosen", "holds more turns than one reply"),
        (CHAT, "prompt", "holds messages, not a transcript"),
    ],
)
def test_what_is_no_transcript_is_refused(change, column, line):
    row = {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " yes", "rejected": " no"} | change
    with pytest.raises(DataError, match=f"^pairs.jsonl, row 7, column {column}: {line}; use prompt_format"):
        to_messages(parse(row), "transcript")


def test_an_unknown_prompt_format():
    with pytest.raises(ConfigError, match="prompt_format is 'chatml'; choose one of as_is, chat, transcript"):
        to_messages(parse(GOOD), "chatml")


TEXT = st.text(min_size=1).filter(str.strip)


@given(TEXT, TEXT, TEXT, st.none() | st.floats(0, 1), st.none() | st.just([0.5, 0.5]), st.booleans())
def test_records_survive_the_way_to_a_row_and_back(prompt, chosen, rejected, probability, weights, chat):
    assume(chosen != rejected)
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    record = to_messages(
        parse(row | {"chosen_probability": probability, "reference_weights": weights}), "chat" if chat else "as_is"
    )
    assert parse(record_to_row(record)) == record


def test_reading_data_loads_no_heavy_library():
    code = "import sys, polyref.data; print({'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
