"""The log-probability cache: what a row is addressed by, kills, two processes at once, torn parts, full disks."""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyref.errors import ModelError, RunFolderError
from polyref.scoring.cache import CachedScore, LogProbCache, ScorerKey, row_key

SCORER = ScorerKey(weights="abc", tokenizer="t")
IDS = st.lists(st.integers(0, 200_000), max_size=6)

SCORE_PROGRAM = """
    import logging, os, sys, time
    from pathlib import Path
    from polyref.scoring.cache import LogProbCache, ScorerKey, row_key

    folder, journal, seconds, rows = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
    logging.basicConfig(level="INFO")
    keys = [row_key((i,), (i, 2)) for i in range(rows)]
    log = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with LogProbCache(folder).writer(ScorerKey(weights="abc", tokenizer="t"), flush_rows=5, flush_seconds=60) as writer:
        known = writer.known(keys)
        print("ready", flush=True)
        for i, key in enumerate(keys):
            if key not in known:
                time.sleep(seconds)
                os.write(log, f"{i}\\n".encode())
                writer.add([key], [-0.5 * i], [2])
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> int:
    """Wait for a process to end; its exit status."""
    process.communicate(timeout=240)
    return process.returncode


def keys_of(count: int) -> list[bytes]:
    return [row_key((i,), (i, 2)) for i in range(count)]


def expected(count: int) -> dict[bytes, CachedScore]:
    return {key: CachedScore(-0.5 * i, 2) for i, key in enumerate(keys_of(count))}


def fill(folder: Path, count: int, per_part: int = 1000, scorer: ScorerKey = SCORER) -> None:
    """Write `count` rows; parts of `per_part` rows each are left uncompacted, as a kill would leave them."""
    rows = expected(count)
    for begin in range(0, count, per_part):
        keys = list(rows)[begin : begin + per_part]
        with pytest.raises(KeyboardInterrupt), LogProbCache(folder).writer(scorer) as writer:
            writer.add(keys, [rows[key].logp for key in keys], [2] * len(keys))
            raise KeyboardInterrupt


def parts(folder: Path, suffix: str = "") -> list[Path]:
    return sorted(folder.rglob(f"part-*.parquet{suffix}"))


def test_what_is_added_is_found_by_another_process(tmp_path: Path) -> None:
    with LogProbCache(tmp_path).writer(SCORER) as writer:
        assert writer.known(keys_of(3)) == {}
        writer.add(keys_of(3), [0.0, -0.5, -1.0], [2, 2, 2])
        assert writer.known(keys_of(9)) == expected(3)
    assert LogProbCache(tmp_path).lookup(SCORER, keys_of(9)) == expected(3)
    assert LogProbCache(tmp_path).lookup(SCORER, []) == {}
    assert LogProbCache(tmp_path / "absent").lookup(SCORER, keys_of(1)) == {}


def test_values_come_back_to_the_last_bit(tmp_path: Path) -> None:
    values = [-1 / 3, -1e-300, -1e300, float("-inf"), -0.0]
    with LogProbCache(tmp_path).writer(SCORER) as writer:
        writer.add(keys_of(5), values, [1, 2, 3, 2**31 - 1, 0])
    found = LogProbCache(tmp_path).lookup(SCORER, keys_of(5))
    assert [found[key].logp.hex() for key in keys_of(5)] == [value.hex() for value in values]
    assert [found[key].tokens for key in keys_of(5)] == [1, 2, 3, 2**31 - 1, 0]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ScorerKey)])
def test_every_part_of_a_scorer_separates_caches(tmp_path: Path, field: str) -> None:
    fill(tmp_path, 2)
    other = dataclasses.replace(SCORER, **{field: "something else"})
    assert other.digest != SCORER.digest
    assert LogProbCache(tmp_path).lookup(other, keys_of(2)) == {}


def test_the_layout_on_disk_is_pinned() -> None:
    """A change of either value abandons every cache in the world: raise the layout number and say so in the changelog."""
    assert SCORER.digest == "2abf0acc7079617226074cdfdbd485db"
    assert row_key((1, 2), (3,)).hex() == "43dcb0395e70482cf6ebff3b59be70c0"


@given(IDS, IDS, IDS, IDS)
def test_rows_are_equal_only_when_prompt_and_completion_are(a: list[int], b: list[int], c: list[int], d: list[int]) -> None:
    assert (row_key(a, b) == row_key(c, d)) == ((a, b) == (c, d))
    assert (row_key(a + b, []) == row_key(a, b)) == (b == [])


def test_truncation_changes_the_row() -> None:
    assert row_key((1, 2), (3, 4)) != row_key((1, 2), (3,))


def test_a_good_end_leaves_the_same_bytes_in_any_order_of_work(tmp_path: Path) -> None:
    for name, order, flush_rows in (("forward", 1, 1000), ("backward", -1, 7)):
        rows = list(expected(50).items())[::order]
        with LogProbCache(tmp_path / name).writer(SCORER, flush_rows=flush_rows) as writer:
            for key, score in rows:
                writer.add([key], [score.logp], [score.tokens])
    (forward,), (backward,) = parts(tmp_path / "forward"), parts(tmp_path / "backward")
    assert forward.name == backward.name and forward.read_bytes() == backward.read_bytes()


def test_a_killed_writer_keeps_what_it_flushed_and_goes_on(tmp_path: Path) -> None:
    process = start(SCORE_PROGRAM, tmp_path / "cache", tmp_path / "journal", 0.01, 60)
    while not (tmp_path / "journal").exists() or len((tmp_path / "journal").read_text().split()) < 12:
        assert process.poll() is None, process.communicate()
    process.kill()
    assert end(process) == -signal.SIGKILL
    kept = LogProbCache(tmp_path / "cache").lookup(SCORER, keys_of(60))
    assert 10 <= len(kept) < 60 and kept.items() <= expected(60).items()
    (tmp_path / "journal").unlink()
    again = start(SCORE_PROGRAM, tmp_path / "cache", tmp_path / "journal", 0, 60)
    assert end(again) == 0
    assert len((tmp_path / "journal").read_text().split()) == 60 - len(kept)
    fill(tmp_path / "unbroken", 60)
    with LogProbCache(tmp_path / "unbroken").writer(SCORER):
        pass
    assert [path.read_bytes() for path in parts(tmp_path / "cache")] == [
        path.read_bytes() for path in parts(tmp_path / "unbroken")
    ]


def test_a_kill_inside_a_write_leaves_no_part_of_it(tmp_path: Path) -> None:
    program = """
        import os, signal, sys
        from polyref.scoring.cache import LogProbCache, ScorerKey, row_key
        with LogProbCache(sys.argv[1]).writer(ScorerKey(weights="abc", tokenizer="t")) as writer:
            writer.add([row_key((0,), (0, 2))], [0.0], [2])
            writer.flush()
            os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)   # the bytes are written, the name is not yet given
            writer.add([row_key((1,), (1, 2))], [-0.5], [2])
            writer.flush()
        """
    process = start(program, tmp_path)
    assert end(process) == -signal.SIGKILL
    assert LogProbCache(tmp_path).lookup(SCORER, keys_of(2)) == expected(1)
    assert [path for path in tmp_path.rglob("*.tmp")]
    with LogProbCache(tmp_path).writer(SCORER) as writer:
        assert writer.known(keys_of(2)) == expected(1)
    assert not [path for path in tmp_path.rglob("*.tmp")]


def test_processes_at_once_score_nothing_twice(tmp_path: Path) -> None:
    processes = [start(SCORE_PROGRAM, tmp_path / "cache", tmp_path / "journal", 0.01, 40) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    counts = collections.Counter((tmp_path / "journal").read_text().split())
    assert len(counts) == 40 and set(counts.values()) == {1}
    assert LogProbCache(tmp_path / "cache").lookup(SCORER, keys_of(40)) == expected(40)
    assert len(parts(tmp_path)) == 1 and not parts(tmp_path, ".torn")


def test_a_waiting_process_says_so_and_takes_over_from_a_killed_one(tmp_path: Path) -> None:
    first = start(SCORE_PROGRAM, tmp_path / "cache", tmp_path / "journal", 0.01, 2000)
    assert first.stdout is not None and first.stdout.readline() == "ready\n"
    second = start(SCORE_PROGRAM, tmp_path / "cache", tmp_path / "journal2", 0, 30)
    assert second.stderr is not None and "waiting" in second.stderr.readline()
    first.kill()
    end(first)
    assert end(second) == 0
    assert LogProbCache(tmp_path / "cache").lookup(SCORER, keys_of(30)) == expected(30)


@pytest.mark.parametrize("tear", ["truncate", "flip", "empty", "not parquet"])
def test_a_torn_part_is_set_aside_and_its_rows_are_scored_again(
    tmp_path: Path, tear: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, 40, per_part=20)
    torn, _ = parts(tmp_path)
    content = torn.read_bytes()
    flipped = content[:200] + bytes([content[200] ^ 1]) + content[201:]
    torn.write_bytes({"truncate": content[:100], "flip": flipped, "empty": b"", "not parquet": b"PAR1"}[tear])
    found = LogProbCache(tmp_path).lookup(SCORER, keys_of(40))
    assert len(found) == 20 and found.items() <= expected(40).items()
    assert "torn" in caplog.text and [path.name for path in parts(tmp_path, ".torn")] == [torn.name + ".torn"]
    with LogProbCache(tmp_path).writer(SCORER) as writer:
        missing = [key for key in keys_of(40) if key not in writer.known(keys_of(40))]
        assert len(missing) == 20
        writer.add(missing, [expected(40)[key].logp for key in missing], [2] * 20)
    assert LogProbCache(tmp_path).lookup(SCORER, keys_of(40)) == expected(40)


def test_a_reader_follows_a_compaction(tmp_path: Path) -> None:
    fill(tmp_path, 40, per_part=10)
    reader = LogProbCache(tmp_path)
    assert reader.lookup(SCORER, keys_of(20)) == expected(20)
    with LogProbCache(tmp_path).writer(SCORER) as writer:
        writer.add([row_key((40,), (40, 2))], [-20.0], [2])
    assert len(parts(tmp_path)) == 1
    assert reader.lookup(SCORER, keys_of(41)) == expected(41)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_reading_leaves_no_thread_that_could_abort_the_end_of_a_process(tmp_path: Path) -> None:
    fill(tmp_path, 40, per_part=20)
    program = """
        import os, sys
        from polyref.scoring.cache import LogProbCache, ScorerKey, row_key
        import pyarrow.parquet
        before = os.listdir("/proc/self/task")
        found = LogProbCache(sys.argv[1]).lookup(ScorerKey(weights="abc", tokenizer="t"), [row_key((1,), (1, 2))])
        print(len(found), len(os.listdir("/proc/self/task")) - len(before))
    """
    process = start(program, tmp_path)
    assert process.communicate(timeout=240)[0].split() == ["1", "0"] and process.returncode == 0


def test_a_row_written_twice_counts_once(tmp_path: Path) -> None:
    fill(tmp_path, 10)
    with LogProbCache(tmp_path).writer(SCORER) as writer:
        writer.add(keys_of(12), [-0.5 * i for i in range(12)], [2] * 12)
    import pyarrow.parquet as pq

    (part,) = parts(tmp_path)
    assert pq.read_table(part).num_rows == 12


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_a_number_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ModelError, match="1 of 2 log-probabilities are NaN or infinite"):
        with LogProbCache(tmp_path).writer(SCORER) as writer:
            writer.add(keys_of(2), [-1.0, value], [2, 2])
    assert LogProbCache(tmp_path).lookup(SCORER, keys_of(2)) == {}


def test_a_full_disk_keeps_what_was_written_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunFolderError) as error, LogProbCache(tmp_path).writer(SCORER, flush_rows=1) as writer:
        writer.add(keys_of(1), [0.0], [2])
        monkeypatch.setattr(os, "fsync", full)
        writer.add(keys_of(2)[1:], [-0.5], [2])
    assert "No space left on device; free some space" in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(os, "fsync", real)
    assert LogProbCache(tmp_path).lookup(SCORER, keys_of(2)) == expected(1)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"} == {".json", ".parquet"}


def test_a_file_size_limit_is_one_line(tmp_path: Path) -> None:
    program = """
        import resource, sys
        from polyref.errors import RunFolderError
        from polyref.scoring.cache import LogProbCache, ScorerKey, row_key
        import pyarrow.parquet
        try:
            with LogProbCache(sys.argv[1]).writer(ScorerKey(weights="abc", tokenizer="t")) as writer:
                resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
                writer.add([row_key((i,), ()) for i in range(500)], [-1.0 / 3] * 500, [2] * 500)
        except RunFolderError as error:
            print(error)
        """
    output, errors = start(program, tmp_path).communicate(timeout=60)
    assert errors == "" and "cannot be written: File too large; free some space" in output and output.count("\n") == 1
    assert not parts(tmp_path) and not list(tmp_path.rglob("*.tmp"))


def test_a_read_only_cache_is_read_but_not_written(tmp_path: Path) -> None:
    """As an ordinary user: root may write everywhere, so root becomes nobody first."""
    fill(tmp_path / "cache", 3)
    for path in (tmp_path / "cache").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (tmp_path / "cache").chmod(0o555)
    program = """
        import os, sys
        from polyref.errors import RunFolderError
        from polyref.scoring.cache import LogProbCache, ScorerKey, row_key
        import pyarrow.parquet, pyarrow.compute
        os.chdir(sys.argv[1])
        if os.getuid() == 0:
            os.setuid(65534)
        scorer, cache = ScorerKey(weights="abc", tokenizer="t"), LogProbCache("cache")
        print(len(cache.lookup(scorer, [row_key((i,), (i, 2)) for i in range(3)])))
        for other in (scorer, ScorerKey(weights="new")):
            try:
                with cache.writer(other):
                    print("no error")
            except RunFolderError as error:
                print(error)
        """
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(folder.stat().st_mode | 0o055)
    output, errors = start(program, tmp_path).communicate(timeout=60)
    lines = output.splitlines()
    assert errors == "" and lines[0] == "3" and len(lines) == 3
    assert all("cannot be written: Permission denied; name a folder that you may write to" in line for line in lines[1:])


def test_hostile_text_in_a_scorer_is_kept_escaped(tmp_path: Path) -> None:
    scorer = ScorerKey(weights="../../etc", system_prompt="\x1b[31m</script>\n")
    fill(tmp_path, 1, scorer=scorer)
    assert [path.name for path in tmp_path.iterdir()] == [scorer.digest]
    assert b"\x1b" not in (tmp_path / scorer.digest / "key.json").read_bytes()


def test_importing_the_cache_loads_no_arrow() -> None:
    program = "import sys, polyref.scoring.cache; print('pyarrow' in sys.modules, 'torch' in sys.modules)"
    assert start(program).communicate(timeout=60)[0] == "False False\n"


def test_a_second_writer_in_this_process_finds_the_first_ones_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cache = LogProbCache(tmp_path)
    for _ in range(2):
        with cache.writer(SCORER) as writer:
            new = [key for key in keys_of(4) if key not in writer.known(keys_of(4))]
            writer.add(new, [expected(4)[key].logp for key in new], [2] * len(new))
    assert new == [] and "waiting" not in caplog.text
