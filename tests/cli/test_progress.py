"""Plain progress lines: rates of this run alone, and a fresh start for each piece of work."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from polyref.cli import progress
from polyref.cli.progress import Meter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_rate_counts_what_this_run_did_and_not_what_it_found_done(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="polyref"), Meter("steps") as meter:
        meter("training", 50, 100)
        clock[0] = 20.0
        meter("training", 60, 100)
    assert caplog.messages == ["training: 60 of 100 steps, 0.5 a second, 80 s left"]


def test_large_rates_are_written_out(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="polyref"), Meter("tokens") as meter:
        meter("a model", 0, 12345)
        clock[0] = 10.0
        meter("a model", 12345, 12345)
    assert caplog.messages == ["a model: 12345 of 12345 tokens, 1,234 a second, 0 s left"]


def test_the_same_name_again_begins_anew(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="polyref"), Meter("tokens") as meter:
        meter("a model", 10, 20)
        clock[0] = 5.0
        meter("a model", 20, 20)
        clock[0] = 1000.0
        meter("a model", 4, 12)
        clock[0] = 1004.0
        meter("a model", 12, 12)
    assert caplog.messages == [
        "a model: 20 of 20 tokens, 2 a second, 0 s left",
        "a model: 12 of 12 tokens, 2 a second, 0 s left",
    ]


def test_a_hostile_name_is_shown_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What work is called comes from a recipe: it is neither markup nor a terminal's command."""
    terminal = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **options: Console(file=terminal, force_terminal=True, width=120))
    with Meter("tokens") as meter:
        meter("[/b] [red]\x1b]0;owned\x07", 1, 2)
        meter.bar.refresh()
    assert "[/b] [red]\\x1b]0;owned\\x07" in terminal.getvalue() and "\x1b]" not in terminal.getvalue()
