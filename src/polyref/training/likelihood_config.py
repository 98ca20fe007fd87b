"""Settings of training on samples: transformers' TrainingArguments, and what weighted likelihood adds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from polyref.errors import ConfigError
from polyref.training.arguments import COUNTS, check_arguments, finish_arguments


@dataclass
class LikelihoodConfig(TrainingArguments):
    """Every option of `LikelihoodTrainer`. Wrong values raise ConfigError here, before a model is loaded."""

    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps, or this share of all steps below 1."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: the trainer makes its own columns."})

    length_normalise: bool = field(
        default=False,
        metadata={"help": "Divide each completion's log-probability by its number of tokens; the optimum is then another one."},
    )
    samples_per_row: int = field(
        default=8,
        metadata={
            "help": "Most completions that pass with their prompt at once; a prompt with more fills several rows. Batch sizes "
            "count rows."
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
    disable_dropout: bool = field(default=True, metadata={"help": "Set dropout to 0 while training."})

    def __post_init__(self) -> None:
        if self.label_smoothing_factor:
            raise ConfigError("label_smoothing_factor has no effect here", fix="leave it out")
        check_arguments(self, (*COUNTS, "samples_per_row"))
        finish_arguments(self, super().__post_init__)
