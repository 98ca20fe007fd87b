"""Guards one by one, on numbers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from polyref.errors import ModelError
from polyref.training.guards import FallingChosenWarning, WholeWindows, check_starts_at_reference, mean_loss


def judged(chosen: Sequence[float], margins: Sequence[float], caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the guard says about a log of these lines, with lines of an evaluation between them."""
    guard, state = FallingChosenWarning(), TrainerState()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="polyref"):
        for value, margin in zip(chosen, margins, strict=True):
            for line in ({"logps/chosen": value, "rewards/margins": margin}, {"eval_logps/chosen": -1e9}):
                state.log_history.append(line)
                guard.on_log(SimpleNamespace(), state, TrainerControl(), line)  # type: ignore[arg-type]
    return [record.message for record in caplog.records]


def test_a_fall_of_the_chosen_with_growing_margins_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    (said,) = judged([-100, -104, -110, -120, -130, -150], [0, 1, 2, 3, 4, 5], caplog)
    assert "mean log-prob -111.3, at first -100.0" in said and "Raise beta" in said


@pytest.mark.parametrize(
    ("chosen", "margins"),
    [
        ([-100, -101, -102, -103, -104], [0, 1, 2, 3, 4]),  # less than 5%
        ([-100, -90, -80, -70, -60], [0, 1, 2, 3, 4]),  # a rise
        ([-100, -120, -130, -140, -150], [0, -1, -2, -3, -4]),  # margins fall too: that is plain failure to learn
        ([-100, -110, -100, -100, -100], [0, 1, 2, 3, 4]),  # one bad line, averaged away
        ([-100, -150, -150], [0, 1, 2]),  # too early to say
    ],
)
def test_nothing_is_said_otherwise(chosen: list[float], margins: list[float], caplog: pytest.LogCaptureFixture) -> None:
    assert judged(chosen, margins, caplog) == []


def test_a_resumed_log_is_judged_from_its_first_line(caplog: pytest.LogCaptureFixture) -> None:
    """The checkpoint holds the log; a new guard that reads it compares with the start of training, not of this process."""
    guard, state = FallingChosenWarning(), TrainerState()
    state.log_history = [{"logps/chosen": value, "rewards/margins": i} for i, value in enumerate([-100.0, -130.0, -130.0])]
    state.log_history.append({"logps/chosen": -130.0, "rewards/margins": 4.0})
    guard.on_log(SimpleNamespace(), state, TrainerControl(), state.log_history[-1])  # type: ignore[arg-type]
    assert "at first -100.0" in caplog.text


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 1e-4), (torch.bfloat16, 2.0), (torch.float64, 1e-5)])
def test_rounding_of_the_dtype_is_no_difference(dtype: torch.dtype, gap: float) -> None:
    anchor = torch.tensor([[-400.0, -300.0]])
    check_starts_at_reference(anchor + gap, anchor, dtype)
    with pytest.raises(ModelError, match="differ by .* nats at step 0; switch dropout off"):
        check_starts_at_reference(anchor - 250.0, anchor, dtype)


def test_a_line_is_logged_before_every_checkpoint_evaluation_and_end() -> None:
    guard, state = WholeWindows(), TrainerState()
    on, off = (SimpleNamespace(logging_strategy=strategy, eval_strategy="no") for strategy in ("steps", "no"))
    for reason in ("should_save", "should_evaluate", "should_training_stop"):
        assert guard.on_step_end(on, state, TrainerControl(**{reason: True})).should_log  # type: ignore[arg-type]
        assert guard.on_epoch_end(on, state, TrainerControl(**{reason: True})).should_log  # type: ignore[arg-type]
        assert not guard.on_step_end(off, state, TrainerControl(**{reason: True})).should_log  # type: ignore[arg-type]
    assert not guard.on_step_end(on, state, TrainerControl()).should_log  # type: ignore[arg-type]


def test_the_mean_loss_weighs_lines_by_their_steps() -> None:
    lines = [{"step": 2, "loss": 3.0}, {"step": 2, "eval_loss": 9.0}, {"step": 3, "loss": 6.0}]
    assert mean_loss(lines, otherwise=0.5) == 4.0
    assert mean_loss([{"step": 2, "eval_loss": 9.0}], otherwise=0.5) == 0.5
