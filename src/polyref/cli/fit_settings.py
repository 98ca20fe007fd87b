"""The settings of `polyref fit`: the policy to train, and the samples it is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from polyref.cli import checks
from polyref.cli.settings import LoraSettings
from polyref.scoring.models import ModelSource

if TYPE_CHECKING:
    from polyref.data.samples import SampleRecord


@dataclass
class FitSettings:
    """The policy to train.

    Args:
        model: hub id or folder of the policy.
        gguf_file: a GGUF file inside model, dequantised on loading.
        dtype: of the policy's weights.
        revision: revision of a hub model.
        trust_remote_code: run code that comes with the model.
        lora: train a low-rank adapter instead of all weights.
        merge_adapter: write the trained adapter merged into the weights.
    """

    model: str
    gguf_file: str | None = None
    dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    lora: LoraSettings | None = None
    merge_adapter: bool = False

    @property
    def source(self) -> ModelSource:
        """Where its weights come from."""
        return ModelSource(self.model, self.gguf_file, self.dtype, self.revision, self.trust_remote_code)


@dataclass
class SamplesSettings:
    """Where samples come from.

    Args:
        data: a file of samples (.jsonl, .jsonl.gz, .json or .parquet), as polyref sample writes it, a folder or a hub id.
        eval_data: held-out samples, in the same forms. Without it, held_out takes them from data.
        split: split of a hub id or saved folder.
        columns: other column names, as in {completion: answer}.
        limit: use only the samples of so many prompts, the first ones after held_out was taken.
        held_out: prompts (or a share of them below 1) kept for evaluation with all their samples.
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

    def load(self, prompt_format: Literal["as_is", "chat", "transcript"]) -> tuple[list[SampleRecord], list[SampleRecord]]:
        """(training, held-out) samples."""
        from polyref.data.samples import load_samples, samples_by_prompt, split_prompts

        checks.division(self, "prompts")

        def load(source: str) -> list[SampleRecord]:
            settings = {"split": self.split, "columns": self.columns, "revision": self.data_revision}
            return load_samples(source, prompt_format=prompt_format, **settings)  # type: ignore[arg-type]

        train, held_out = load(self.data), load(self.eval_data) if self.eval_data else []
        if self.held_out:
            train, held_out = split_prompts(train, self.held_out, seed=self.split_seed)
        return [sample for some in samples_by_prompt(train)[: self.limit] for sample in some], held_out
