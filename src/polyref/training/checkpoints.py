"""Which checkpoint an interrupted training goes on from, and policies written whole."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from polyref.errors import ConfigError
from polyref.files import atomic_write


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`. Those a kill left incomplete are removed.

    transformers writes trainer_state.json last, so a checkpoint is complete when that file can be read.
    """
    steps = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))]
    for _, path in sorted(steps, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return path
        except (OSError, ValueError):
            shutil.rmtree(path)
    return None


def check_mergeable(model: Any) -> None:
    """Refuse what merging would get wrong: an adapter on one of two tied embeddings would change the other as well."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tied = getattr(base.config.get_text_config(), "tie_word_embeddings", False)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if tied and any(hasattr(end, "base_layer") for end in ends):
        raise ConfigError(
            "an adapter on tied input and output embeddings cannot be merged", fix="leave merge_adapter off, or spare lm_head"
        )


def save_policy(model: Any, tokenizer: Any, folder: Path, *, merge_adapter: bool = False) -> None:
    """Write policy and tokenizer to `folder`, whole or not at all: adapters as such, or merged into the weights."""
    if merge_adapter and hasattr(model, "merge_and_unload"):
        check_mergeable(model)
        model = model.merge_and_unload()
    with atomic_write(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
