"""The moving average of weights: of tied ones once, and of small changes in a coarse dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fakes import byte_tokenizer, tiny_llama
from polyref.loops.anchors import Anchor, anchor_of, reference_of
from polyref.loops.policies import Policy
from polyref.references.reference_set import ReferenceSet
from polyref.scoring.models import ModelSource
from polyref.stages import RunFolder


def saved(folder: Path, value: float, dtype: str = "float32") -> Policy:
    """A policy whose weights are all `value`; output and input embedding are the same tensor."""
    tokenizer = byte_tokenizer()
    model: Any = tiny_llama(tokenizer, tie_word_embeddings=True).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Policy(ModelSource(str(folder), dtype=dtype))


def average(folder: RunFolder, policies: list[Policy], decay: float) -> tuple[ReferenceSet, dict[str, torch.Tensor]]:
    start = ReferenceSet((reference_of(policies[0], "start"),))
    anchor, outputs = anchor_of(folder, Anchor("average", decay), policies, start, {})
    file = next(name for name in outputs if name.endswith(".safetensors"))
    return anchor, load_file(folder.path / file)


def test_every_weight_is_averaged_once_a_round_tied_or_not(tmp_path: Path) -> None:
    policies = [saved(tmp_path / str(value), value) for value in (0.0, 1.0, 2.0)]
    with RunFolder(tmp_path / "run", {}) as folder:
        _, first = average(folder, policies[:2], 0.75)
        _, second = average(folder, policies, 0.75)
    assert "model.embed_tokens.weight" in first
    assert all(tensor.unique().tolist() == [0.25] for tensor in first.values())
    assert all(tensor.unique().tolist() == [0.75 * 0.25 + 0.25 * 2] for tensor in second.values())


def test_changes_too_small_for_the_policys_dtype_add_up(tmp_path: Path) -> None:
    start, moved = (saved(tmp_path / str(value), value, "bfloat16") for value in (1.0, 1.0078125))  # neighbours in bfloat16
    with RunFolder(tmp_path / "run", {}) as folder:
        for rounds in (1, 2, 3):
            anchor, weights = average(folder, [start, *[moved] * rounds], 0.5)
    assert weights["model.norm.weight"].unique().tolist() == pytest.approx([1 + 0.0078125 * 0.875])
    assert anchor.members[0].dtype == "bfloat16", "it is read in the policy's own dtype"
