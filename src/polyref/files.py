"""Durable files: what is written is wholly there or not there at all, and every failure to write is one clear line."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import xxhash

from polyref.errors import PolyrefError, RunFolderError

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)|PytorchStreamWriter failed writing|inline_container.* unexpected pos")
_CHUNK = 1 << 20
_SPACE = "free some space, or name a folder on another disk"
_ACCESS = "name a folder that you may write to"
_FIXES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: _SPACE,
    errno.EACCES: _ACCESS,
    errno.EPERM: _ACCESS,
    errno.EROFS: _ACCESS,
    errno.ENOTDIR: "a part of this path is a file; name another folder",
    errno.EISDIR: "a folder is in the way; move it or name another path",
}


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Turn any OSError of the body into a RunFolderError that names `path`, the reason and the way out, in one line.

    So too where safetensors or torch, which write by their own means, could not write a file whole.
    """
    try:
        yield
    except OSError as error:
        raise _refusal(error, str(path)) from error
    except PolyrefError:
        raise
    except Exception as error:
        if said := _SYSTEM_ERROR.search(str(error)):
            number = int(said[1] or errno.ENOSPC)
            raise _refusal(OSError(number, os.strerror(number)), str(path)) from error
        raise


def unwritable(error: OSError) -> RunFolderError | None:
    """What `write_errors` makes of an error that says a disk is full or may not be written; None for any other."""
    where = str(error.filename) if error.filename else None
    return _refusal(error, where) if error.errno in _FIXES else None


def _refusal(error: OSError, where: str | None) -> RunFolderError:
    reason = error.strerror or str(error) or type(error).__name__
    fix = _FIXES.get(error.errno or 0, "mend this or name another folder")
    return RunFolderError(f"cannot be written: {reason}", where=where, fix=fix)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file or folder that the body makes there becomes `path` when the body ends.

    The bytes are on disk (fsync) before the name changes, so a kill or a power cut leaves the old content or the new one, never
    a mixture. When the body raises, the temporary is removed and `path` stays as it was. A file is replaced in one step; a
    folder in two (the old one aside, the new one in), so a kill between them leaves none.

    Raises:
        RunFolderError: the disk is full, the folder is read-only, or any other OSError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            if temporary.is_dir() and path.exists():
                with _moved_aside(path):
                    temporary.rename(path)
            else:
                os.replace(temporary, path)
            _sync_one(path.parent)
    finally:
        _remove(temporary)


def hold(path: Path, lock: Path, another: str) -> filelock.BaseFileLock:
    """`lock`, taken for `path` until it is released, by whichever thread; its folder is made when absent.

    RunFolderError where another process has it: wait, or name `another`.
    """
    with write_errors(path):
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(lock, thread_local=False)
        try:
            held.acquire(timeout=0)
        except filelock.Timeout as error:
            fix = f"wait for it to end or name {another}"
            raise RunFolderError("is in use by another process", where=str(path), fix=fix) from error
    return held


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` atomically and durably."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def sync(path: Path) -> None:
    """Force a file, or a folder and all below it, to disk."""
    for below in files_below(path):
        _sync_one(below)
    if path.is_dir():
        for folder in {path, *(below.parent for below in files_below(path))}:
            _sync_one(folder)


def files_below(path: Path) -> list[Path]:
    """`path` itself when it is a file, else every file below it, sorted."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def file_digest(path: str | Path) -> str:
    """The xxh3 128-bit checksum of a file's bytes, in hexadecimal. Detects torn files; it is no defence against forgery."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


def remove_temporaries(folder: Path) -> None:
    """Remove what killed `atomic_write` calls left in `folder`. Call it only while holding the lock of that folder."""
    for leftover in list(folder.iterdir()) if folder.is_dir() else []:
        if _TEMPORARY.fullmatch(leftover.name):
            _remove(leftover)


@contextmanager
def _moved_aside(path: Path) -> Iterator[None]:
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    path.rename(aside)
    try:
        yield
    except BaseException:
        aside.rename(path)
        raise
    _remove(aside)


def _sync_one(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder, nor flush a file opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # nothing was written, or nothing can be done about it; the first error is the one to tell
            path.unlink()
