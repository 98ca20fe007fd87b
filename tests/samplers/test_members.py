"""Members of a reference set in memory: shared weights, caches in step, scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from enumerable_lm import enumerable, token_logps
from fakes import byte_tokenizer, counted_calls, saved_llama, saved_lora, tiny_llama
from polyref.errors import ModelError, ReferenceSetError
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.samplers.members import load_members
from polyref.samplers.members_lockstep import LockStep
from polyref.samplers.members_scores import member_logps
from polyref.scoring.models import ModelSource, adapted, load_causal_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    return saved_llama(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer)


@torch.no_grad()
def plain_logp(model: Any, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> float:
    logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return float(logits.gather(-1, torch.tensor(tokens)[:, None]).sum())


def test_prompts_and_adapters_share_one_set_of_weights(folder, tmp_path, tiny_tokenizer):
    adapters = [saved_lora(tmp_path / str(seed), tiny_tokenizer, seed=seed) for seed in (1, 2)]
    references = ReferenceSet(
        (
            Reference(str(folder)),
            Reference(str(folder), adapter=adapters[0]),
            Reference(str(folder), system_prompt="be brief"),
            Reference(str(folder), adapter=adapters[1]),
            Reference("./absent"),
        ),
        (0.25, 0.25, 0.25, 0.25, 0.0),
    )
    members = load_members(references)
    plain, first, brief, second, absent = members.members
    assert absent is None and members.one_tokenizer
    assert plain.model is first.model is brief.model is second.model
    prompt, tokens = tuple(plain.encoder.encode_prompt("hello")), (40, 70, 41, 2)
    model = load_causal_lm(ModelSource(str(folder)))
    expected = [plain_logp(model, prompt, tokens)]
    for adapter in adapters:
        with adapted(model, str(adapter)) as wrapped:
            expected.append(plain_logp(wrapped, prompt, tokens))
    with members.drawing():
        for member, value in ((plain, 0), (first, 1), (second, 2), (plain, 0), (brief, 0)):
            assert member_logps(member, [(prompt, tokens)], 4)[0] == pytest.approx(expected[value], abs=1e-4)
        law = LockStep([plain, first, second, plain], [[prompt] * 4]).law
        for place, member in enumerate((plain, first, second, plain)):
            assert float(law[0, :, place].exp().sum()) == pytest.approx(1)
            assert float(law[0, 40, place]) == pytest.approx(member_logps(member, [(prompt, (40,))], 1)[0], abs=1e-4)
    assert len(set(expected)) == 3


def test_an_adapter_that_overwrites_weights_gets_its_own(folder, tmp_path, tiny_tokenizer):
    from peft import get_peft_model

    from fakes import tiny_lora

    wrapped = get_peft_model(tiny_llama(tiny_tokenizer), tiny_lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        wrapped.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    wrapped.save_pretrained(tmp_path / "head")
    members = load_members(ReferenceSet((Reference(str(folder)), Reference(str(folder), adapter=tmp_path / "head"))))
    plain, own = members.members
    assert plain.model is not own.model
    prompt = plain.encoder.encode_prompt("hello")
    with members.drawing():
        logps = [member_logps(member, [(prompt, (40, 2))], 1)[0] for member in (plain, own)]
    assert logps == pytest.approx(
        [plain_logp(tiny_llama(tiny_tokenizer), prompt, (40, 2)), plain_logp(wrapped, prompt, (40, 2))]
    )


def test_caches_in_step_are_what_reading_alone_gives_however_rows_are_picked(tiny_tokenizer):
    members = enumerable(tiny_tokenizer, 1, 2, 1)
    group, prompts = [m for m in members.members if m is not None], ["ab", "what is this"]
    with members.drawing(), counted_calls(LlamaForCausalLM) as calls:
        ids = [[member.prompt_ids(prompt, 4, 1) for member in group] for prompt in prompts]
        steps = LockStep(group, ids).pick([1, 0, 0])
        assert len(calls) == 2, "one pass for the members of equal weights"
        steps.step(torch.tensor([40, 41, 40]))
        steps = steps.pick([2, 0, 0, 1])
        steps.step(torch.tensor([41, 40, 2, 41]))
        law = steps.law
    for row, (prompt, tokens) in enumerate([("ab", (40, 41)), (prompts[1], (40, 40)), (prompts[1], (40, 2)), ("ab", (41, 41))]):
        torch.testing.assert_close(law[row], token_logps(members, prompt, [*tokens, 2])[-1])


def test_a_padded_vocabulary_composes_over_what_all_members_have(tiny_tokenizer):
    size = len(tiny_tokenizer)
    models = (tiny_llama(tiny_tokenizer, vocab_size=size + 4), tiny_llama(tiny_tokenizer))
    members = load_members(ReferenceSet(tuple(Reference(model, tokenizer=tiny_tokenizer) for model in models)))
    with members.drawing():
        law = LockStep([m for m in members.members if m is not None], [[(1, 40), (1, 40)]]).law
    assert law.shape == (1, size, 2)
    padded, whole = law.exp().sum(1)[0].tolist()
    assert padded < 0.999 and whole == pytest.approx(1), "what is beyond the common part is mass that composing loses"


def test_scores_are_what_reading_alone_gives_in_any_batch(tiny_tokenizer):
    member = load_members(ReferenceSet((Reference(tiny_llama(tiny_tokenizer).double(), tokenizer=tiny_tokenizer),))).members[0]
    assert member is not None
    prompts = [member.encoder.encode_prompt(text) for text in ("a", "a longer prompt")]
    items = [(prompts[i % 2], tuple(range(30, 31 + i))) for i in range(6)] + [(prompts[0], (40, 999, 41))]
    with torch.no_grad():
        expected = [plain_logp(member.model, *item) for item in items[:-1]]
        for size in (1, 2, 7):
            assert member_logps(member, items, size) == pytest.approx([*expected, -torch.inf], abs=1e-9)
    assert member_logps(member, [], 3) == []


def test_drawing_leaves_models_as_they_were(tiny_tokenizer):
    model = tiny_llama(tiny_tokenizer).train()
    members = load_members(ReferenceSet((Reference(model, tokenizer=tiny_tokenizer),)))
    with members.drawing():
        assert not model.training
    assert model.training


def test_tokenizers_are_told_apart_by_what_they_encode(tiny_tokenizer):
    model = tiny_llama(tiny_tokenizer)
    for other, one in ((byte_tokenizer(), True), (byte_tokenizer([("a", "b")]), False)):
        references = tuple(Reference(model, tokenizer=tokenizer) for tokenizer in (tiny_tokenizer, other))
        assert load_members(ReferenceSet(references)).one_tokenizer == one


def test_what_cannot_be_a_member_is_refused_in_one_line(tiny_tokenizer, tmp_path):
    model = tiny_llama(tiny_tokenizer)
    with pytest.raises(ReferenceSetError, match="no tokenizer of its own"):
        load_members(ReferenceSet((Reference(model),)))
    with pytest.raises(ReferenceSetError, match="in memory is not given an adapter"):
        load_members(ReferenceSet((Reference(model, tokenizer=tiny_tokenizer, adapter=tmp_path),)))
    broken = tiny_llama(tiny_tokenizer)
    with torch.no_grad():
        broken.lm_head.weight[:] = torch.nan
    (member,) = load_members(ReferenceSet((Reference(broken, tokenizer=tiny_tokenizer),))).members
    assert member is not None
    for tokens in ((40,), (40, 41)):
        with torch.no_grad(), pytest.raises(ModelError, match="not numbers"):
            member_logps(member, [((1, 40), tokens)], 1)
