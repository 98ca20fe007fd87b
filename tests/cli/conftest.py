"""Fixtures of the command line's tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from cli_world import World
from fakes import saved_llama


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The folder of a Llama of a few thousand weights, with a byte-level tokenizer and a chat template."""
    return saved_llama(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer)


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> World:
    """A fresh folder; the cache is beside it, and no hub is asked for anything."""
    transformers_logging.disable_progress_bar()
    path, cache = tmp_path / "work", tmp_path / "cache"
    path.mkdir()
    monkeypatch.setenv("POLYREF_CACHE", str(cache))
    for constant in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(constant, True)
    offline = {"POLYREF_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return World(path, tiny_model, capsys, os.environ | offline)
