"""Run folders: resume, locks, torn files, full disks, changed configurations."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from enum import StrEnum
from pathlib import Path

import numpy as np
import pytest

from polyref.errors import ConfigError, RunFolderError
from polyref.files import atomic_write, file_digest, files_below, write_bytes
from polyref.stages import RunFolder, content_digest, plain, read_yaml, refuse_other

CONFIG = {"train": {"beta": 0.1, "epochs": 1}, "references": [{"model": "a"}, {"model": "b"}], "seed": 0}


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    """A real process running `program`; it says 'ready' on standard output where the test should act."""
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


def kill_when_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGKILL


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files_below(folder)}


def one_stage(run: RunFolder) -> bool:
    """Do a small stage unless it is done; say whether it had to be done."""
    stage = run.stage("score", {"data": "d1"})
    if stage.done:
        return False
    write_bytes(stage.folder / "out.txt", b"rows")
    stage.finish([stage.folder / "out.txt"], {"pairs": 3})
    return True


def assert_one_line(error: pytest.ExceptionInfo[RunFolderError], *parts: str) -> None:
    line = str(error.value)
    assert "\n" not in line and len(line) < 1300
    assert error.value.exit_code == 2 and error.value.fix
    for part in parts:
        assert part in line


def test_a_done_stage_is_not_done_again(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", CONFIG, seeds={"data": 7}) as run:
        stage = run.stage("score", {"data": "d1"})
        assert not stage.done and not stage.resumed
        write_bytes(stage.folder / "out.txt", b"rows")
        stage.finish([stage.folder / "out.txt"], {"pairs": 3})
        assert stage.done
    before = contents(tmp_path / "run")
    with RunFolder(tmp_path / "run", CONFIG, seeds={"data": 7}) as run:
        again = run.stage("score", {"data": "d1"})
        assert again.done and again.info == {"pairs": 3}
        assert again.outputs == {"stages/score/out.txt": file_digest(tmp_path / "run/stages/score/out.txt")}
    assert contents(tmp_path / "run") == before
    manifest = json.loads(before["manifest.json"])
    assert manifest["seeds"] == {"data": 7} and {"python", "polyref", "torch"} <= manifest["versions"].keys()
    assert read_yaml(tmp_path / "run" / "config.yaml") == CONFIG


def test_changed_inputs_start_the_stage_from_an_empty_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", CONFIG) as run:
        one_stage(run)
        stage = run.stage("score", {"data": "d2"})
        assert not stage.done and not stage.resumed and list(stage.folder.iterdir()) == []


@pytest.mark.parametrize("tear", ["truncate", "flip", "remove"])
def test_a_torn_output_makes_the_stage_run_again(tmp_path: Path, tear: str, caplog: pytest.LogCaptureFixture) -> None:
    with RunFolder(tmp_path / "run", CONFIG) as run:
        one_stage(run)
    whole = contents(tmp_path / "run")
    damage(tmp_path / "run/stages/score/out.txt", tear)
    with RunFolder(tmp_path / "run", CONFIG) as run:
        assert not run.stage("score", {"data": "d1"}).done
        assert "torn" in caplog.text
        one_stage(run)
    assert contents(tmp_path / "run") == whole


def damage(path: Path, tear: str) -> None:
    content = bytearray(path.read_bytes())
    if tear == "remove":
        path.unlink()
        return
    if tear == "truncate":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_folder_of_outputs_may_lie_anywhere_in_the_run_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", CONFIG) as run:
        stage = run.stage("train")
        for text in (b"first", b"second"):
            with atomic_write(run.path / "model") as temporary:
                temporary.mkdir()
                (temporary / "weights").write_bytes(text)
        stage.finish([run.path / "model"])
        assert list(stage.outputs) == ["model/weights"] and (run.path / "model/weights").read_bytes() == b"second"
        assert not [path for path in run.path.iterdir() if path.name.endswith(".tmp")]
        with pytest.raises(RunFolderError, match="must leave its outputs in the run folder"):
            run.stage("other").finish([tmp_path / "elsewhere"])


STAGE_PROGRAM = """
    import sys, time
    from polyref.files import atomic_write
    from polyref.stages import RunFolder

    with RunFolder(sys.argv[1], {"seed": 0}) as run:
        first = run.stage("first")
        if not first.done:
            with atomic_write(first.folder / "a.txt") as temporary:
                temporary.write_text("a")
            first.finish([first.folder / "a.txt"])
        second = run.stage("second", {"first": first.outputs})
        if not second.done:
            done = second.folder / "rows-1.txt"
            if not done.exists():
                with atomic_write(done) as temporary:
                    temporary.write_text("1" * 1000)
            run.append_metrics({"step": 1, "resumed": False})
            with atomic_write(second.folder / "rows-2.txt") as temporary:
                temporary.write_text("2" * 500)
                if sys.argv[2] == "hang":
                    with open(run.metrics_path, "a") as file:
                        file.write('{"step": 2, "lo')
                    print("ready", flush=True)
                    time.sleep(60)
                temporary.write_text("2" * 1000)
            run.keep_metrics(lambda row: row["step"] < 1)
            run.append_metrics({"step": 1, "resumed": False})
            second.finish([done, second.folder / "rows-2.txt"])
"""


def test_a_killed_run_goes_on_and_ends_with_the_bytes_of_an_unbroken_one(tmp_path: Path) -> None:
    kill_when_ready(start(STAGE_PROGRAM, tmp_path / "broken", "hang"))
    manifest = json.loads((tmp_path / "broken/manifest.json").read_text())
    assert manifest["stages"]["first"]["state"] == "done" and manifest["stages"]["second"]["state"] == "started"
    assert not (tmp_path / "broken/stages/second/rows-2.txt").exists()
    for name in ("broken", "unbroken"):
        process = start(STAGE_PROGRAM, tmp_path / name, "go")
        assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")


def test_an_interrupted_stage_keeps_its_folder_without_temporaries(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", CONFIG) as run:
        stage = run.stage("train", {"data": "d1"})
        (stage.folder / "checkpoint").write_text("step 10")
        (stage.folder / ".weights.0123abcd.tmp").write_text("half")
    with RunFolder(tmp_path / "run", CONFIG) as run:
        stage = run.stage("train", {"data": "d1"})
        assert stage.resumed and not stage.done
        assert [path.name for path in stage.folder.iterdir()] == ["checkpoint"]


def test_a_second_process_is_refused_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    holder = start(
        """
        import sys, time
        from polyref.stages import RunFolder
        run = RunFolder(sys.argv[1], {"seed": 0})
        print("ready", flush=True)
        time.sleep(60)
        """,
        tmp_path / "run",
    )
    assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
    with pytest.raises(RunFolderError) as error:
        RunFolder(tmp_path / "run", {"seed": 0})
    assert_one_line(error, "in use by another process")
    holder.kill()
    holder.communicate()
    RunFolder(tmp_path / "run", {"seed": 0}).close()


def test_a_changed_configuration_is_refused_with_the_differing_keys(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", CONFIG).close()
    before = contents(tmp_path / "run")
    changed = {"train": {"beta": 0.2, "epochs": 1, "lora": True}, "references": CONFIG["references"]}
    with pytest.raises(RunFolderError) as error:
        RunFolder(tmp_path / "run", changed)
    assert_one_line(
        error, "train.beta 0.1 -> 0.2", "train.lora (absent) -> true", "seed 0 -> (absent)", "name a new run folder"
    )
    assert "epochs" not in str(error.value) and "references" not in str(error.value)
    assert contents(tmp_path / "run") == before


def test_what_an_open_folder_would_refuse_is_refused_without_opening_it(tmp_path: Path) -> None:
    folder, inputs = tmp_path / "run", {"data": "d1"}
    refuse_other(folder, CONFIG, inputs, "write")
    assert not folder.exists(), "what is not there refuses nothing, and is not made"
    with RunFolder(folder, CONFIG | {"log": 1}, may_change={"log"}) as run:
        stage = run.stage("write", inputs)
        stage.finish([], info={"depends_on": inputs})
    before = contents(folder)
    refuse_other(folder, CONFIG | {"log": 2}, inputs, "write", may_change={"log"})
    with pytest.raises(RunFolderError) as error:
        refuse_other(folder, CONFIG | {"log": 2}, inputs, "write")
    assert_one_line(error, "made with another configuration: log 1 -> 2")
    with pytest.raises(RunFolderError) as error:
        refuse_other(folder, CONFIG | {"log": 1}, {"data": "d2"}, "write")
    assert_one_line(error, "is complete, and what it was made from has changed since: data")
    assert contents(folder) == before
    (folder / "manifest.json").write_bytes(b"{torn")
    refuse_other(folder, CONFIG | {"log": 1}, {"data": "d2"}, "write")
    assert (folder / "manifest.json").read_bytes() == b"{torn", "left as it is"


@pytest.mark.parametrize("name", ["model", "metrics.jsonl", "manifest.json", "stages"])
def test_a_folder_of_somebody_else_is_left_as_it_was(tmp_path: Path, name: str) -> None:
    """As where the folder that one works in is named, and the model to train is ./model."""
    kept = tmp_path / name / "weights" if name in ("model", "stages") else tmp_path / name
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    (tmp_path / "notes.txt").write_text("mine too")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunFolderError, match=rf"holds {name} but no config\.yaml of a run.*; name a new run folder"):
        RunFolder(tmp_path, {"beta": 0.1})
    with pytest.raises(RunFolderError, match=name):
        refuse_other(tmp_path, {"beta": 0.1}, {}, "train")
    assert sorted(tmp_path.rglob("*")) == before and kept.read_text() == "mine"


def test_a_folder_that_holds_none_of_a_runs_names_is_taken(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("as from 2> runs/first/log.txt")
    with RunFolder(tmp_path, {"beta": 0.1}):
        pass
    assert (tmp_path / "config.yaml").exists() and (tmp_path / "log.txt").exists()


def test_settings_that_may_change_do_not_make_another_run(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", CONFIG | {"log": {"steps": 1}}, may_change={"log.steps"}) as run:
        one_stage(run)
    manifest = (tmp_path / "run/manifest.json").read_bytes()
    with RunFolder(tmp_path / "run", CONFIG | {"log": {"steps": 9}}, may_change={"log.steps"}) as run:
        assert run.stage("score", {"data": "d1"}).done
    assert (tmp_path / "run/manifest.json").read_bytes() == manifest


def test_a_number_is_the_same_however_it_is_written(tmp_path: Path) -> None:
    """A printed or kept configuration that is given again holds 0.0 where a default was 0."""
    with RunFolder(tmp_path / "run", {"warmup_steps": 0, "beta": 2.0}):
        pass
    with RunFolder(tmp_path / "run", {"warmup_steps": 0.0, "beta": 2}):
        pass
    with pytest.raises(RunFolderError, match=r"warmup_steps 0 -> 0\.5"):
        RunFolder(tmp_path / "run", {"warmup_steps": 0.5, "beta": 2})


def test_many_differences_are_counted_not_poured_out(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", {f"key{i}": 0 for i in range(30)}).close()
    with pytest.raises(RunFolderError) as error:
        RunFolder(tmp_path / "run", {f"key{i}": 1 for i in range(30)})
    assert_one_line(error, "and 22 more")


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch pwned']",
        "seed: !!python/object/new:os.system [touch pwned]",
        "seed: !!python/name:os.system",
        "seed: [1, 2",
        "- a list",
        "",
        "seed: \x00",
        "[" * 5000,
    ],
)
def test_hostile_or_broken_yaml_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(text)
    with pytest.raises(RunFolderError) as error:
        RunFolder(tmp_path / "run", {"seed": 0})
    assert_one_line(error, "config.yaml")
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "run/manifest.json").exists()


def test_hostile_values_survive_the_round_trip_as_text(tmp_path: Path) -> None:
    config = {"prompt": "!!python/object:os.system\n\x1b[31m- <script>", "é": "ünï", "no": "yes", "n": "1e-3", "f": 1e-06}
    RunFolder(tmp_path / "run", config).close()
    assert read_yaml(tmp_path / "run/config.yaml") == config
    assert b"\x1b" not in (tmp_path / "run/config.yaml").read_bytes()
    RunFolder(tmp_path / "run", config).close()


def test_a_torn_manifest_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RunFolder(tmp_path / "run", CONFIG) as run:
        one_stage(run)
    whole = contents(tmp_path / "run")
    damage(tmp_path / "run/manifest.json", "truncate")
    with RunFolder(tmp_path / "run", CONFIG) as run:
        assert one_stage(run)
    assert "set aside" in caplog.text and (tmp_path / "run/manifest.json.torn").exists()
    assert whole.items() <= contents(tmp_path / "run").items()


def test_another_version_of_a_library_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    RunFolder(tmp_path / "run", CONFIG).close()
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    manifest["versions"]["torch"] = "0.0.1"
    (tmp_path / "run/manifest.json").write_text(json.dumps(manifest))
    RunFolder(tmp_path / "run", CONFIG).close()
    assert "torch 0.0.1" in caplog.text


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    process = start(
        """
        import resource, sys
        from polyref.errors import RunFolderError
        from polyref.stages import RunFolder, atomic_write
        run = RunFolder(sys.argv[1], {"seed": 0})
        stage = run.stage("score")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        run.append_metrics({"step": 1})
        for attempt in ("file", "metrics"):
            try:
                if attempt == "metrics":
                    run.append_metrics({"text": "x" * 5000})
                with atomic_write(stage.folder / "big") as temporary:
                    temporary.write_bytes(b"x" * 5000)
            except RunFolderError as error:
                print(error)
        """,
        tmp_path / "run",
    )
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert len(output.splitlines()) == 2
    for line in output.splitlines():
        assert "cannot be written: " in line and "; free some space, or name a folder on another disk" in line
    assert list((tmp_path / "run/stages/score").iterdir()) == []
    assert (tmp_path / "run/metrics.jsonl").read_text() == '{"step": 1}\n'
    RunFolder(tmp_path / "run", {"seed": 0}).close()


def test_no_space_left_while_writing_the_manifest_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path / "run", CONFIG)
    before = contents(run.path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError) as error:
        run.stage("score")
    assert_one_line(error, "No space left on device; free some space, or name a folder on another disk")
    assert contents(run.path) == before


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path: Path) -> None:
    """As an ordinary user: root may write everywhere, so root becomes nobody first."""
    folder = tmp_path / "sealed"
    folder.mkdir(mode=0o555)
    process = start(
        """
        import os, sys
        from polyref.errors import RunFolderError
        from polyref.stages import RunFolder
        if os.getuid() == 0:
            os.setuid(65534)
        for path in (sys.argv[1], sys.argv[1] + "/new"):
            try:
                RunFolder(path, {"seed": 0})
            except RunFolderError as error:
                print(error)
        """,
        folder,
    )
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert [line.count("Permission denied; name a folder that you may write to") for line in output.splitlines()] == [1, 1]
    assert list(folder.iterdir()) == []


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunFolderError) as error:
            RunFolder(path, CONFIG)
        assert_one_line(error, "file", "cannot be written")


def test_atomic_write_keeps_the_old_content_when_the_body_fails(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a") as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"a": b"old"}


class Colour(StrEnum):
    RED = "red"


def test_plain_values() -> None:
    value = {"path": Path("a/b"), "colour": Colour.RED, "tuple": (1, np.float32(0.5)), "set": {"b", "a"}, 3: None}
    expected = {"path": "a/b", "colour": "red", "tuple": [1, 0.5], "set": ["a", "b"], "3": None}
    assert plain(value) == expected
    assert content_digest(value) == content_digest(dict(reversed(expected.items())))
    assert content_digest({"a": 1}) != content_digest({"a": 1.5})
    with pytest.raises(ConfigError, match="config.a.0: a object cannot be kept"):
        plain({"a": [object()]}, "config")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b"])
def test_a_stage_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with RunFolder(tmp_path / "run", CONFIG) as run, pytest.raises(ConfigError, match="cannot name a stage"):
        run.stage(name)
