"""The whole of the real data, through every step, with a byte-level tokenizer: what is scored is what was written."""

import pytest

from polyref.data import load_preferences, split_by_prompt, tokenize_for_reference, tokenize_records, validate_preferences
from polyref.data.sources import prompt_key

FILES = {
    "hh-harmless-base/pairs.jsonl.gz": 1790,
    "pandalm-human/pairs.jsonl.gz": 888,
    "mt-bench-human/pairs.jsonl.gz": 200,
    "gsm8k-pairs/pairs.jsonl.gz": 1969,
    "persona-evals/extraversion.jsonl.gz": 999,
}
TRANSCRIPTS = [name for name in FILES if name.startswith(("hh", "persona"))]
CASES = [(name, form) for name in FILES for form in ("as_is", "chat")] + [(name, "transcript") for name in TRANSCRIPTS]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_every_pair_is_read_and_tokenised(shared_data, tiny_tokenizer, name, form):
    path = shared_data / name
    records = load_preferences(path, prompt_format=form)
    assert len(records) == FILES[name]
    data = tokenize_records(records, tiny_tokenizer)
    assert (data.report.kept, data.report.dropped, data.report.moved_boundaries) == (FILES[name], 0, 0)
    for record, pair in list(zip(data.records, data.pairs, strict=True))[::7]:
        for text, ids in ((record.chosen, pair.chosen_ids), (record.rejected, pair.rejected_ids)):
            assert tiny_tokenizer.decode(ids) == (text if isinstance(text, str) else text[0]["content"]) + "<eos>"
    train, held_out = split_by_prompt(records, held_out=0.2, seed=0)
    assert round(0.2 * len(records)) - len(held_out) in (0, 1)
    assert not {prompt_key(r.prompt) for r in train} & {prompt_key(r.prompt) for r in held_out}


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_cut_transcripts_under_another_system_prompt(shared_data, tiny_tokenizer, mode):
    records = load_preferences(shared_data / "hh-harmless-base" / "pairs.jsonl.gz", prompt_format="transcript", limit=400)
    data = tokenize_records(records, tiny_tokenizer, max_length=400, truncation_mode=mode)
    assert data.report.kept + data.report.dropped == 400 and data.report.cut_completions > 0
    assert (data.report.dropped, data.report.cut_prompts > 0) == (0, True) if mode == "keep_end" else data.report.dropped > 0
    head = "<|turn|>system\nBe kind.<eos>\n"
    scored = tokenize_for_reference(data.records, data.pairs, tiny_tokenizer, system_prompt="Be kind.")
    for pair, mine in zip(data.pairs, scored, strict=True):
        assert mine.completions == pair.completions
        assert tiny_tokenizer.decode(mine.prompt_ids) == head + tiny_tokenizer.decode(pair.prompt_ids)


def test_known_quirks_are_reported(shared_data):
    report = validate_preferences(shared_data / "hh-harmless-base" / "pairs.jsonl.gz", prompt_format="transcript")
    assert (report.pairs["train"], report.prompts["train"], report.empty_replies) == (1790, 1788, 4)
    assert not report.problems and report.lengths["chosen"][0] == 0
    report = validate_preferences(shared_data / "pandalm-human" / "pairs.jsonl.gz")
    assert (report.prompts["train"], report.empty_replies, report.duplicates, report.problems) == (158, 52, 106, ())


def test_ties_without_chosen_are_refused_with_their_columns(shared_data):
    report = validate_preferences(shared_data / "pandalm-human" / "ties.jsonl.gz")
    assert report.bad_rows == 105 and report.problems[0].column == "chosen" and "response1" in report.problems[0].what
