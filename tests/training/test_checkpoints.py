"""Which checkpoint a run goes on from, and that a policy is written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fakes import tiny_llama
from polyref.errors import RunFolderError
from polyref.training.checkpoints import last_checkpoint, save_policy, seal


def checkpoint(folder: Path, step: int, state: str | None = "{}") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"...")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_the_newest_complete_checkpoint_is_taken(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "absent") is None
    checkpoint(tmp_path, 2)
    newest = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 9)
    assert last_checkpoint(tmp_path) == newest, "by number, not by name or age"


@pytest.mark.parametrize("state", [None, "", '{"global_step": 1'], ids=["absent", "empty", "cut"])
def test_a_checkpoint_that_a_kill_left_incomplete_is_removed(tmp_path: Path, state: str | None) -> None:
    whole, torn = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8, state)
    assert last_checkpoint(tmp_path) == whole
    assert not torn.exists()
    for path in whole.iterdir():
        path.unlink()
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("tear", [b"..", b"..,", None], ids=["truncated", "flipped", "removed"])
def test_a_torn_file_of_a_sealed_checkpoint_is_found(
    tmp_path: Path, tear: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    whole, torn = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8)
    for path in (whole, torn, torn):
        seal(path)
    assert last_checkpoint(tmp_path) == torn and not caplog.text
    if tear is None:
        (torn / "model.safetensors").unlink()
    else:
        (torn / "model.safetensors").write_bytes(tear)
    assert last_checkpoint(tmp_path) == whole and not torn.exists()
    (whole / "checksums.json").write_text("{")
    assert last_checkpoint(tmp_path) is None


def test_what_a_kill_while_sealing_left_is_removed(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path, 4)
    (whole / ".checksums.json.0123abcd.tmp").write_text('{"model.')
    assert last_checkpoint(tmp_path) == whole
    assert sorted(path.name for path in whole.iterdir()) == ["model.safetensors", "trainer_state.json"]


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-3.bak", "checkpoints"):
        (tmp_path / name).mkdir()
    assert last_checkpoint(tmp_path) is None
    assert len(list(tmp_path.iterdir())) == 4


def test_a_policy_is_written_whole_or_not_at_all(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, ids = tiny_llama(tiny_tokenizer), torch.tensor([[1, 50, 60]])
    save_policy(model, tiny_tokenizer, tmp_path / "model")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "model")(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == tiny_tokenizer.chat_template
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    class Broken:
        def save_pretrained(self, folder: Path, **kwargs: Any) -> None:
            model.save_pretrained(folder)
            raise OSError(28, "No space left on device")

    with pytest.raises(RunFolderError, match="No space left"):
        save_policy(Broken(), tiny_tokenizer, tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
