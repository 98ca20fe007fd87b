"""Fixtures that tests of several rooms share."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import settings
from transformers import PreTrainedTokenizerFast

from fakes import byte_tokenizer

settings.register_profile("polyref", deadline=None, max_examples=60)
settings.load_profile("polyref")
# begun in a shell's background, tests and their processes would ignore it
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository; tests that need it are skipped where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is not here: {folder.name} is looked for in shared/ beside the repository")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, 260 tokens, with <pad>, <bos>, <eos> and a ChatML-like template."""
    return byte_tokenizer()


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy of the environment stands between a test and 127.0.0.1."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
