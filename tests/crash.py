"""The real command line in children that meet a fault at a chosen point: killed, interrupted, out of disk, or halted.

`Warm` is a process that has imported everything and forks a child for each run, so that many of them are affordable. A child
counts its points: "half", in the middle of the writing of a file; "sync" and "name", before bytes are forced to disk and before
a file or folder is given its name; "step", before the backward pass of a training. Each knows the stage that it is of.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Self

KINDS = ("half", "sync", "name", "step")


class Point(NamedTuple):
    """Where a child may meet its fault."""

    kind: str
    stage: str


class Ended(NamedTuple):
    """How a child ended, or was halted: exit status (less than 0: by that signal), standard error, the points it passed."""

    code: int
    err: str
    points: list[Point]
    pid: int


class Warm:
    """Runs `polyref WORDS` in children, one at a time, but for those that are halted."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate(timeout=60)

    def run(self, words: Iterable[object], fault: str = "kill", at: int | Point | None = None, **environment: str) -> Ended:
        """Run to the end, or to `fault` at the point numbered `at` from 0, or the first one that is as `at`."""
        return self._ask({"words": [str(word) for word in words], "fault": fault, "at": at, "environment": environment})

    def go_on(self, halted: Ended) -> Ended:
        """Let a halted child go on to its end."""
        return self._ask({"pid": halted.pid})

    def _ask(self, job: dict[str, Any]) -> Ended:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        code, err, points, pid = json.loads(self._process.stdout.readline())
        return Ended(code, err, [Point(*point) for point in points], pid)


def spread(points: Sequence[Point], count: int, seed: int) -> list[int]:
    """Numbers of `count` of `points`, at random, over all stages in turn and, within these, of the kinds least drawn so far."""
    draw, drawn = random.Random(seed), set[int]()
    stages = list(dict.fromkeys(point.stage for point in points))
    used = dict.fromkeys(KINDS, 0)
    while len(drawn) < count:
        for stage in draw.sample(stages, min(len(stages), count - len(drawn))):
            left = [i for i, point in enumerate(points) if point.stage == stage and i not in drawn]
            if left:
                kind = min((points[i].kind for i in left), key=lambda kind: (used[kind], draw.random()))
                drawn.add(draw.choice([i for i in left if points[i].kind == kind]))
                used[kind] += 1
    return sorted(drawn)


def left_by(run: Path) -> dict[str, bytes]:
    """What a run leaves, every file and folder but its lock, times (of drawing, beside it), and checkpoints to go on from."""
    aside = {".lock", "timing.json"}
    paths = [path for path in sorted(run.rglob("*")) if path.name not in aside and "/checkpoint-" not in path.as_posix()]
    return {str(path.relative_to(run)): path.read_bytes() if path.is_file() else b"" for path in paths}


class Runs:
    """Runs of one command, each with a folder and a cache of its own, and what an unbroken one left.

    `words` gives the command whose run folder is `root`/NAME/run.
    """

    def __init__(self, warm: Warm, root: Path, words: Callable[[str], Sequence[object]]) -> None:
        self.warm, self._root, self._words = warm, root, words
        unbroken = self("unbroken")
        assert unbroken.code == 0, unbroken.err
        self.points, self.whole = unbroken.points, left_by(self.folder("unbroken"))
        assert self.whole

    def folder(self, name: str) -> Path:
        return self._root / name / "run"

    def __call__(self, name: str, fault: str = "kill", at: int | Point | None = None) -> Ended:
        return self.warm.run(self._words(name), fault, at, POLYREF_CACHE=str(self._root / name / "cache"))

    def kill(self, name: str, at: int | Point) -> None:
        """Start the run `name`, or take it up, until it is killed."""
        killed = self(name, "kill", at)
        assert killed.code == -signal.SIGKILL, killed.err

    def goes_on(self, name: str) -> str:
        """Take the run `name` up to its end, which is that of the unbroken one; what was said on the way."""
        ended = self(name)
        assert ended.code == 0, ended.err
        self.assert_whole(name)
        return ended.err

    def assert_whole(self, name: str) -> None:
        """The run `name` left what the unbroken one did, byte for byte, and nothing half-written."""
        found, whole = left_by(self.folder(name)), self.whole
        assert not {path for path in found | whole if found.get(path) != whole.get(path)}, name
        assert not list(self._root.glob(f"{name}/**/*.tmp"))

    def survive_kills(self, count: int) -> None:
        """Each of `count` runs is killed at a point of its own, and then goes on."""
        for at in spread(self.points, count, seed=0):
            self.kill(f"killed-{at}", at)
            self.goes_on(f"killed-{at}")


def halve(path: str | Path) -> None:
    """Tear a file in the middle."""
    os.truncate(path, os.path.getsize(path) // 2)


# What follows runs in the warm process and in its children.

Tear = Callable[[], object]


def _kill(tear: Tear) -> None:
    tear()
    os.kill(os.getpid(), signal.SIGKILL)


def _interrupt(tear: Tear) -> None:
    signal.raise_signal(signal.SIGINT)


def _full(tear: Tear) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


def _halt(tear: Tear) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS = {"kill": _kill, "interrupt": _interrupt, "full": _full, "halt": _halt}
"""Killed, with the file at hand torn in half; SIGINT; no file grows beyond 100 bytes from there on; stopped until `go_on`."""


class _Watch:
    """Counts the points that this process meets, and brings about its fault at one of them."""

    def __init__(self, fault: str, at: int | list[str] | None) -> None:
        self.seen, self._stage, self._fault = list[Point](), "opening", FAULTS[fault]
        self._at = Point(*at) if isinstance(at, list) else at

    def _meet(self, kind: str, tear: Tear = lambda: None) -> None:
        here = Point(kind, self._stage)
        met = self._at in (len(self.seen), here) and not (self._at == here and here in self.seen)
        self.seen.append(here)
        if met:
            self._fault(tear)

    def begin(self) -> None:
        """Stand before everything that writes or trains: our files, and what transformers puts into a checkpoint."""
        import peft.peft_model
        import torch
        import transformers

        from polyref import files, stages
        from polyref.labelling.votes import Votes

        def before(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
            setattr(owner, name, make(getattr(owner, name)))

        for owner, name in ((os, "replace"), (os, "rename")):
            before(owner, name, self._named)
        before(files, "_sync_one", self._synced)
        before(stages.RunFolder, "stage", self._staged)
        before(stages.RunFolder, "append_metrics", partial(self._appended, "metrics_path"))
        before(Votes, "_append", partial(self._appended, "path"))
        before(torch.Tensor, "backward", self._stepped)
        for owner in (transformers.modeling_utils, peft.peft_model):
            before(owner, "safe_save_file", self._written)
        before(torch, "save", self._written)
        before(transformers.TrainerState, "save_to_json", self._written)

    def _named(self, rename: Callable[..., Any]) -> Callable[..., Any]:
        def call(*paths: Any, **options: Any) -> Any:
            self._meet("name")
            return rename(*paths, **options)

        return call

    def _synced(self, sync: Callable[[Path], None]) -> Callable[[Path], None]:
        def call(path: Path) -> None:
            writing = path.is_file() and any(part.endswith(".tmp") for part in path.parts)
            self._meet("half", lambda: halve(path)) if writing else self._meet("sync")
            sync(path)

        return call

    def _staged(self, stage: Callable[..., Any]) -> Callable[..., Any]:
        def call(folder: Any, name: str, inputs: Any = None) -> Any:
            self._stage = name
            return stage(folder, name, inputs)

        return call

    def _appended(self, where: str, append: Callable[..., None]) -> Callable[..., None]:
        def call(owner: Any, row: Any) -> None:
            def tear() -> None:
                append(owner, row)
                file = getattr(owner, where)
                os.truncate(file, os.path.getsize(file) - 9)

            self._meet("half", tear)
            append(owner, row)

        return call

    def _stepped(self, backward: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            self._meet("step")
            backward(*args, **options)

        return call

    def _written(self, write: Callable[..., None]) -> Callable[..., None]:
        def call(what: Any, path: Any, *args: Any, **options: Any) -> None:
            def tear() -> None:
                write(what, path, *args, **options)
                halve(path)

            self._meet("half", tear)
            write(what, path, *args, **options)

        return call


def _forked(job: dict[str, Any]) -> tuple[int, tuple[int, int]]:
    """The process id of a child that does `job`, and where its standard error and its points can be read."""
    from polyref.cli.main import main

    (err, err_in), (points, points_in) = os.pipe(), os.pipe()
    if pid := os.fork():
        os.close(err_in)
        os.close(points_in)
        return pid, (err, points)
    os.dup2(err_in, 2)
    os.environ.update(job["environment"])
    watch, code, before = _Watch(job["fault"], job["at"]), 1, set(sys.modules)
    watch.begin()
    try:
        code = main(job["words"])
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    with os.fdopen(points_in, "w") as told:
        json.dump([watch.seen, sorted(set(sys.modules) - before)], told)
    os._exit(code)


def _ending(pid: int, halting: bool, pipes: dict[int, tuple[int, int]]) -> tuple[int, str, list[Point], int]:
    """Wait until a child ends or is halted: the fields of `Ended`. What it imported is imported for those to come."""
    if halting:
        _, status = os.waitpid(pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            return -os.WSTOPSIG(status), "", [], pid
    with os.fdopen(pipes[pid][0]) as err, os.fdopen(pipes.pop(pid)[1]) as told:
        points, modules = json.loads(told.read() or "[[], []]")
        said = err.read()
    if not halting:
        _, status = os.waitpid(pid, 0)
    for name in modules:
        with suppress(Exception):  # not all can be imported by their names
            import_module(name)
    return os.waitstatus_to_exitcode(status), said, points, pid


def _serve() -> None:
    """Do each job, a line of standard input, in a child of its own, and answer it with a line."""
    from polyref.cli.main import _quiet_libraries

    _quiet_libraries()  # as `main` does, before they are imported
    import peft  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch
    from transformers import LlamaForCausalLM, Trainer  # noqa: F401

    import polyref.cli.iterate_plan
    import polyref.loops.iterate  # noqa: F401

    torch.set_num_threads(1)
    answers, pipes = os.fdopen(os.dup(1), "w"), dict[int, tuple[int, int]]()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        job = json.loads(line)
        if "pid" in job:
            os.kill(pid := job["pid"], signal.SIGCONT)
        else:
            pid, ends = _forked(job)
            pipes[pid] = ends
        answers.write(json.dumps(_ending(pid, job.get("fault") == "halt", pipes)) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
