"""Settings that several verbs share, and what they mean as arguments of the library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from polyref.cli import checks
from polyref.data.sources import load_preferences, split_by_prompt
from polyref.errors import ConfigError
from polyref.types import PreferenceRecord


@dataclass
class DataSettings:
    """Where preference pairs come from.

    Args:
        data: hub id, folder saved by datasets, .jsonl, .jsonl.gz, .json or .parquet file.
        eval_data: held-out pairs, in the same forms. Without it, held_out takes them from data.
        split: split of a hub id or saved folder.
        columns: other column names, as in {prompt: question}.
        limit: use only so many pairs, the first ones after held_out was taken.
        held_out: pairs (or a share below 1) kept for evaluation, split by prompt so that no prompt is on both sides.
        split_seed: which prompts held_out takes; apart from the training seed, so that seeds share one held-out set.
        data_revision: revision of a hub data set.
    """

    data: str
    eval_data: str | None = None
    split: str = "train"
    columns: dict[str, str] | None = None
    limit: int | None = None
    held_out: float = 0.0
    split_seed: int = 0
    data_revision: str | None = None

    def load(
        self, prompt_format: Literal["as_is", "chat", "transcript"]
    ) -> tuple[list[PreferenceRecord], list[PreferenceRecord]]:
        """(training, held-out) records."""
        checks.amount(self.held_out, "pairs")
        checks.division(self, "pairs")

        train = self.read(self.data, prompt_format)
        held_out = self.read(self.eval_data, prompt_format) if self.eval_data else []
        if self.held_out:
            amount = int(self.held_out) if self.held_out >= 1 else self.held_out
            train, held_out = split_by_prompt(train, held_out=amount, seed=self.split_seed)
        return train[: self.limit], held_out

    def read(self, source: str, prompt_format: Literal["as_is", "chat", "transcript"]) -> list[PreferenceRecord]:
        """All records of `source`, read as the data are: by their split, columns and revision."""
        return load_preferences(
            source, split=self.split, prompt_format=prompt_format, columns=self.columns, revision=self.data_revision
        )


@dataclass
class LoraSettings:
    """A fresh low-rank adapter on the model that is trained.

    Args:
        r: rank.
        alpha: scale; the update is multiplied by alpha / r.
        target_modules: names of the linear layers that get it; all of them by default.
        last_layers: only on so many of the last layers, which makes training much cheaper; all by default.
    """

    r: int = 16
    alpha: int = 32
    target_modules: Sequence[str] | None = None
    last_layers: int | None = None

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha < 1:
            raise ConfigError(f"lora r is {self.r} and alpha {self.alpha}", fix="give whole numbers of at least 1")
        if self.last_layers is not None and self.last_layers < 1:
            raise ConfigError(f"lora last_layers is {self.last_layers}", fix="give at least 1, or leave it out for all layers")


def peft_config(settings: LoraSettings | None, model: Any) -> Any:
    """The PEFT configuration that `settings` ask for on `model`, or None."""
    if settings is None:
        return None
    from peft import LoraConfig

    layers, last = model.config.get_text_config().num_hidden_layers, settings.last_layers
    if last is not None and last > layers:
        raise ConfigError(f"lora last_layers is {last}, but the model has {layers} layers", fix=f"give at most {layers}")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        target_modules=list(settings.target_modules or _linear_layers(model)),
        layers_to_transform=list(range(layers - last, layers)) if last else None,
    )


def _linear_layers(model: Any) -> list[str]:
    """Last parts of the names of all linear layers but the output head, or a score head of one number."""
    head = model.get_output_embeddings()

    def adapts(module: Any) -> bool:
        linear = type(module).__name__ in ("Linear", "Conv1D")
        return linear and module is not head and getattr(module, "out_features", None) != 1

    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if adapts(module)})
