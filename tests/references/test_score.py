"""Scoring under K references: what is loaded, what is computed, what is found again, and what survives a kill."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fakes import (
    CHATML,
    auxiliary_columns,
    byte_tokenizer,
    counted_calls,
    pair_rows,
    saved_gguf,
    saved_llama,
    saved_lora,
    tiny_llama,
    tiny_lora,
    word_tokenizer,
)
from polyref.data.collate import row_length
from polyref.data.records import parse_record
from polyref.data.tokenize import TokenizedPreferences, tokenize_records
from polyref.errors import ConfigError, DataError, InputError, ModelError, ReferenceSetError
from polyref.references import score
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.references.score import ReferenceScores, score_references
from polyref.scoring.cache import LogProbCache
from polyref.scoring.models import ModelSource, load_tokenizer

SCORE_PROGRAM = """
    import os, sys, time
    from functools import partialmethod
    from polyref.data.records import parse_record
    from polyref.data.tokenize import tokenize_records
    from polyref.references import score
    from polyref.references.reference_set import Reference, ReferenceSet
    from polyref.scoring.models import ModelSource, load_tokenizer
    from fakes import pair_rows

    model, cache, journal, seconds, pairs = sys.argv[1:4] + [float(sys.argv[4]), int(sys.argv[5])]
    log, plainly = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT), score._score_batch

    def slowly(model, pairs, plan, device):
        time.sleep(seconds)
        os.write(log, b"".join(b"%d\\n" % len(pair.prompt_ids) for pair in pairs))
        return plainly(model, pairs, plan, device)

    score._score_batch = slowly
    score.LogProbCache.writer = partialmethod(score.LogProbCache.writer, flush_rows=4)
    tokenizer = load_tokenizer(ModelSource(model))
    records = [parse_record(row, source="memory", row_number=i) for i, row in enumerate(pair_rows(pairs), 1)]
    data = tokenize_records(records, tokenizer)
    print("ready", flush=True)
    scores = score.score_references(data, ReferenceSet((Reference(model),)), tokenizer, cache_dir=cache, batch_size=2)
    print(scores.misses, scores.chosen.sum().hex())
"""


def tokens_of(count: int, tokenizer: PreTrainedTokenizerFast, *, max_length: int | None = None, **columns: Any) -> Any:
    records = [parse_record(row, source="memory", row_number=i) for i, row in enumerate(pair_rows(count, **columns), 1)]
    return tokenize_records(records, tokenizer, max_length=max_length)


def both(scores: ReferenceScores) -> np.ndarray:
    """(N, 2, K)"""
    return np.stack([scores.chosen, scores.rejected], 1)


def plainly(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """log p(completion | prompt) through the model's own logits, a sequence at a time."""
    with torch.no_grad():
        logps = model(torch.tensor([[*prompt, *completion]])).logits[0].double().log_softmax(-1)
    start = len(prompt) - 1
    return float(sum(logps[start + t, token] for t, token in enumerate(completion)))


def by_hand(model: Any, data: TokenizedPreferences, system: tuple[int, ...] = ()) -> np.ndarray:
    return np.array([[plainly(model, system + pair.prompt_ids, ids) for ids in pair.completions] for pair in data.pairs])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    return saved_llama(tmp_path_factory.mktemp("models") / "base", tiny_tokenizer)


def test_auxiliary_completions_are_scored_in_the_row_of_their_prompt(
    model_folder: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = tokens_of(5, tiny_tokenizer, max_length=28, **auxiliary_columns(3))
    assert data.report.cut_completions > 0
    members = ReferenceSet((Reference(str(model_folder)), Reference(model_folder, system_prompt="be kind", name="kind")))
    first = score_references(tokens_of(5, tiny_tokenizer, max_length=28), members, tiny_tokenizer, cache_dir=tmp_path)
    with counted_calls() as calls:
        scores = score_references(data, members, tiny_tokenizer, cache_dir=tmp_path, batch_size=2)
    longest = max(row_length(pair.prompt_ids, pair.completions) for pair in data.pairs)
    assert (2, longest) in calls, "a row is a prompt once and its eight completions"
    assert scores.auxiliary.shape == (5, 6, 2) and first.auxiliary.shape == (5, 0, 2)
    everything = np.concatenate([both(scores), scores.auxiliary], 1)
    np.testing.assert_allclose(everything[..., 0], by_hand(tiny_llama(tiny_tokenizer), data), rtol=1e-4)
    np.testing.assert_array_equal(both(scores), both(first))
    assert scores.hits == first.misses, "what was scored without auxiliary pairs is found again"
    with counted_calls() as calls:
        again = score_references(data, members, tiny_tokenizer, cache_dir=tmp_path, batch_size=2)
    assert not calls and again.hit_rate == 1.0
    np.testing.assert_array_equal(again.auxiliary, scores.auxiliary)


def test_pairs_with_different_numbers_of_auxiliary_pairs_are_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [*pair_rows(1, **auxiliary_columns(2)), *pair_rows(1)]
    records = [parse_record(row, source="f", row_number=i) for i, row in enumerate(rows, 1)]
    with pytest.raises(DataError, match="f, row 2: 0 auxiliary pairs where others have 2; give every row"):
        score_references(tokenize_records(records, tiny_tokenizer), ReferenceSet((Reference("any"),)), tiny_tokenizer)


def test_k_references_give_one_column_each(model_folder: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data, other = tokens_of(5, tiny_tokenizer), tiny_llama(tiny_tokenizer, seed=1)
    chat = tokens_of(5, tiny_tokenizer)
    members = (
        Reference(str(model_folder)),
        Reference(other, dtype="float32"),
        Reference(model_folder, system_prompt="be kind"),
    )
    scores = score_references(data, ReferenceSet(members), tiny_tokenizer, cache_dir=tmp_path, batch_size=2)
    assert scores.chosen.shape == scores.rejected.shape == (5, 3) and scores.chosen.dtype == np.float64
    base = tiny_llama(tiny_tokenizer)
    np.testing.assert_allclose(both(scores)[..., 0], by_hand(base, data), rtol=1e-4)
    np.testing.assert_allclose(both(scores)[..., 1], by_hand(other, data), rtol=1e-4)
    bos, text = chat.pairs[0].prompt_ids[:1], tuple(tiny_tokenizer("be kind\n\n", add_special_tokens=False)["input_ids"])
    for i, pair in enumerate(data.pairs):
        prompt = bos + text + pair.prompt_ids[1:]
        assert scores.chosen[i, 2] == pytest.approx(plainly(base, prompt, pair.chosen_ids), rel=1e-4)
    assert (scores.hits, scores.misses, scores.hit_rate) == (0, 30, 0.0)
    assert len(scores.compatibility) == 3 and "be kind" in scores.compatibility[2]


def test_a_gguf_file_scores_as_the_model_it_was_made_from(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer([("e", "s")])
    model, folder, cache = tiny_llama(tokenizer), tmp_path / "model", tmp_path / "cache"
    folder.mkdir()
    file = saved_gguf(folder / "tiny.gguf", tokenizer, model)
    kept = load_tokenizer(ModelSource(str(folder), file.name))
    assert kept("yes").input_ids == tokenizer("yes", add_special_tokens=False).input_ids
    data = tokens_of(3, tokenizer)
    members = (
        Reference(folder, tokenizer=tokenizer, gguf_file=file.name),
        Reference(model, tokenizer=tokenizer),
        Reference(folder, gguf_file=file.name),
        Reference(model, tokenizer=kept),
    )
    scores = both(score_references(data, ReferenceSet(members), tokenizer, cache_dir=cache))
    np.testing.assert_array_equal(scores[..., 0], scores[..., 1])
    np.testing.assert_array_equal(scores[..., 2], scores[..., 3])
    np.testing.assert_allclose(scores[..., 0], by_hand(model, data), rtol=1e-4)
    saved_gguf(file, tokenizer, tiny_llama(tokenizer, seed=2))
    changed = score_references(data, ReferenceSet(members[:1]), tokenizer, cache_dir=cache)
    assert changed.hits == 0 and not np.isclose(changed.chosen[:, 0], scores[:, 0, 0]).any()


def test_no_pairs_are_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = tokens_of(1, tiny_tokenizer, max_length=2)
    with pytest.raises(DataError, match="none of 1 pairs has a completion left"):
        score_references(data, ReferenceSet((Reference(tiny_llama(tiny_tokenizer)),)), tiny_tokenizer)


def test_equal_weights_are_loaded_once_and_one_model_is_in_memory_at_a_time(
    model_folder: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = saved_llama(tmp_path / "other", tiny_tokenizer, seed=1)
    adapter = saved_lora(tmp_path / "adapter", tiny_tokenizer, seed=3)
    alive: list[weakref.ref[Any]] = []
    most = 0

    def load(source: Any) -> Any:
        nonlocal most
        model = LlamaForCausalLM.from_pretrained(source.model).eval()
        alive.append(weakref.ref(model))
        most = max(most, sum(reference() is not None for reference in alive))
        return model

    monkeypatch.setattr(score, "load_causal_lm", load)
    prompts = ["be kind", "be brief", None]
    same = [Reference(model_folder, system_prompt=text) for text in prompts]
    members = (
        same[0],
        Reference(other),
        *same[1:],
        Reference(model_folder, adapter=adapter),
        Reference(other, system_prompt="x"),
    )
    scores = score_references(tokens_of(3, tiny_tokenizer), ReferenceSet(members), tiny_tokenizer)
    assert len(alive) == 2, "six references, two sets of weights"
    assert most == 1
    assert len({column.tobytes() for column in scores.chosen.T}) == 6


def test_a_member_with_an_adapter_scores_as_the_adapted_model(
    model_folder: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    from peft import PeftModel

    data = tokens_of(3, tiny_tokenizer)
    first, second = (saved_lora(tmp_path / f"a{seed}", tiny_tokenizer, seed=seed) for seed in (1, 2))
    members = (Reference(model_folder, adapter=first), Reference(model_folder), Reference(model_folder, adapter=str(second)))
    scores = score_references(data, ReferenceSet(members), tiny_tokenizer, cache_dir=tmp_path / "cache")
    for column, adapter in ((0, first), (1, None), (2, second)):
        model: Any = tiny_llama(tiny_tokenizer)
        model = PeftModel.from_pretrained(model, adapter).eval() if adapter else model
        np.testing.assert_allclose(both(scores)[..., column], by_hand(model, data), rtol=1e-4)


def test_a_trained_head_reaches_no_other_member(
    model_folder: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    from peft import get_peft_model

    trained = get_peft_model(tiny_llama(tiny_tokenizer), tiny_lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    trained.save_pretrained(tmp_path / "head")
    data, plain = tokens_of(3, tiny_tokenizer), Reference(model_folder)
    both_members = ReferenceSet((Reference(model_folder, adapter=tmp_path / "head"), plain))
    mixed = score_references(data, both_members, tiny_tokenizer)
    alone = score_references(data, ReferenceSet((plain,)), tiny_tokenizer)
    np.testing.assert_array_equal(both(mixed)[..., 1], both(alone)[..., 0])
    np.testing.assert_allclose(both(mixed)[..., 0], by_hand(trained.eval(), data), rtol=1e-4)


def test_a_member_of_weight_0_is_neither_loaded_nor_scored(model_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data, broken = tokens_of(3, tiny_tokenizer), tiny_llama(tiny_tokenizer)
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    members = (Reference(broken), Reference(model_folder), Reference("no/such/folder"))
    references = ReferenceSet(members, (0.0, 1.0, 0.0))
    assert references.needed() == (False, True, False)
    assert references.needed(torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])) == (True, True, False)
    scores = score_references(data, references, tiny_tokenizer, needed=references.needed())
    assert not scores.chosen[:, [0, 2]].any() and scores.misses == 6 and "weight is 0" in scores.compatibility[2]
    chosen = torch.from_numpy(scores.chosen)
    assert torch.equal(references.anchor(chosen), chosen[:, 1])
    with pytest.raises(ReferenceSetError, match="1 entries for 3 references"):
        score_references(data, references, tiny_tokenizer, needed=[True])


def test_a_revision_is_that_of_the_repository_it_was_given_for(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(score, "load_tokenizer", asked.append)
    for reference in (
        Reference("owner/model", tokenizer="owner/model", revision="v1", trust_remote_code=True),
        Reference(model_folder, tokenizer="owner/words", revision="v1"),
        Reference(tiny_llama(tiny_tokenizer), tokenizer="owner/words", revision="v1"),
        Reference("owner/model", tokenizer="owner/words", revision="v1"),
    ):
        score.own_tokenizer(reference)
    assert [(source.model, source.revision) for source in asked] == [
        ("owner/model", "v1"),
        *[("owner/words", "v1")] * 2,
        ("owner/words", None),
    ]
    assert asked[0].trust_remote_code and not asked[1].trust_remote_code


def test_a_model_in_memory_is_known_by_its_weights_and_its_adapters_state(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """With its adapter on a model is another scorer than with it off, and than with another scale."""
    from peft import get_peft_model

    data, model = tokens_of(3, tiny_tokenizer), get_peft_model(tiny_llama(tiny_tokenizer), tiny_lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.1)
    references = ReferenceSet((Reference(model),))

    def scored() -> ReferenceScores:
        return score_references(data, references, tiny_tokenizer, cache_dir=tmp_path)

    on = scored()
    with model.disable_adapter():
        off = scored()
    np.testing.assert_allclose(both(on)[..., 0], by_hand(model, data), rtol=1e-4)
    np.testing.assert_allclose(both(off)[..., 0], by_hand(tiny_llama(tiny_tokenizer), data), rtol=1e-4)
    bare = score_references(data, ReferenceSet((Reference(tiny_llama(tiny_tokenizer)),)), tiny_tokenizer, cache_dir=tmp_path)
    assert bare.hit_rate == 1.0, "adapters that are off are no part of the scorer"
    assert scored().hit_rate == 1.0
    model.peft_config["default"].lora_alpha *= 2
    assert scored().hit_rate == 0.0
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).mul_(2)
    assert scored().hit_rate == 0.0


def test_a_model_in_memory_is_left_as_it_was(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama(tiny_tokenizer).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = saved_lora(tmp_path / "a", tiny_tokenizer, seed=1)
    references = ReferenceSet((Reference(model, adapter=adapter), Reference(model)))
    score_references(tokens_of(2, tiny_tokenizer), references, tiny_tokenizer)
    assert model.training and model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_another_tokenizer_scores_the_text(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = tokens_of(4, tiny_tokenizer)
    words = word_tokenizer(["question", ":", " please", " yes", " no", " never", *(f" {i}" for i in range(20)), *"0123456789"])
    folder = saved_llama(tmp_path / "words", words, seed=5)
    scores = score_references(data, ReferenceSet((Reference(folder),)), tiny_tokenizer)
    model = tiny_llama(words, seed=5)
    for i, record in enumerate(data.records):
        prompt = words(record.prompt, add_special_tokens=False)["input_ids"]
        for text, found in ((record.chosen, scores.chosen), (record.rejected, scores.rejected)):
            whole = [*words(f"{record.prompt}{text}", add_special_tokens=False)["input_ids"], words.eos_token_id]
            assert whole[: len(prompt)] == prompt
            assert found[i, 0] == pytest.approx(plainly(model, prompt, whole[len(prompt) :]), rel=1e-4)
    assert "scoring the text" in scores.compatibility[0]


def test_uniform_references_with_two_tokenizers_cost_log_vocabulary_a_token(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Checked by hand: under a model that gives every token the same chance, n tokens have log-probability -n log V."""
    record = parse_record({"prompt": "say", "chosen": " yes", "rejected": " no no"}, source="memory", row_number=1)
    words = word_tokenizer(["say", " yes", " no"])
    members = []
    for tokenizer in (tiny_tokenizer, words):
        model = tiny_llama(tokenizer)
        torch.nn.init.zeros_(model.lm_head.weight)
        members.append(Reference(model, tokenizer=tokenizer))
    scores = score_references(tokenize_records([record], tiny_tokenizer), ReferenceSet(tuple(members)), tiny_tokenizer)
    v, w = math.log(len(tiny_tokenizer)), math.log(len(words))
    np.testing.assert_allclose(scores.chosen, [[-5 * v, -2 * w]], rtol=1e-5)  # " yes" and the end; by bytes, by words
    np.testing.assert_allclose(scores.rejected, [[-7 * v, -3 * w]], rtol=1e-5)


def test_chat_data_passes_through_each_members_own_template(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """The same bytes with a template that writes two more characters a turn: a different sequence, and a different score."""
    plain = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}[{% endif %}"
    other = byte_tokenizer(chat_template=plain)
    row = {name: [{"role": role, "content": name}] for name, role in (("prompt", "user"), ("chosen", "assistant"))}
    record = parse_record(row | {"rejected": [{"role": "assistant", "content": "bad"}]}, source="memory", row_number=1)
    model = tiny_llama(tiny_tokenizer)
    members = (Reference(model), Reference(model, tokenizer=other))
    scores = score_references(tokenize_records([record], tiny_tokenizer), ReferenceSet(members), tiny_tokenizer)

    def ids(text: str) -> list[int]:
        return list(other(text, add_special_tokens=False)["input_ids"])

    assert scores.chosen[0, 1] == pytest.approx(plainly(model, ids("[prompt]["), ids("chosen]")), rel=1e-4)
    assert scores.chosen[0, 0] != pytest.approx(scores.chosen[0, 1], rel=1e-2)


def test_what_was_scored_costs_no_forward_pass_again(
    model_folder: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    members = (Reference(model_folder), Reference(model_folder, system_prompt="be kind"))
    data = tokens_of(4, tiny_tokenizer)
    first = score_references(data, ReferenceSet(members), tiny_tokenizer, cache_dir=tmp_path)
    with counted_calls() as calls:
        again = [
            score_references(data, ReferenceSet(members, weights=(0.9, 0.1)), tiny_tokenizer, cache_dir=tmp_path),
            score_references(data, ReferenceSet(members, composition="arithmetic"), tiny_tokenizer, cache_dir=tmp_path),
        ]
        swapped = score_references(data, ReferenceSet(members[::-1]), tiny_tokenizer, cache_dir=tmp_path, batch_size=1)
    assert calls == []
    for scores in again:
        np.testing.assert_array_equal(both(scores), both(first))
        assert (scores.hit_rate, scores.tokens) == (1.0, 0)
    np.testing.assert_array_equal(both(swapped), both(first)[..., ::-1])
    copy = saved_llama(tmp_path / "copy", tiny_tokenizer)
    with counted_calls() as calls:
        moved = score_references(data, ReferenceSet((Reference(copy),)), tiny_tokenizer, cache_dir=tmp_path)
    assert calls == [] and moved.hit_rate == 1.0, "the same weights under another path are the same reference"


def test_max_length_never_returns_a_stale_value(
    model_folder: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    references = ReferenceSet((Reference(model_folder),))
    for max_length in (None, 30, 26, 30):
        data = tokens_of(4, tiny_tokenizer, max_length=max_length)
        cached = score_references(data, references, tiny_tokenizer, cache_dir=tmp_path)
        np.testing.assert_allclose(both(cached), both(score_references(data, references, tiny_tokenizer)), rtol=1e-5)
    assert cached.hit_rate == 1.0


def test_changed_weights_are_scored_anew(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data, folder = tokens_of(3, tiny_tokenizer), saved_llama(tmp_path / "model", tiny_tokenizer)
    references = ReferenceSet((Reference(folder),))
    before = score_references(data, references, tiny_tokenizer, cache_dir=tmp_path / "cache")
    saved_llama(folder, tiny_tokenizer, seed=1)
    after = score_references(data, references, tiny_tokenizer, cache_dir=tmp_path / "cache")
    assert after.hit_rate == 0.0
    np.testing.assert_allclose(both(after)[..., 0], by_hand(tiny_llama(tiny_tokenizer, seed=1), data), rtol=1e-4)
    assert not np.isclose(both(before), both(after)).any()


def test_dtype_is_part_of_the_reference(model_folder: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = tokens_of(3, tiny_tokenizer)
    members = tuple(Reference(model_folder, dtype=name) for name in ("float32", "bfloat16", "float64"))
    scores = score_references(data, ReferenceSet(members), tiny_tokenizer, cache_dir=tmp_path)
    np.testing.assert_allclose(scores.chosen[:, 0], scores.chosen[:, 2], rtol=1e-5)
    np.testing.assert_allclose(scores.chosen[:, 1], scores.chosen[:, 2], rtol=2e-2)
    assert not (scores.chosen[:, 1] == scores.chosen[:, 0]).any()


def test_repeated_pairs_are_scored_once(model_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    row = pair_rows(1)[0]
    records = [parse_record(row, source="memory", row_number=i) for i in range(6)]
    scores = score_references(
        tokenize_records(records, tiny_tokenizer), ReferenceSet((Reference(model_folder),)), tiny_tokenizer, batch_size=2
    )
    assert scores.misses == 2 and len(set(scores.chosen[:, 0])) == 1
    twins = ReferenceSet((Reference(model_folder), Reference(model_folder, name="twin")))
    scores = score_references(tokenize_records(records, tiny_tokenizer), twins, tiny_tokenizer, batch_size=2)
    assert (scores.hits, scores.misses) == (2, 2), "what one member scored, its twin finds"


def test_progress_counts_the_tokens_that_pass_through_a_model(
    model_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    seen: list[tuple[str, int, int]] = []
    data = tokens_of(5, tiny_tokenizer)
    scores = score_references(
        data,
        ReferenceSet((Reference(model_folder, name="base"),)),
        tiny_tokenizer,
        batch_size=2,
        progress=lambda *line: seen.append(line),
    )
    total = sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in data.pairs)
    assert len(seen) == 3 and seen[-1] == ("base", total, total) and scores.tokens == total and scores.seconds > 0


REFUSED = {
    "outside the vocabulary": lambda t, f: Reference(tiny_llama(word_tokenizer(["a"]))),
    "do not fit the context of 8": lambda t, f: Reference(tiny_llama(t, max_position_embeddings=8)),
    "no such folder": lambda t, f: Reference(f / "absent"),
    "no adapter_config.json": lambda t, f: Reference(tiny_llama(t), adapter=f),
    "has an empty model name": lambda t, f: Reference(" "),
    "weights of dtype float32, not bfloat16": lambda t, f: Reference(tiny_llama(t), dtype="bfloat16"),
    "an adapter, not a model": lambda t, f: Reference(saved_lora(f, t, seed=0)),
    "unknown dtype": lambda t, f: Reference("some/model", dtype="int3"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_member_that_cannot_score_is_refused_in_one_line(
    words: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with counted_calls() as calls, pytest.raises(InputError, match=words) as error:
        references = ReferenceSet((REFUSED[words](tiny_tokenizer, tmp_path),))
        score_references(tokens_of(2, tiny_tokenizer), references, tiny_tokenizer)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert calls == []
    assert isinstance(error.value, ReferenceSetError | ModelError | ConfigError)
    if "vocabulary" in words or "context" in words:
        assert "memory, row 1" in str(error.value)


def test_rows_on_both_sides_of_where_longrope_turns_are_told(
    tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 8.0}
    config = LlamaConfig(vocab_size=len(tiny_tokenizer), hidden_size=16, num_attention_heads=2, max_position_embeddings=256)
    data = tokens_of(3, tiny_tokenizer)
    lengths = [len(pair.prompt_ids) + len(ids) for pair in data.pairs for ids in pair.completions]
    for turn, told in ((min(lengths) - 1, False), (min(lengths), True), (max(lengths) - 1, True), (max(lengths), False)):
        config.rope_parameters = rope | {"original_max_position_embeddings": turn}
        caplog.clear()
        score.check_fit(config, data.pairs, data.records, "reference long")
        assert (f"reference long turns positions otherwise in batches that go beyond {turn} tokens" in caplog.text) == told


def test_sets_that_mean_nothing_are_refused() -> None:
    one = Reference("some/model")
    for arguments in (
        {"members": ()},
        {"members": (one, one), "weights": (0.5, 0.6)},
        {"members": (one, one), "weights": (1.0,)},
        {"members": (one, one), "weights": (1.5, -0.5)},
        {"members": (one, one), "weights": (float("nan"), 1.0)},
        {"members": (one,), "composition": "harmonic"},
    ):
        with pytest.raises(ReferenceSetError):
            ReferenceSet(**arguments)  # type: ignore[arg-type]
    assert ReferenceSet((one, one, one, one)).weights == (0.25,) * 4
    assert len(ReferenceSet(one)) == 1  # type: ignore[arg-type]


def test_the_anchor_composes_with_each_prompts_own_weights() -> None:
    logps = torch.tensor([[-1.0, -3.0], [-2.0, -8.0]], dtype=torch.float64)
    two = (Reference("a"), Reference("b"))
    own = torch.tensor([[1.0, 0.0], [0.25, 0.75]], dtype=torch.float64)
    geometric, arithmetic = ReferenceSet(two, (0.5, 0.5)), ReferenceSet(two, (0.5, 0.5), "arithmetic")
    assert geometric.anchor(logps).tolist() == [-2.0, -5.0]
    thirds = ReferenceSet(tuple(Reference(f"some/{i}") for i in range(3)), (0.333333,) * 3)
    assert thirds.anchor(torch.full((1, 3), -3.0)).tolist() == pytest.approx([-3.0], abs=1e-5), "in float32 as in float64"
    assert geometric.anchor(logps, own).tolist() == [-1.0, -6.5]
    expected = [math.log(0.5 * math.exp(a) + 0.5 * math.exp(b)) for a, b in logps.tolist()]
    assert arithmetic.anchor(logps).tolist() == pytest.approx(expected)
    expected = [-1.0, math.log(0.25 * math.exp(-2) + 0.75 * math.exp(-8))]
    assert arithmetic.anchor(logps, own).tolist() == pytest.approx(expected)
    with pytest.raises(ReferenceSetError, match="probability 0"):
        geometric.anchor(torch.tensor([[-1.0, -math.inf]]))
    with pytest.raises(ReferenceSetError, match="^f, row 9: has probability 0 under reference b, whose weight"):
        geometric.anchor(torch.tensor([[-1.0, -1.0], [-1.0, -math.inf]]), places=["f, row 2", "f, row 9"])
    assert arithmetic.anchor(torch.tensor([[-1.0, -math.inf]])).tolist() == pytest.approx([-1 + math.log(0.5)])


def start(model: Path, cache: Path, journal: Path, seconds: float, pairs: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(SCORE_PROGRAM), *map(str, (model, cache, journal, seconds, pairs))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def contents(cache: Path) -> dict[str, bytes]:
    return {str(p.relative_to(cache)): p.read_bytes() for p in sorted(cache.rglob("*")) if p.is_file() and p.name != ".lock"}


def test_a_killed_scoring_goes_on_and_ends_with_the_same_bytes(
    model_folder: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    data, references = tokens_of(12, tiny_tokenizer), ReferenceSet((Reference(model_folder),))
    unbroken = score_references(data, references, tiny_tokenizer, cache_dir=tmp_path / "unbroken", batch_size=2)
    process = start(model_folder, tmp_path / "killed", tmp_path / "journal", 0.3, 12)
    try:
        while not list((tmp_path / "killed").rglob("part-*.parquet")):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    before = contents(tmp_path / "killed")
    assert before and before.keys() != contents(tmp_path / "unbroken").keys()
    with counted_calls() as calls:
        resumed = score_references(data, references, tiny_tokenizer, cache_dir=tmp_path / "killed", batch_size=2)
    assert 0 < resumed.hits < 24 and 0 < resumed.tokens < unbroken.tokens and calls
    np.testing.assert_array_equal(both(resumed), both(unbroken))
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_at_once_neither_corrupt_nor_repeat(
    model_folder: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    processes = [start(model_folder, tmp_path / "cache", tmp_path / "journal", 0.05, 8) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len((tmp_path / "journal").read_text().split()) == 8, "every pair was scored by one of them"
    data, references = tokens_of(8, tiny_tokenizer), ReferenceSet((Reference(model_folder),))
    fresh = score_references(data, references, tiny_tokenizer, cache_dir=tmp_path / "alone", batch_size=2)
    assert contents(tmp_path / "cache") == contents(tmp_path / "alone")
    assert {output.split()[-1] for output, _ in outputs} == {fresh.chosen.sum().hex()}
    assert sorted(int(output.split()[-2]) for output, _ in outputs) == [0, 16], "what the other scored meanwhile was found"


def test_a_torn_part_is_set_aside_and_computed_again(
    model_folder: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    data, references = tokens_of(4, tiny_tokenizer), ReferenceSet((Reference(model_folder),))
    whole = score_references(data, references, tiny_tokenizer, cache_dir=tmp_path)
    (part,) = tmp_path.rglob("part-*.parquet")
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    again = score_references(data, references, tiny_tokenizer, cache_dir=tmp_path)
    assert again.hits == 0 and "torn" in caplog.text
    np.testing.assert_array_equal(both(again), both(whole))
    assert part.read_bytes() == content and len(list(tmp_path.rglob("*.torn"))) == 1


def test_a_model_that_gives_nan_is_refused_and_leaves_nothing(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama(tiny_tokenizer)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(ModelError, match="not finite"):
        score_references(tokens_of(2, tiny_tokenizer), ReferenceSet((Reference(model),)), tiny_tokenizer, cache_dir=tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_score_that_is_no_number_is_told_with_its_reference(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data, broken = tokens_of(3, tiny_tokenizer), tiny_llama(tiny_tokenizer)
    members = (Reference(tiny_llama(tiny_tokenizer), name="sound"), Reference(broken, name="broken"))
    for token in (data.pairs[0].chosen_ids[0], slice(None)):  # one that completions alone hold, and those of the probe
        torch.nn.init.constant_(broken.model.embed_tokens.weight[token], math.nan)
        with pytest.raises(ModelError, match="^reference broken: .*(not finite|NaN or infinite); "):
            score_references(data, ReferenceSet(members), tiny_tokenizer)


def test_what_becomes_of_the_chat_template_is_told(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    dated = byte_tokenizer(chat_template=CHATML + "{% if false %}{{ strftime_now('%d') }}{% endif %}")
    said = {"prompt": ("user", "hm?"), "chosen": ("assistant", "yes"), "rejected": ("assistant", "no")}
    turns = {name: [{"role": role, "content": text}] for name, (role, text) in said.items()}
    messages = tokenize_records([parse_record(turns, source="memory", row_number=1)], tiny_tokenizer, max_length=None)

    def told(data: Any, tokenizer: PreTrainedTokenizerFast) -> str:
        references = ReferenceSet((Reference(tiny_llama(tokenizer), tokenizer=tokenizer),))
        (line,) = score_references(data, references, tiny_tokenizer).compatibility
        return line

    assert ", with chat template, " in told(messages, tiny_tokenizer)
    assert ", with chat template (it may write the date), " in told(messages, dated)
    plain = tokens_of(1, tiny_tokenizer)
    assert "chat template unused by plain text (prompt_format chat would" in told(plain, dated)
    assert ", without chat template, " in told(plain, byte_tokenizer(chat_template=None))


def test_a_cache_of_another_process_is_read_where_it_cannot_be_written(
    model_folder: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing to score means nothing to write: no lock is taken."""
    data, references = tokens_of(3, tiny_tokenizer), ReferenceSet((Reference(model_folder),))
    score_references(data, references, tiny_tokenizer, cache_dir=tmp_path)

    def no_writer(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a writer was opened")

    monkeypatch.setattr(LogProbCache, "writer", no_writer)
    assert score_references(data, references, tiny_tokenizer, cache_dir=tmp_path).hit_rate == 1.0
