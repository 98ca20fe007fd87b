"""Settings of preference training: transformers' TrainingArguments, and what many references add, under TRL's names."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from polyref.errors import ConfigError
from polyref.objectives.pairwise import PairLoss, pair_loss
from polyref.training.arguments import COUNTS, check_arguments, check_control, finish_arguments
from polyref.training.step_objective import OBJECTIVES, StepObjective

LossType = Literal["sigmoid", "hinge", "ipo", "smoothed", "robust"]


@dataclass
class PreferenceConfig(TrainingArguments):
    """Every option of `PreferenceTrainer`. Wrong values raise ConfigError here, before a model is loaded."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps, or this share of all steps below 1."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: the trainer makes its own columns."})

    beta: float = field(
        default=0.1, metadata={"help": "KL strength, above 0: larger keeps the policy closer to the references."}
    )
    loss_type: LossType = field(
        default="sigmoid",
        metadata={"help": "Pair loss: sigmoid (DPO), hinge, ipo, smoothed (cDPO) or robust (rDPO)."},
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "Assumed rate of flipped labels, in [0, 0.5), for smoothed and robust; with sigmoid it means smoothed."
        },
    )
    divergence: Literal["reverse", "forward"] = field(
        default="reverse",
        metadata={"help": "KL direction. reverse goes with geometric or arithmetic references, forward with arithmetic ones."},
    )
    length_normalise: bool = field(
        default=False,
        metadata={"help": "Divide each log-ratio by its completion's token count (what TRL does for ipo). Reverse KL only."},
    )
    objective: Literal["plain", "variance_reduced", "doubly_robust"] = field(
        default="plain",
        metadata={
            "help": "plain: the pair loss. variance_reduced: the pair loss with an auxiliary preference model as control "
            "variate. doubly_robust: the win rate over sampling_policy. The last two read the auxiliary columns."
        },
    )
    control_coefficient: float | Literal["optimal", "estimated"] = field(
        default=1.0,
        metadata={
            "help": "Weight of the control variate of variance_reduced, at least 0; optimal is M/(M+1) for M pairs, best if "
            "the auxiliary model is right; estimated finds the best for the one at hand, from the pairs of earlier steps."
        },
    )
    importance_clip: float | None = field(
        default=10.0, metadata={"help": "Largest importance ratio of doubly_robust, above 0; none clips nothing."}
    )
    dr_beta: float | None = field(
        default=None,
        metadata={
            "help": "Dr-DPO's beta', above 1: replaces the batch mean by a soft worst case. One process, no accumulation."
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
    disable_dropout: bool = field(default=True, metadata={"help": "Set dropout to 0, so that log-ratios start at exactly 0."})
    precompute_ref_log_probs: bool = field(
        default=True, metadata={"help": "Reference log-probs are always made before training and cached; false is refused."}
    )
    precompute_ref_batch_size: int = field(default=8, metadata={"help": "Prompts scored at once under a reference."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of the log-prob cache; by default $POLYREF_CACHE or ~/.cache/polyref."}
    )

    def __post_init__(self) -> None:
        self._check()
        finish_arguments(self, super().__post_init__)

    def _check(self) -> None:
        self.pair_loss()
        check_arguments(self, (*COUNTS, "precompute_ref_batch_size"))
        if self.divergence not in ("reverse", "forward"):
            raise ConfigError(f"unknown divergence {self.divergence!r}", fix="use reverse or forward")
        if self.length_normalise and self.divergence == "forward":
            raise ConfigError("length_normalise has no meaning under forward KL", fix="use divergence: reverse")
        self._check_objective()
        if self.dr_beta is not None and not self.dr_beta > 1:
            raise ConfigError(f"dr_beta is {self.dr_beta}", fix="give a value above 1")
        if self.dr_beta is not None and self.gradient_accumulation_steps > 1:
            raise ConfigError(
                "dr_beta needs the whole effective batch in one forward pass",
                fix="set gradient_accumulation_steps to 1 and raise per_device_train_batch_size",
            )
        if not self.precompute_ref_log_probs:
            raise ConfigError(
                "precompute_ref_log_probs is false", fix="leave it true: references are scored once, through the cache"
            )
        if self.dr_beta is not None and self.auto_find_batch_size:
            raise ConfigError("auto_find_batch_size would change the batch that dr_beta is about", fix="set one of them")

    def _check_objective(self) -> None:
        """An option that the objective would ignore is refused, as is a combination that has no meaning."""
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"unknown objective {self.objective!r}", fix=f"use one of {', '.join(OBJECTIVES)}")
        check_control(self.control_coefficient, self.objective)
        clip = self.importance_clip
        if clip is not None and not 0 < clip < math.inf:
            raise ConfigError(f"importance_clip is {clip}", fix="give a ratio above 0, or none")
        if clip != 10.0 and self.objective != "doubly_robust":
            what = f"importance_clip has no effect with objective {self.objective}"
            raise ConfigError(what, fix="set objective to doubly_robust")
        if self.dr_beta is not None and self.objective != "plain":
            raise ConfigError(f"dr_beta has no meaning with objective {self.objective}", fix="set one of them")
        if self.objective == "doubly_robust":
            usual: dict[str, object] = {"loss_type": "sigmoid", "label_smoothing": 0.0, "length_normalise": False}
            for name, value in usual.items():
                if getattr(self, name) != value:
                    raise ConfigError(f"{name} has no effect with objective doubly_robust", fix="leave it out")
            if self.divergence == "forward":
                raise ConfigError("objective doubly_robust is about reverse KL", fix="use divergence: reverse")

    def step_objective(self) -> StepObjective | None:
        """What a step minimises instead of the pair loss, if anything."""
        return OBJECTIVES[self.objective](self.pair_loss(), self.beta, self.control_coefficient, self.importance_clip)

    def pair_loss(self) -> PairLoss:
        """The pair loss these settings name. sigmoid with label_smoothing is the smoothed loss (TRL 1.16 ignores it there)."""
        smoothed = self.loss_type == "sigmoid" and self.label_smoothing > 0
        return pair_loss("smoothed" if smoothed else self.loss_type, self.beta, self.label_smoothing)
