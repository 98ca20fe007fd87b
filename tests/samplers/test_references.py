"""References as engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fakes import counted_calls, saved_llama, saved_lora, tiny_llama
from polyref.errors import DataError, ReferenceSetError
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.samplers.engine import SamplingParameters
from polyref.samplers.references import refuse_long, sampling_policy, without_room
from polyref.types import PreferenceRecord

CHAT = ({"role": "user", "content": "hello"},)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    return saved_llama(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer)


def texts(engine: Any, prompt: Any = CHAT) -> list[str]:
    return [completion.text for completion in engine([prompt], 3, SamplingParameters(12), seed=0)[0]]


def test_members_share_weights_and_differ_by_system_prompt_and_adapter(
    folder: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    adapter = saved_lora(tmp_path / "lora", tiny_tokenizer, seed=1)
    members = (
        Reference(str(folder)),
        Reference(str(folder), system_prompt="be brief"),
        Reference(str(folder), adapter=str(adapter)),
        Reference("./absent"),
    )
    policy = sampling_policy(ReferenceSet(members, (0.5, 0.25, 0.25, 0.0), "arithmetic"), per_pair=True, batch_size=2)
    plain, brief, adapted = policy.engines
    assert policy.weights == [0.5, 0.25, 0.25] and policy.per_pair
    assert plain.model is brief.model and adapted.model is not plain.model  # type: ignore[attr-defined]
    alone = sampling_policy(ReferenceSet((members[0],))).engines[0]
    assert texts(plain) == texts(alone), "an adapter on other weights changes nothing"
    assert texts(plain) != texts(brief) and texts(plain) != texts(adapted)


def test_a_model_in_memory_draws_with_the_tokenizer_it_is_given(folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    reference = Reference(tiny_llama(tiny_tokenizer), tokenizer=tiny_tokenizer)
    with counted_calls(LlamaForCausalLM) as calls:
        drawn = texts(sampling_policy(ReferenceSet((reference,))).engines[0])
    assert calls and drawn == texts(sampling_policy(ReferenceSet((Reference(str(folder)),))).engines[0])
    with pytest.raises(ReferenceSetError, match="no tokenizer of its own"):
        sampling_policy(ReferenceSet((Reference(tiny_llama(tiny_tokenizer)),)))


def test_a_model_in_memory_is_not_drawn_without_the_adapter_it_was_to_have(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    adapter = saved_lora(tmp_path / "lora", tiny_tokenizer, seed=1)
    reference = Reference(tiny_llama(tiny_tokenizer), tokenizer=tiny_tokenizer, adapter=str(adapter))
    with pytest.raises(ReferenceSetError, match="in memory is not given an adapter here"):
        sampling_policy(ReferenceSet((reference,)))


def test_a_geometric_composition_has_no_member_to_draw_from(folder: Path) -> None:
    two = (Reference(str(folder)), Reference(str(folder), system_prompt="be brief"))
    with pytest.raises(ReferenceSetError, match="geometric composition is no mixture"):
        sampling_policy(ReferenceSet(two))
    assert len(sampling_policy(ReferenceSet(two, (1.0, 0.0))).engines) == 1


def test_prompts_without_room_are_found_and_the_first_is_named(folder: Path) -> None:
    records = [PreferenceRecord("x" * length, "a", "b", source="file", row=length) for length in (10, 215, 216, 240)]
    references = ReferenceSet((Reference(str(folder)),))
    assert without_room(records, references, 40) == [2, 3]
    assert without_room(records, ReferenceSet((Reference(str(folder), system_prompt="brief"),)), 40) == [1, 2, 3]
    refuse_long(records, [], 40)
    with pytest.raises(DataError, match="file, row 216: 2 prompts leave no room for 40 new tokens"):
        refuse_long(records, [2, 3], 40)
