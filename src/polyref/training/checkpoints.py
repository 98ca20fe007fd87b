"""Which checkpoint an interrupted training goes on from, and policies written whole."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from polyref.errors import ConfigError
from polyref.files import atomic_write, file_digest, files_below, remove_temporaries, write_bytes

logger = logging.getLogger(__name__)

_SEAL = "checksums.json"


def seal(checkpoint: Path) -> None:
    """Put the checksums of a checkpoint's files beside them, by which `last_checkpoint` knows a torn one."""
    files = [file for file in files_below(checkpoint) if file.name != _SEAL]
    digests = {file.relative_to(checkpoint).as_posix(): file_digest(file) for file in files}
    write_bytes(checkpoint / _SEAL, json.dumps(digests, indent=2).encode())


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`. Those a kill left incomplete are removed, and those with torn files, as is
    what a kill while sealing left in it.

    transformers writes trainer_state.json last, so a checkpoint that was not sealed yet is complete when that can be read.
    """
    steps = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))]
    for _, path in sorted(steps, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
            digests = json.loads((path / _SEAL).read_text()) if (path / _SEAL).exists() else {}
            if all(file_digest(path / name) == digest for name, digest in digests.items()):
                remove_temporaries(path)
                return path
            logger.warning("%s is torn; training goes on from before it", path)
        except (OSError, ValueError):
            logger.info("%s is not complete; training goes on from before it", path)
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
