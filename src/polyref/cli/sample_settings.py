"""The settings of `polyref sample`, checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from polyref.cli import checks
from polyref.cli.preference_source import RewardSource
from polyref.data.write import WRITTEN_KINDS, check_written
from polyref.errors import ConfigError
from polyref.references.reference_set import ReferenceSet
from polyref.samplers.composed import METHODS
from polyref.samplers.engine import SamplingParameters
from polyref.samplers.pairing import PAIRINGS
from polyref.samplers.sampled import TILTS, Drawing, Tilt

if TYPE_CHECKING:
    from polyref.data.prompt_rows import PromptRow

MAY_CHANGE = ("leave_out", "pairing", "pairs", "min_margin", "tie_within")
"""What changes nothing that is drawn: pairs may be made again, otherwise, of the same samples."""

_TAKEN = ("metrics.jsonl",)
_EACH = 8  # completions drawn for each one that a tilt may keep
_PAIRINGS = tuple(name for name in PAIRINGS if name != "uncertain")  # one reward has no standard deviation


@dataclass
class PromptSettings:
    """Where prompts come from.

    Args:
        data: hub id, folder saved by datasets, .jsonl, .jsonl.gz, .json or .parquet file: preference pairs, or prompts alone.
        split: split of a hub id or saved folder.
        columns: other column names, as in {prompt: question}.
        limit: use only so many distinct prompts, the first ones.
        data_revision: revision of a hub data set.
        prompt_format: as_is, chat (strings become one user turn), or transcript (Human/Assistant turns).
    """

    data: str
    split: str = "train"
    columns: dict[str, str] | None = None
    limit: int | None = None
    data_revision: str | None = None
    prompt_format: Literal["as_is", "chat", "transcript"] = "as_is"

    def load(self) -> list[PromptRow]:
        """The distinct prompts."""
        from polyref.data.prompt_rows import load_prompts

        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}", fix="give a number of prompts of at least 1, or leave it out")
        settings = {"split": self.split, "prompt_format": self.prompt_format, "columns": self.columns, "limit": self.limit}
        return load_prompts(self.data, **settings, revision=self.data_revision)  # type: ignore[arg-type]


@dataclass
class SampleSettings:
    """What is drawn, by what, and where it goes.

    Args:
        output_dir: the run folder.
        references: what is drawn from: one model, or the composition of several.
        method: auto, mixture (arithmetic), rejection, tokens or smc (geometric).
        n: samples of each prompt.
        max_new_tokens: longest completion; one that has not ended by then is cut there.
        temperature: of a model drawn from alone; a composition is of its members' own laws.
        top_p: likewise, the likeliest mass that is drawn from.
        reward: scores the completions.
        beta: tilts what is drawn by exp(reward/beta); without it, completions are scored only.
        tilt: keep by rejection, or keep all with importance weights; forward keeps all of a mixture, weighted for forward KL.
        r_max: a known upper bound of the reward, which makes rejection exact; by default the largest reward seen.
        proposals: completions of each prompt drawn for the tilt; by default 8 n.
        budget: the most completion tokens through models a prompt may take; by default 100 proposals for each completion.
        pairing: also write preference pairs: best_worst, best_random, best_second, random or closest.
        pairs: pairs of each prompt.
        min_margin: least difference of the rewards of a pair.
        tie_within: a difference of rewards up to which a pair is a tie, a soft label of 0.5.
        batch_size: completions drawn at once.
        prompts_at_once: prompts between two points from which a killed run goes on.
        leave_out: do without prompts that are too long, or that get no sample, instead of stopping.
        seed: of all that is drawn.
        file_name: the file of samples in the run folder: .jsonl, .jsonl.gz or .parquet.
    """

    output_dir: str
    references: ReferenceSet
    method: str = "auto"
    n: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    reward: RewardSource | None = None
    beta: float | None = None
    tilt: str = "rejection"
    r_max: float | None = None
    proposals: int | None = None
    budget: int | None = None
    pairing: str | None = None
    pairs: int = 1
    min_margin: float = 0.0
    tie_within: float = 0.0
    batch_size: int = 32
    prompts_at_once: int = 32
    leave_out: bool = False
    seed: int = 0
    file_name: str = "samples.jsonl"

    def __post_init__(self) -> None:
        checks.named(self.output_dir)
        checks.one_of("method", self.method, ("auto", *METHODS))
        checks.one_of("tilt", self.tilt, TILTS)
        if self.pairing is not None:
            checks.one_of("pairing", self.pairing, _PAIRINGS)
        check_written(self.file_name)
        checks.own_file(self.file_name, (*_TAKEN, self.prompts_name, self.pairs_name))
        checks.counts(self, "n", "proposals", "budget", "pairs", "batch_size", "prompts_at_once")
        checks.whole("seed", self.seed)
        self._check_tilt()
        self.drawing  # noqa: B018  checked when made

    def _check_tilt(self) -> None:
        if self.reward is None and (self.beta is not None or self.pairing is not None):
            name = "beta" if self.beta is not None else "pairing"
            raise ConfigError(f"{name} is given and no reward", fix="give a reward, or leave it out")
        if self.reward is not None and self.reward.temperature is not None:
            raise ConfigError("the reward's temperature has no effect here", fix="leave it out; beta is the scale of rewards")
        if self.reward is not None:
            self.reward.check()
        given = [name for name in ("r_max", "proposals") if getattr(self, name) is not None]
        if self.beta is None and given:
            raise ConfigError(f"{given[0]} has no effect without beta", fix="give beta, or leave it out")
        if self.beta is not None:
            checks.positive("beta", self.beta)
        checks.finite_bound(self.r_max)
        if self.r_max is not None and self.tilt != "rejection":
            raise ConfigError(f"r_max has no effect on tilt {self.tilt}", fix="leave it out")
        if self.tilt == "forward":
            self._check_forward()
        if self.proposals is not None and self.proposals < self.n:
            what = f"{self.proposals} proposals cannot give {self.n} samples"
            raise ConfigError(what, fix="raise proposals, or lower n")
        checks.not_negative(self, "min_margin", "tie_within")

    def _check_forward(self) -> None:
        if self.beta is None:
            raise ConfigError("tilt forward is given and no beta", fix="give a reward and beta, the strength of forward KL")
        if len(self.references) > 1 and self.references.composition != "arithmetic":
            what = "tilt forward weighs draws of the mixture, and the composition of the references is geometric"
            raise ConfigError(what, fix="set composition to arithmetic, or take another tilt")
        if self.method not in ("auto", "mixture"):
            raise ConfigError(
                f"tilt forward weighs draws of the mixture, and method is {self.method}", fix="use auto or mixture"
            )

    @property
    def drawing(self) -> Drawing:
        """How completions are drawn and tilted."""
        parameters = SamplingParameters(self.max_new_tokens, self.temperature, self.top_p)
        tilt = None if self.beta is None else Tilt(self.beta, self.r_max, self.tilt)
        draws = self.n if tilt is None else self.proposals or _EACH * self.n
        return Drawing(self.n, draws, parameters, self.method, self.budget, self.batch_size, self.seed, tilt)

    @property
    def pairs_made(self) -> str:
        """What the pairs depend on beyond the samples."""
        return f"{self.pairing}, {self.pairs}, {self.min_margin}, {self.tie_within}"

    @property
    def prompts_name(self) -> str:
        """The file of diagnostics, a row a prompt."""
        return "prompts" + self._kind

    @property
    def pairs_name(self) -> str:
        """The file of preference pairs."""
        return "pairs" + self._kind

    @property
    def _kind(self) -> str:
        return next(kind for kind in WRITTEN_KINDS if self.file_name.endswith(kind))
