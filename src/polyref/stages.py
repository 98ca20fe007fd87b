"""Run folders: a killed run, started again with the same command, goes on and ends with the same bytes as an unbroken one.

    with RunFolder("runs/first", config) as run:
        stage = run.stage("score", inputs={"data": file_digest(data), "model": model_hash})
        if not stage.done:
            ...                                   # write below stage.folder; an interrupted attempt's files are still there
            stage.finish([stage.folder / "scores.parquet"], info={"pairs": 600})

A run folder holds `config.yaml` (the resolved configuration), `manifest.json` (versions, seeds, the state of every stage),
`stages/NAME/` and `metrics.jsonl`. The manifest entry of a stage is the last thing written, and holds no time of day.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from enum import Enum
from importlib import metadata
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import xxhash
import yaml  # type: ignore[import-untyped]

from polyref.errors import ConfigError, InputError, RunFolderError, one_line
from polyref.files import atomic_write, file_digest, files_below, hold, remove_temporaries, sync, write_bytes, write_errors

__all__ = ["RunFolder", "Stage", "atomic_write", "content_digest", "file_digest", "plain", "read_yaml", "refuse_other"]

logger = logging.getLogger(__name__)

_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PACKAGES = ("polyref", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "numpy")
_SHOWN = 8
_TAKEN = ("manifest.json", "metrics.jsonl", "model", "report.html", "stages", "summary.json")
_ABSENT = "(absent)"


def plain(value: Any, key: str = "value") -> Any:
    """`value` as the dicts, lists, text, numbers, booleans and None that YAML and JSON share; ConfigError names the odd key."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Enum):
        return plain(value.value, key)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, PathLike):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name), f"{key}.{field.name}") for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{key}.{index}") for index, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return sorted((plain(item, key) for item in value), key=str)
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
        return plain(value.item(), key)
    fix = "give text, a number, a list or a mapping"
    raise ConfigError(f"a {type(value).__name__} cannot be kept in a file", where=key, fix=fix)


def content_digest(value: Any) -> str:
    """xxh3 128-bit checksum, in hexadecimal, of a plain value; the order of mapping keys does not matter."""
    return xxhash.xxh3_128_hexdigest(json.dumps(plain(value), sort_keys=True).encode())


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Only plain values: a tag that would build a Python object is refused.

    Raises:
        RunFolderError: the file cannot be read, is not YAML, asks for Python objects, or is not a mapping.
    """
    fix = "restore the file or name a new run folder"
    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise RunFolderError(f"is not plain YAML: {getattr(error, 'problem', error)}", where=where, fix=fix) from error
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise RunFolderError(f"cannot be read: {error}", where=str(path), fix=fix) from error
    if not isinstance(value, dict):
        raise RunFolderError("does not hold a mapping of settings", where=str(path), fix=fix)
    return value


class RunFolder:
    """An open run folder, held against every other process until `close` (or the end of the `with` block, or the process).

    Args:
        path: the folder; made when absent.
        config: the resolved configuration; nested mappings of plain values, paths, enums and dataclasses.
        seeds: the seeds of the run by name, for the manifest.
        may_change: dotted keys whose change does not make it another run, such as logging settings.

    Raises:
        RunFolderError: another process holds it, it cannot be written, it holds files that a run would replace and no run
            made, or it was made with another configuration (the line lists the differing keys with old and new values).
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        seeds: Mapping[str, int] | None = None,
        may_change: Collection[str] = (),
    ) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = plain(dict(config), "config")
        _refuse_strangers(self.path)
        self._made = not os.path.exists(self.path)
        self._lock = hold(self.path, self.path / ".lock", "another run folder")
        self._fresh = not (self.path / "config.yaml").exists()
        try:
            with write_errors(self.path):
                remove_temporaries(self.path)
                self._check_config(may_change)
                self._open_manifest(seeds or {}, may_change)
                _drop_torn_line(self.metrics_path)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Let the folder go. A new run that is refused before it made anything leaves no trace: mend it, and start again."""
        if isinstance(error, InputError) and self._fresh:
            with suppress(OSError):
                self._take_back()
        self.close()

    def _take_back(self) -> None:
        stages = self.path / "stages"
        if self.metrics_path.exists() or (stages.is_dir() and files_below(stages)):
            return
        shutil.rmtree(stages, ignore_errors=True)
        for name in ("manifest.json", "config.yaml", ".lock"):
            (self.path / name).unlink(missing_ok=True)
        if self._made:
            self.path.rmdir()

    def close(self) -> None:
        """Let the folder go. Safe to call twice."""
        self._lock.release()

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def stage(self, name: str, inputs: Mapping[str, Any] | None = None) -> Stage:
        """Stage `name`; it is `done` when it ended earlier with equal `inputs` and all its outputs still match their checksums.

        Pass whatever the stage depends on beyond the configuration, such as checksums of data and the `outputs` of earlier
        stages. A stage that was interrupted keeps its folder, so that it can go on; one whose inputs changed or whose outputs
        are torn starts from an empty folder.
        """
        if not _STAGE_NAME.fullmatch(name):
            raise ConfigError(f"{name!r} cannot name a stage", fix="use letters, digits, '.', '_' and '-'")
        digest, folder = content_digest(inputs or {}), self.path / "stages" / name
        entry = self._manifest["stages"].get(name)
        same = entry is not None and entry["inputs"] == digest
        if same and entry["state"] == "done" and self._intact(name, entry["outputs"]):
            return Stage(self, name, folder, digest, done=True, outputs=dict(entry["outputs"]), info=dict(entry["info"]))
        resumed = same and entry["state"] == "started" and folder.is_dir()
        with write_errors(folder):
            if resumed:
                remove_temporaries(folder)
                logger.info("stage %s goes on from where it was interrupted", name)
            else:
                if entry is not None and not same:
                    logger.info("stage %s is done again: its inputs changed", name)
                if folder.exists():
                    shutil.rmtree(folder)
                self._record(name, {"state": "started", "inputs": digest})
            folder.mkdir(parents=True, exist_ok=True)
        return Stage(self, name, folder, digest, resumed=resumed)

    def refuse_changed(self, inputs: Mapping[str, str], last: str) -> None:
        """RunFolderError, naming what changed, where stage `last` is done and its info says that it depends on other inputs.

        A complete run stays what it is: its last stage ends with `info={"depends_on": inputs}`.
        """
        _refuse_inputs(self.path, self._manifest["stages"].get(last, {}), inputs)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; a line that cannot be written whole is taken back."""
        line = (json.dumps(plain(row, "metrics")) + "\n").encode()
        with write_errors(self.metrics_path), open(self.metrics_path, "ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, "No space left on device")
            except OSError:
                file.truncate(end)
                raise

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, oldest first; an empty list when there is none."""
        if not self.metrics_path.exists():
            return []
        return [json.loads(line) for line in self.metrics_path.read_text(encoding="utf-8").splitlines()]

    def keep_metrics(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the rows that `keep` turns down: those past the checkpoint from which an interrupted stage goes on."""
        rows = self.read_metrics()
        kept = [row for row in rows if keep(row)]
        if len(kept) < len(rows):
            self.write_metrics(kept)

    def write_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write `rows` in place of all that there are, in one write."""
        write_bytes(self.metrics_path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def _check_config(self, may_change: Collection[str]) -> None:
        _refuse_config(self.path, self.config, may_change)
        text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True, width=120)
        _write_if_changed(self.path / "config.yaml", text.encode())

    def _open_manifest(self, seeds: Mapping[str, int], may_change: Collection[str]) -> None:
        path = self.path / "manifest.json"
        settled = {key: value for key, value in _flatten(self.config).items() if key not in may_change}
        old = _read_manifest(path)
        self._manifest: dict[str, Any] = {
            "format": 1,
            "config": content_digest(settled),
            "seeds": plain(dict(seeds), "seeds"),
            "versions": _versions(),
            "stages": old.get("stages", {}),
        }
        for name, version in old.get("versions", {}).items():
            if self._manifest["versions"].get(name) != version:
                logger.warning("%s was begun with %s %s; bytes may differ from an unbroken run", self.path, name, version)
        self._write_manifest()

    def _record(self, name: str, entry: dict[str, Any]) -> None:
        self._manifest["stages"][name] = entry
        self._write_manifest()

    def _write_manifest(self) -> None:
        _write_if_changed(self.path / "manifest.json", (json.dumps(self._manifest, indent=2, sort_keys=True) + "\n").encode())

    def _intact(self, name: str, outputs: Mapping[str, str]) -> bool:
        for relative, digest in outputs.items():
            path = self.path / relative
            if not path.is_file() or file_digest(path) != digest:
                logger.warning("stage %s is done again: its output %s is torn or missing", name, one_line(path))
                return False
        return True


@dataclasses.dataclass
class Stage:
    """One step of a run. `outputs` maps paths below the run folder to checksums: pass it on as an input of later stages.

    `resumed` says that `folder` holds what an interrupted attempt with the same inputs left there.
    """

    run: RunFolder
    name: str
    folder: Path
    inputs: str
    done: bool = False
    resumed: bool = False
    outputs: dict[str, str] = dataclasses.field(default_factory=dict)
    info: dict[str, Any] = dataclasses.field(default_factory=dict)

    def finish(self, outputs: Iterable[str | Path], info: Mapping[str, Any] | None = None) -> None:
        """Force `outputs` (files, or folders with all below them) to disk, take their checksums, and record the stage as done.

        Raises:
            RunFolderError: an output is missing or lies outside the run folder, or the manifest cannot be written.
        """
        root, digests = self.run.path.resolve(), {}
        with write_errors(self.folder):
            for output in map(Path, outputs):
                if not output.exists() or not output.resolve().is_relative_to(root):
                    raise RunFolderError(f"stage {self.name} must leave its outputs in the run folder", where=str(output))
                sync(output)
                for path in files_below(output.resolve()):
                    digests[path.relative_to(root).as_posix()] = file_digest(path)
        self.outputs, self.info = digests, plain(dict(info or {}), "info")
        self.run._record(self.name, {"state": "done", "inputs": self.inputs, "outputs": self.outputs, "info": self.info})
        self.done = True


def refuse_other(
    path: str | Path,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    last: str,
    *,
    may_change: Collection[str] = (),
) -> None:
    """Refuse what a `RunFolder` of `path` and its `refuse_changed` would, where there is one, but open and write nothing."""
    folder = Path(path)
    _refuse_strangers(folder)
    _refuse_config(folder, plain(dict(config), "config"), may_change)
    entry: dict[str, Any] = {}
    with suppress(OSError, ValueError, KeyError, TypeError):  # with no manifest, or a torn one, every stage is done again
        entry = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["stages"][last]
    _refuse_inputs(folder, entry, inputs)


def _refuse_strangers(folder: Path) -> None:
    """RunFolderError where no run was begun in `folder`, and files of somebody else bear the names that a run's have."""
    found = [name for name in _TAKEN if os.path.exists(folder / name)]
    if found and not os.path.exists(folder / "config.yaml"):
        what = f"holds {', '.join(found)} but no config.yaml of a run; a run would replace what is there"
        raise RunFolderError(what, where=str(folder), fix="name a new run folder")


def _refuse_config(folder: Path, config: dict[str, Any], may_change: Collection[str]) -> None:
    """RunFolderError, naming what differs, where `folder` was made with another configuration."""
    path = folder / "config.yaml"
    if not path.exists():
        return
    old, new = _flatten(read_yaml(path)), _flatten(config)
    pairs = {key: (old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in sorted(old | new) if key not in may_change}
    changes = [f"{key} {before} -> {after}" for key, (before, after) in pairs.items() if before != after]
    if changes:
        more = [f"and {len(changes) - _SHOWN} more"] if len(changes) > _SHOWN else []
        raise RunFolderError(
            f"was made with another configuration: {', '.join(changes[:_SHOWN] + more)}",
            where=str(folder),
            fix="go back to the old settings or name a new run folder",
        )


def _refuse_inputs(folder: Path, entry: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """RunFolderError, naming what changed, where the stage of `entry` is done and depends on other inputs."""
    old = entry.get("info", {}).get("depends_on", {})
    changed = [name for name in sorted(old | dict(inputs)) if old.get(name) != inputs.get(name)]
    if entry.get("state") == "done" and changed:
        raise RunFolderError(
            f"is complete, and what it was made from has changed since: {', '.join(changed)}",
            where=str(folder),
            fix="name a new run folder",
        )


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys of a nested mapping, with each leaf as short JSON text; 2 and 2.0, which YAML and flags mix up, are one."""
    if isinstance(value, dict) and value:
        items = ((f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items())
        return {name: text for key, item in items for name, text in _flatten(item, key).items()}
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return {prefix: json.dumps(int(value) if whole else value, sort_keys=True, ensure_ascii=False, default=str)}


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != 1:
            raise RunFolderError("was written by another version of polyref", where=str(path), fix="name a new run folder")
        return dict(manifest)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        aside = path.with_name(path.name + ".torn")
        logger.warning("%s is torn (%s); set aside as %s, and every stage is done again", path, one_line(error), aside.name)
        path.replace(aside)
        return {}


def _write_if_changed(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        write_bytes(path, content)


def _drop_torn_line(path: Path) -> None:
    """Cut what a kill in the middle of a line left after the last newline."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
