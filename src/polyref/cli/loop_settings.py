"""What the settings of `polyref multistep` and `polyref iterate` share: where prompts come from, and what they are held to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from polyref.cli import checks
from polyref.errors import ConfigError
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.scoring.models import ModelSource

if TYPE_CHECKING:
    from polyref.data.prompt_rows import PromptRow
    from polyref.types import PreferenceRecord


@dataclass
class LoopPrompts:
    """Where prompts come from.

    Args:
        data: hub id, folder saved by datasets, .jsonl, .jsonl.gz, .json or .parquet file: preference pairs, or prompts alone.
        eval_data: prompts to evaluate on, in the same forms. Without it, held_out takes them from data.
        split: split of a hub id or saved folder.
        columns: other column names, as in {prompt: question}.
        limit: use only so many distinct prompts, the first ones after held_out was taken.
        held_out: prompts (or a share below 1) kept for evaluation; with none, evaluation is on the prompts trained on.
        split_seed: which prompts held_out takes; apart from the training seed.
        data_revision: revision of a hub data set.
        prompt_format: as_is, chat (strings become one user turn), or transcript (Human/Assistant turns).
    """

    data: str
    eval_data: str | None = None
    split: str = "train"
    columns: dict[str, str] | None = None
    limit: int | None = None
    held_out: float = 0.0
    split_seed: int = 0
    data_revision: str | None = None
    prompt_format: Literal["as_is", "chat", "transcript"] = "as_is"

    def load(self) -> tuple[list[PromptRow], list[PromptRow]]:
        """(training, held-out) prompts, both distinct, no text on both sides unless eval_data puts it there."""
        from polyref.data.prompt_rows import load_prompts
        from polyref.data.sources import prompt_key

        checks.amount(self.held_out, "prompts")
        checks.division(self, "prompts")
        checks.whole("split_seed", self.split_seed)
        settings = {"split": self.split, "prompt_format": self.prompt_format, "columns": self.columns}
        some, held_out = (
            load_prompts(source, **settings, revision=self.data_revision) if source else []  # type: ignore[arg-type]
            for source in (self.data, self.eval_data)
        )
        if self.held_out:
            taken = self._taken([prompt_key(row.prompt) for row in some])
            held_out = [row for row in some if prompt_key(row.prompt) in taken]
            some = [row for row in some if prompt_key(row.prompt) not in taken]
        return some[: self.limit], held_out

    def pairs(self, data: str | None) -> list[PreferenceRecord]:
        """The pairs of `data`, read as the prompts are; none of None."""
        from polyref.data.sources import load_preferences

        return [] if data is None else load_preferences(data, prompt_format=self.prompt_format, columns=self.columns)

    def _taken(self, keys: list[str]) -> set[str]:
        import numpy as np

        texts = list(dict.fromkeys(keys))
        amount = int(self.held_out) if self.held_out >= 1 else max(1, round(self.held_out * len(texts)))
        if amount >= len(texts):
            raise ConfigError(f"held_out takes {amount} of {len(texts)} prompts", fix="leave at least one to train on")
        chosen = np.random.default_rng(self.split_seed).permutation(len(texts))[:amount]
        return {texts[i] for i in chosen}


def anchor_or_start(references: ReferenceSet | None, source: ModelSource) -> ReferenceSet:
    """`references`, or the policy at `source` as the only one."""
    if references is not None:
        return references
    return ReferenceSet((Reference(**asdict(source), name="the starting policy"),))
