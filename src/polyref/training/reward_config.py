"""Settings of reward training: transformers' TrainingArguments, and what pairs of completions add, under TRL's names."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from polyref.errors import ConfigError
from polyref.objectives.pairwise import PairLoss, pair_loss
from polyref.training.arguments import check_arguments, check_control, finish_arguments
from polyref.training.step_objective import OBJECTIVES, StepObjective


@dataclass
class RewardConfig(TrainingArguments):
    """Every option of `RewardTrainer`. Wrong values raise ConfigError here, before a model is loaded."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps, or this share of all steps below 1."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: the trainer makes its own columns."})

    loss_type: Literal["sigmoid", "hinge", "ipo", "smoothed", "robust"] = field(
        default="sigmoid",
        metadata={
            "help": "Pair loss of the reward difference: sigmoid (Bradley-Terry), hinge, ipo (at beta 1), smoothed, robust."
        },
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "Assumed rate of flipped labels, in [0, 0.5), for smoothed and robust; with sigmoid it means smoothed."
        },
    )
    center_rewards_coefficient: float | None = field(
        default=None,
        metadata={"help": "Weight of (r_chosen + r_rejected)^2, at least 0, which centres rewards at 0; TRL advises 0.01."},
    )
    objective: Literal["plain", "variance_reduced"] = field(
        default="plain",
        metadata={
            "help": "plain: the pair loss. variance_reduced: the pair loss with an auxiliary preference model as control "
            "variate, which reads the auxiliary columns."
        },
    )
    control_coefficient: float | Literal["optimal", "estimated"] = field(
        default=1.0,
        metadata={
            "help": "Weight of the control variate of variance_reduced, at least 0; optimal is M/(M+1) for M pairs, best if "
            "the auxiliary model is right; estimated finds the best for the one at hand, from the pairs of earlier steps."
        },
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest prompt + completion in tokens; longer ones are cut."}
    )
    truncation_mode: Literal["keep_start", "keep_end"] = field(
        default="keep_start", metadata={"help": "Which end of a sequence that is too long is kept."}
    )
    prompt_format: Literal["as_is", "chat", "transcript"] = field(
        default="as_is",
        metadata={"help": "as_is; chat (strings become one user and one assistant turn); transcript (Human/Assistant turns)."},
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set dropout to 0, so that equal texts have equal rewards."})

    def __post_init__(self) -> None:
        self.pair_loss()
        check_arguments(self)
        self._check_objective()
        centring = self.center_rewards_coefficient
        if centring is not None and not 0 <= centring < math.inf:
            raise ConfigError(f"center_rewards_coefficient is {centring}", fix="give a number of at least 0, or leave it out")
        finish_arguments(self, super().__post_init__)

    def _check_objective(self) -> None:
        objective: str = self.objective
        if objective == "doubly_robust":
            what = "objective doubly_robust weighs completions by a policy's probabilities, and a reward model has none"
            raise ConfigError(what, fix="train a policy by it, or use variance_reduced")
        if objective not in OBJECTIVES:
            raise ConfigError(f"unknown objective {objective!r}", fix="use plain or variance_reduced")
        check_control(self.control_coefficient, objective)

    def step_objective(self) -> StepObjective | None:
        """What a step minimises instead of the pair loss, if anything."""
        return OBJECTIVES[self.objective](self.pair_loss(), 1.0, self.control_coefficient, None)

    def pair_loss(self) -> PairLoss:
        """The pair loss these settings name; sigmoid with label_smoothing is the smoothed loss."""
        smoothed = self.loss_type == "sigmoid" and self.label_smoothing > 0
        return pair_loss("smoothed" if smoothed else self.loss_type, 1.0, self.label_smoothing)
