"""The control coefficient of variance reduction, estimated while training from the pairs of earlier optimiser steps."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.distributed
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from polyref.objectives.variance_reduced import estimated_control

STATE: Final = "control_coefficient"
"""Under this name the sums are among the callbacks' states in trainer_state.json, which is a checkpoint's last file."""


class EstimatedControl(TrainerCallback):
    """c of `objectives.estimated_control`, from the `control_moments` of all pairs of all earlier optimiser steps.

    c is one number through a step: its own pairs, in every accumulated batch and on every process, count from the next one on.
    So the loss stays unbiased given the past, and splitting a step does not change it. In later epochs the past holds the very
    labels of the batch, and so it does, by way of g, where g is cross-fitted on the same pairs: for c as for the policy. The
    sum is plain, without forgetting: it needs no rate, settles, and does not depend on the batch size; it follows slowly should
    g become better or worse for a changing policy. Before the first step c is M/(M+1), the best of a g that is right, which
    never loses to plain with it.

    `sums` (2,) float64; a resumed run reads them back from its checkpoint to the last bit.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)
        self._step = torch.zeros_like(self.sums)

    def coefficient(self, auxiliary_pairs: int) -> float:
        """c for M auxiliary pairs a data pair."""
        return estimated_control(self.sums, auxiliary_pairs)

    def add(self, moments: Tensor) -> None:
        """Keep the moments (2,) of a batch of this step until the step is over."""
        self._step = self._step + moments

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Nothing is known, or what the checkpoint knew."""
        states: Any = state.stateful_callbacks
        sums = states[STATE]["sums"] if STATE in states else [0.0, 0.0]
        self.sums, self._step = torch.tensor(sums, dtype=torch.float64), torch.zeros_like(self._step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The step's pairs, of all processes, have become the past."""
        found = self._step.to(args.device) if args.world_size > 1 else self._step
        if args.world_size > 1:
            torch.distributed.all_reduce(found)
        self.sums, self._step = self.sums + found.cpu(), torch.zeros_like(self.sums)
        states: Any = state.stateful_callbacks
        states[STATE] = {"sums": self.sums.tolist()}
