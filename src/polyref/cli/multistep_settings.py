"""The settings of `polyref multistep`, checked when made."""

from __future__ import annotations

from dataclasses import dataclass

from polyref.cli import checks
from polyref.cli.loop_settings import anchor_or_start
from polyref.cli.preference_source import RewardSource
from polyref.cli.settings import LoraSettings
from polyref.cli.training_rewards import TrainingRewards
from polyref.errors import ConfigError
from polyref.references.reference_set import ReferenceSet
from polyref.samplers.composed import METHODS
from polyref.samplers.pairing import PAIRINGS
from polyref.scoring.models import ModelSource

DEFAULT_STEPS = 3
LABELS = ("soft", "hard")
_PAIRINGS = tuple(name for name in PAIRINGS if name != "uncertain")  # one reward has no standard deviation


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
        checks.named(self.output_dir)
        checks.one_of("method", self.method, ("auto", *METHODS))
        if self.method != "auto" and (drawn := METHODS[self.method][0]) != self.anchor.composition:
            composed = self.anchor.composition
            what = f"method {self.method} draws from a composition that is {drawn}, and the references' is {composed}"
            raise ConfigError(what, fix="take method auto, or one of the references' composition")
        checks.one_of("pairing", self.pairing, _PAIRINGS)
        checks.one_of("labels", self.labels, LABELS)
        checks.counts(self, "steps", "most_steps", "proposals", "budget", "max_new_tokens", "pairs", "eval_completions")
        checks.counts(self, "batch_size", "prompts_at_once")
        if not 2 <= self.keep <= self.proposals:
            raise ConfigError(
                f"keep is {self.keep} of {self.proposals} proposals", fix="keep at least 2, for a pair, and at most all"
            )
        self._check_schedule()
        checks.not_negative(self, "min_margin", "tie_within")
        if self.tie_within and self.labels == "soft":
            raise ConfigError("tie_within has no effect on soft labels", fix="leave it out, or set labels to hard")
        _ = self.rewards  # refuses what cannot be

    def _check_schedule(self) -> None:
        checks.positive("beta", self.beta)
        if self.acceptance is not None and self.steps is not None:
            raise ConfigError("steps and acceptance are both given", fix="give one of them")
        if self.acceptance is not None and not 0 < self.acceptance < 1:
            raise ConfigError(f"acceptance is {self.acceptance:g}", fix="give a share between 0 and 1, such as 0.2")
        checks.finite_bound(self.r_max)
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
