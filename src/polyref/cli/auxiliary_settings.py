"""The settings of `polyref auxiliary`, checked when made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from polyref.cli import checks
from polyref.cli.auxiliary_stages import Drawing
from polyref.cli.preference_source import JUDGE_BUDGET
from polyref.data.write import WRITTEN_KINDS, check_written
from polyref.errors import ConfigError
from polyref.references.reference_set import ReferenceSet
from polyref.samplers.engine import SamplingParameters

MAY_CHANGE = ("leave_out", *JUDGE_BUDGET)
"""What changes no pair that was judged."""

_TAKEN = ("metrics.jsonl", "judge.jsonl")
_OF_DRAWING = ("member_per", "max_new_tokens", "temperature", "top_p", "redraws", "batch_size", "leave_out")


@dataclass
class AuxiliarySettings:
    """What is drawn beside the data, how, and where it goes.

    Args:
        output_dir: the run folder.
        sampling_policy: what the completions of the data were drawn from; several members are a mixture of them.
        member_per: with several members, whether each completion of the data has one of its own, or both of a pair have one.
        pairs: auxiliary pairs of each data pair.
        max_new_tokens: longest completion; one that has not ended by then is cut there.
        temperature: that the data were drawn with.
        top_p: that the data were drawn with.
        redraws: how often a pair of equal completions is drawn again.
        batch_size: completions drawn at once.
        prompts_at_once: prompts drawn or judged between two points from which a killed run goes on.
        leave_out: do without pairs whose prompt is too long, or on which a judge gives no verdict, instead of stopping.
        prompt_format: as_is, chat (strings become one user and one assistant turn), or transcript (Human/Assistant turns).
        seed: of all that is drawn, the folds, and the fits.
        file_name: the file in the run folder: .jsonl, .jsonl.gz or .parquet.
    """

    output_dir: str
    sampling_policy: ReferenceSet | None = None
    member_per: Literal["completion", "pair"] = "completion"
    pairs: int = 4
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    redraws: int = 20
    batch_size: int = 32
    prompts_at_once: int = 32
    leave_out: bool = False
    prompt_format: Literal["as_is", "chat", "transcript"] = "as_is"
    seed: int = 0
    file_name: str = "pairs.jsonl"

    def __post_init__(self) -> None:
        checks.named(self.output_dir)
        check_written(self.file_name)
        checks.own_file(self.file_name, (*_TAKEN, self.held_out_name))
        checks.counts(self, "pairs", "batch_size", "prompts_at_once")
        if self.redraws < 0:
            raise ConfigError(f"redraws is {self.redraws}", fix="give at least 0")
        checks.whole("seed", self.seed)
        self.parameters  # noqa: B018  checked when made

    @property
    def parameters(self) -> SamplingParameters:
        """How completions are drawn."""
        return SamplingParameters(self.max_new_tokens, self.temperature, self.top_p)

    @property
    def of_drawing(self) -> list[str]:
        """Settings that are not the usual ones and have no effect where nothing is drawn."""
        usual = {field.name: field.default for field in fields(self)}
        return [name for name in _OF_DRAWING if getattr(self, name) != usual[name]]

    @property
    def held_out_name(self) -> str:
        """The file of held-out pairs, beside the other."""
        return "held_out" + next(kind for kind in WRITTEN_KINDS if self.file_name.endswith(kind))

    def drawing(self, policy: ReferenceSet) -> Drawing:
        """How auxiliary pairs are drawn from `policy`."""
        per_pair, counts = self.member_per == "pair", (self.redraws, self.batch_size, self.prompts_at_once, self.seed)
        return Drawing(policy, per_pair, self.pairs, self.parameters, *counts)
