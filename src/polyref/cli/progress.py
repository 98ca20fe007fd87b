"""Progress of long work: a rich bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from polyref.errors import one_line

logger = logging.getLogger(__name__)

_SHOWN = 60

PLAIN_SECONDS = 10.0
"""Seconds between two plain lines about one piece of work."""


class Meter:
    """Call it with (what, done, total); it shows as much as the place it writes to allows. A context manager."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(unit),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.tasks: dict[str, Any] = {}
        self.started: dict[str, tuple[float, int]] = {}
        self.told: dict[str, float] = {}
        self.done: dict[str, int] = {}

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` units of `what`; fewer than before begins a new piece of work of that name."""
        if what not in self.started or done < self.done[what]:
            self.told[what] = time.monotonic()
            self.started[what] = (self.told[what], done)
            self.tasks[what] = self.bar.add_task(one_line(what, _SHOWN), total=total)
        self.done[what] = done
        self.bar.update(self.tasks[what], completed=done, total=total)
        now = time.monotonic()
        if self.bar.disable and (now - self.told[what] > PLAIN_SECONDS or done >= total):
            self.told[what] = now
            start, before = self.started[what]
            rate = (done - before) / max(now - start, 1e-9)
            pace = f", {_number(rate)} a second, {(total - done) / rate:.0f} s left" if rate else ""
            logger.info("%s: %d of %d %s%s", what, done, total, self.unit, pace)


def _number(rate: float) -> str:
    """Three digits, written out."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


class TrainingProgress(TrainerCallback):
    """The training steps of a Trainer, and the batches of its evaluations, on a `Meter`."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.evaluated = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the empty bar."""
        self.meter("training", state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One step further."""
        self.meter("training", state.global_step, state.max_steps)

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One batch of an evaluation further."""
        total = len(kwargs["eval_dataloader"])
        self.evaluated = self.evaluated % total + 1
        self.meter("evaluating", self.evaluated, total)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{_number(speed)} {self.unit}/s" if speed else f"- {self.unit}/s")
