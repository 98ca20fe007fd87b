"""The settings of `polyref multistep`, checked when made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from polyref.cli.preference_source import RewardSource
from polyref.cli.settings import LoraSettings
from polyref.cli.training_rewards import TrainingRewards
from polyref.errors import ConfigError
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.samplers.composed import METHODS
from polyref.samplers.pairing import PAIRINGS
from polyref.scoring.models import ModelSource

if TYPE_CHECKING:
    from polyref.data.prompt_rows import PromptRow
    from polyref.types import PreferenceRecord

DEFAULT_STEPS = 3
LABELS = ("soft", "hard")
_PAIRINGS = tuple(name for name in PAIRINGS if name != "uncertain")  # one reward has no standard deviation


@dataclass
class MultistepPrompts:
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

        if not self.held_out >= 0 or (self.held_out > 1 and self.held_out % 1):
            raise ConfigError(f"held_out is {self.held_out:g}", fix="give a number of prompts, or a share below 1")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}", fix="give a number of prompts of at least 1, or leave it out")
        if self.split_seed < 0:
            raise ConfigError(f"split_seed is {self.split_seed}", fix="give a whole number from 0")
        if self.eval_data is not None and self.held_out:
            raise ConfigError("eval_data and held_out are both given", fix="give one of them")
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


@dataclass
class MultistepSettings:
    """The policy, the reward, and the steps towards the tilt of the references by it.

    Args:
        output_dir: the run folder.
        model: hub id or folder of the policy to start from.
        gguf_file: a GGUF file inside model, dequantised on loading.
        dtype: of the policy's weights.
        revision: revision of a hub model.
        trust_remote_code: run code that comes with the model.
        lora: train a low-rank adapter, the same one at every step, instead of all weights.
        merge_adapter: write the trained adapter merged into the weights.
        references: what step 1 draws from, and what every step stays close to; the model itself when left out.
        reward: what is to be raised, in units that beta divides.
        ensemble: several rewards instead, whose mean counts.
        pessimism: subtract so many standard deviations of the ensemble, or of the feature uncertainty of the one reward.
        bonus_data: pairs that the reward was fitted to, for its feature uncertainty; an ensemble is centred on them.
        ridge: of the feature covariance.
        gold: a second reward that only judges.
        beta: KL strength at the last step.
        steps: how many, equal in 1/beta; 1 is RSO. By default 3, unless acceptance is given.
        acceptance: adapt the steps instead, so that this share of proposals is accepted.
        most_steps: with acceptance, stop after so many steps even if beta is not reached.
        proposals: completions of each prompt drawn at each step.
        keep: completions of each prompt kept, at most.
        method: how step 1 draws from the references, auto, mixture (arithmetic), rejection, tokens or smc (geometric).
        budget: the most completion tokens through references a prompt may take at step 1; by default 100 proposals for each
            completion.
        max_new_tokens: longest completion; one that has not ended by then is cut there.
        r_max: a known upper bound of the reward, which makes acceptance exact; by default the largest reward seen of a prompt.
        correct: from step 2 on, weigh proposals by what they should have been drawn from, so that errors of fits do not add up.
        pairing: best_worst, best_random, best_second, random or closest.
        pairs: pairs of each prompt at each step.
        labels: soft, the Bradley-Terry probability of the reward difference; or hard.
        min_margin: least difference of the rewards of a pair.
        tie_within: with hard labels, a difference of rewards up to which a pair is a tie, a soft label of 0.5.
        eval_completions: completions of each prompt that the start and every step are judged by.
        batch_size: completions drawn at once.
        prompts_at_once: prompts between two points from which a killed run goes on.
    """

    output_dir: str
    model: str
    gguf_file: str | None = None
    dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    lora: LoraSettings | None = None
    merge_adapter: bool = False
    references: ReferenceSet | None = None
    reward: RewardSource | None = None
    ensemble: list[RewardSource] | None = None
    pessimism: float = 0.0
    bonus_data: str | None = None
    ridge: float = 1.0
    gold: RewardSource | None = None
    beta: float = 0.1
    steps: int | None = None
    acceptance: float | None = None
    most_steps: int = 20
    proposals: int = 16
    keep: int = 8
    method: str = "auto"
    budget: int | None = None
    max_new_tokens: int = 256
    r_max: float | None = None
    correct: bool = False
    pairing: str = "random"
    pairs: int = 4
    labels: str = "soft"
    min_margin: float = 0.0
    tie_within: float = 0.0
    eval_completions: int = 4
    batch_size: int = 32
    prompts_at_once: int = 32

    def __post_init__(self) -> None:
        if not self.output_dir.strip():
            raise ConfigError("output_dir is empty", fix="name the run folder")
        one_of("method", self.method, ("auto", *METHODS))
        if self.method != "auto" and (drawn := METHODS[self.method][0]) != self.anchor.composition:
            composed = self.anchor.composition
            what = f"method {self.method} draws from a composition that is {drawn}, and the references' is {composed}"
            raise ConfigError(what, fix="take method auto, or one of the references' composition")
        one_of("pairing", self.pairing, _PAIRINGS)
        one_of("labels", self.labels, LABELS)
        counts = ("steps", "most_steps", "proposals", "budget", "max_new_tokens", "pairs", "eval_completions", "batch_size")
        for name in (*counts, "prompts_at_once"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix="give at least 1")
        if not 2 <= self.keep <= self.proposals:
            raise ConfigError(
                f"keep is {self.keep} of {self.proposals} proposals", fix="keep at least 2, for a pair, and at most all"
            )
        self._check_schedule()
        for name in ("min_margin", "tie_within"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix="give a finite number of at least 0")
        if self.tie_within and self.labels == "soft":
            raise ConfigError("tie_within has no effect on soft labels", fix="leave it out, or set labels to hard")
        _ = self.rewards  # refuses what cannot be

    def _check_schedule(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"beta is {self.beta:g}", fix="give a finite number above 0")
        if self.acceptance is not None and self.steps is not None:
            raise ConfigError("steps and acceptance are both given", fix="give one of them")
        if self.acceptance is not None and not 0 < self.acceptance < 1:
            raise ConfigError(f"acceptance is {self.acceptance:g}", fix="give a share between 0 and 1, such as 0.2")
        if self.r_max is not None and not math.isfinite(self.r_max):
            raise ConfigError(f"r_max is {self.r_max}", fix="give a finite upper bound of the reward, or none")
        if self.correct and self.equal_steps == 1:
            raise ConfigError("correct has no effect on one step", fix="leave it out, or take more steps")

    @property
    def equal_steps(self) -> int | None:
        """How many steps, None where they are adapted."""
        return None if self.acceptance is not None else self.steps or DEFAULT_STEPS

    @property
    def source(self) -> ModelSource:
        """Where the policy's weights come from."""
        return ModelSource(self.model, self.gguf_file, self.dtype, self.revision, self.trust_remote_code)

    @property
    def rewards(self) -> TrainingRewards:
        """What is raised, and what judges."""
        return TrainingRewards(self.reward, self.ensemble, self.pessimism, self.bonus_data, self.ridge, self.gold)

    @property
    def anchor(self) -> ReferenceSet:
        """The references; the starting policy where none are given."""
        return anchor_or_start(self.references, self.source)


def anchor_or_start(references: ReferenceSet | None, source: ModelSource) -> ReferenceSet:
    """`references`, or the policy at `source` as the only one."""
    if references is not None:
        return references
    return ReferenceSet((Reference(**asdict(source), name="the starting policy"),))


def one_of(name: str, given: str, choices: tuple[str, ...]) -> None:
    """ConfigError for a setting that is none of its choices."""
    if given not in choices:
        raise ConfigError(f"unknown {name} {given!r}", fix=f"use one of {', '.join(choices)}")
