"""What benchmarks of a step share: worker processes that take one step each in turn, and a word on the machine.

A worker is called with (name, connection, arguments, ...). It sends ("ready", text), then ("step", timing) for each "go" that
it receives, and ("final", values) after "stop"; ("error", text) where it fails.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Worker = tuple[Any, Connection]


def begin(work: Callable[..., None], name: str, arguments: argparse.Namespace, *more: Any) -> Worker:
    """A worker in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(name, there, arguments, *more), daemon=True)
    process.start()
    return process, here


def expect(connection: Connection, kind: str) -> Any:
    """The next thing that a worker says, which is of this kind."""
    if not connection.poll(3600):
        raise SystemExit(f"a worker was silent for an hour while {kind} was awaited")
    got, value = connection.recv()
    if got != kind:
        raise SystemExit(f"a worker failed: {value}")
    return value


def take_turns(
    workers: Mapping[str, Worker], arguments: argparse.Namespace
) -> tuple[dict[str, list[dict[str, float]]], dict[str, Any]]:
    """Timings of `arguments.steps` steps each, in turn, after `arguments.warmup` uncounted ones, and what workers end with."""
    timings: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for step in range(arguments.warmup + arguments.steps):
        for name, (_, connection) in workers.items():
            connection.send("go")
            timing = expect(connection, "step")
            if step >= arguments.warmup:
                timings[name].append(timing)
        latest = {name: round(t[-1]["seconds"], 2) for name, t in timings.items() if t}
        print(f"step {step + 1} of {arguments.warmup + arguments.steps}: {latest}", flush=True)
    finals = {}
    for name, (process, connection) in workers.items():
        connection.send("stop")
        finals[name] = expect(connection, "final")
        process.join(60)
    return timings, finals


def conditions(threads: int, *packages: str) -> dict[str, Any]:
    """The machine, and the versions of Python and of `packages`."""
    versions = {package: metadata.version(package) for package in packages} | {"python": platform.python_version()}
    processor = platform.processor() or platform.machine()
    return {"machine": {"processor": processor, "cores": os.cpu_count(), "threads": threads}, "versions": versions}


def keep(result: Mapping[str, Any], file: Path) -> None:
    """Write a result as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n")
