"""The settings of `polyref iterate`, checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polyref.cli import checks
from polyref.cli.loop_settings import anchor_or_start
from polyref.cli.preference_source import PreferenceSource, RewardSource
from polyref.cli.settings import LoraSettings
from polyref.cli.training_rewards import TrainingRewards
from polyref.errors import ConfigError
from polyref.loops.agents import Agent, check_agent
from polyref.loops.anchors import Anchor
from polyref.loops.rails import Limits
from polyref.loops.replay import Replay
from polyref.references.reference_set import ReferenceSet
from polyref.samplers.engine import SamplingParameters
from polyref.samplers.pairing import PAIRINGS
from polyref.scoring.models import ModelSource

LABELS = ("soft", "hard", "model", "human")
_PAIRINGS = (*(name for name in PAIRINGS if name != "uncertain"), "farthest")


@dataclass
class EnhancerSettings:
    """Who else draws in a round. Pairs are then of one completion of the main agent's and one of the enhancer's.

    Args:
        who: policy (the same one, drawn otherwise), start, earlier, references (their composition), or the name of one.
        back: with earlier, so many rounds ago; at most the start.
        completions: how many of each prompt.
        temperature: of its draws.
        top_p: of its draws.
        system_prompt: under which a policy draws.
        stays: all of a prompt's completions, the best or the worst of them by the reward.
    """

    who: str = "policy"
    back: int = 1
    completions: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    system_prompt: str | None = None
    stays: str = "all"

    def agent(self, max_new_tokens: int) -> Agent:
        """The agent that the loop knows."""
        parameters = SamplingParameters(max_new_tokens, self.temperature, self.top_p)
        return Agent(self.who, self.completions, parameters, self.system_prompt, self.back, self.stays)


@dataclass
class IterateSettings:
    """The policy, the rewards, and the rounds of drawing, labelling and training.

    Args:
        output_dir: the run folder.
        model: hub id or folder of the policy to start from.
        gguf_file: a GGUF file inside model, dequantised on loading.
        dtype: of the policy's weights.
        revision: revision of a hub model.
        trust_remote_code: run code that comes with the model.
        lora: train a low-rank adapter, the same one in every round, instead of all weights.
        merge_adapter: write the trained adapter merged into the weights.
        references: what every round is held to; the model itself when left out.
        anchor: references (the original ones), previous (the policy of the round before), or average (a moving one of weights).
        anchor_decay: what a moving average keeps of itself at each round.
        reward: what is to be raised: chooses pairs, and labels them unless label says otherwise.
        ensemble: several rewards instead, whose mean counts.
        pessimism: subtract so many standard deviations of the ensemble, or of the feature uncertainty of the one reward.
        bonus_data: pairs that the reward was fitted to, for its feature uncertainty; an ensemble is centred on them.
        ridge: of the feature covariance, for pessimism of one reward and for the pairing farthest.
        gold: a second reward that only judges.
        beta: KL strength of every training.
        rounds: how many.
        prompts_per_round: fresh prompts of each round, none of them twice; by default all of them every round.
        completions: of each prompt, by the main agent: the policy as it stands.
        temperature: of the main agent.
        top_p: of the main agent.
        system_prompt: under which the main agent draws.
        stays: with an enhancer, all, the best or the worst of the main agent's completions by the reward.
        enhancer: who else draws; none for pairs among the main agent's own.
        max_new_tokens: longest completion; one that has not ended by then is cut there.
        pairing: best_worst, best_random, best_second, random, closest, or farthest (in the features of the reward).
        pairs: pairs of each prompt in a round.
        label: soft or hard by the reward, model by labeller, or human.
        labeller: the preference model of label model.
        label_how: people vote on a page or in a file.
        annotator: the name that votes are kept under.
        question: what people are asked about two completions.
        port: of the page to vote on; by default any that is free.
        min_margin: least difference of the rewards of a pair.
        tie_within: with hard labels, a difference of rewards up to which a pair is a tie, a soft label of 0.5.
        offline_data: pairs that every round is trained on too, in the forms of data.
        offline_share: the share of offline pairs in a round's training, drawn anew each round; by default all there are.
        replay: how many rounds before its own a round is trained on again; all by default.
        from_start: train every round from the starting model, not from the policy of the round before.
        kl_budget: end before a policy whose mean KL to the anchor is above so many nats.
        patience: end once gold is down and the reward up, beyond intervals, for so many rounds on end; none turns it off.
        length_drift: end before a policy whose mean length is so many times the start's, or less than one part in so many.
        eval_completions: completions of each prompt that the start and every round are judged by.
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
    anchor: str = "references"
    anchor_decay: float = 0.9
    reward: RewardSource | None = None
    ensemble: list[RewardSource] | None = None
    pessimism: float = 0.0
    bonus_data: str | None = None
    ridge: float = 1.0
    gold: RewardSource | None = None
    beta: float = 0.1
    rounds: int = 3
    prompts_per_round: int | None = None
    completions: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    system_prompt: str | None = None
    stays: str = "all"
    enhancer: EnhancerSettings | None = None
    max_new_tokens: int = 256
    pairing: str = "best_worst"
    pairs: int = 1
    label: str = "soft"
    labeller: PreferenceSource | None = None
    label_how: Literal["page", "file"] = "page"
    annotator: str = ""
    question: str = "Which completion is better?"
    port: int = 0
    min_margin: float = 0.0
    tie_within: float = 0.0
    offline_data: str | None = None
    offline_share: float | None = None
    replay: int | None = None
    from_start: bool = False
    kl_budget: float | None = None
    patience: int | None = 2
    length_drift: float | None = None
    eval_completions: int = 4
    batch_size: int = 32
    prompts_at_once: int = 32

    def __post_init__(self) -> None:
        checks.named(self.output_dir)
        checks.positive("beta", self.beta)
        checks.counts(self, "rounds", "prompts_per_round", "completions", "max_new_tokens", "pairs", "eval_completions")
        checks.counts(self, "batch_size", "prompts_at_once")
        checks.not_negative(self, "min_margin", "tie_within")
        checks.one_of("pairing", self.pairing, _PAIRINGS)
        self._check_agents()
        self._check_labels()
        rewards = self.rewards
        if self.pairing == "farthest" and (rewards.by_rule or self.ensemble is not None):
            raise ConfigError("pairing farthest needs the features of one reward model", fix="name one as reward.model")
        if self.offline_share is not None and self.offline_data is None:
            raise ConfigError("offline_share has no effect without offline_data", fix="leave it out, or give offline_data")
        _ = self.moving, self.limits, self.replayed  # each refuses what cannot be

    def _check_agents(self) -> None:
        main, other = self.main, self.enhancer_agent
        if other is None:
            if self.stays != "all":
                raise ConfigError(f"stays is {self.stays} without an enhancer", fix="leave it out, or give an enhancer")
            if main.n < 2:
                raise ConfigError(
                    "completions is 1 without an enhancer", fix="draw at least 2, for a pair, or give an enhancer"
                )
            return
        check_agent(other, self.reference_set, "enhancer.who")
        if (most := main.staying * other.staying) < self.pairs:
            what = f"pairs is {self.pairs} of {main.staying} completions against {other.staying} of the enhancer"
            raise ConfigError(what, fix=f"ask for at most {most}, or draw more")

    def _check_labels(self) -> None:
        from polyref.labelling.votes import check_annotator

        checks.one_of("label", self.label, LABELS)
        check_annotator(self.annotator)
        if (self.labeller is not None) and self.label != "model":
            raise ConfigError(f"labeller has no effect on label {self.label}", fix="leave it out, or set label to model")
        if self.labeller is not None and self.labeller.kind in ("cross_encoder", "votes"):
            what = f"a labeller by {self.labeller.kind} does not know completions that are yet to be drawn"
            raise ConfigError(what, fix="give a reward, an ensemble or a judge")
        if self.tie_within and self.label != "hard":
            raise ConfigError(f"tie_within has no effect on label {self.label}", fix="leave it out, or set label to hard")

    @property
    def source(self) -> ModelSource:
        """Where the policy's weights come from."""
        return ModelSource(self.model, self.gguf_file, self.dtype, self.revision, self.trust_remote_code)

    @property
    def rewards(self) -> TrainingRewards:
        """What is raised, and what judges."""
        return TrainingRewards(self.reward, self.ensemble, self.pessimism, self.bonus_data, self.ridge, self.gold)

    @property
    def reference_set(self) -> ReferenceSet:
        """The references; the starting policy where none are given."""
        return anchor_or_start(self.references, self.source)

    @property
    def main(self) -> Agent:
        """The main agent."""
        parameters = SamplingParameters(self.max_new_tokens, self.temperature, self.top_p)
        return Agent("policy", self.completions, parameters, self.system_prompt, 1, self.stays)

    @property
    def enhancer_agent(self) -> Agent | None:
        """The enhancer, if there is one."""
        return None if self.enhancer is None else self.enhancer.agent(self.max_new_tokens)

    @property
    def moving(self) -> Anchor:
        """What the KL of each round is taken to."""
        return Anchor(self.anchor, self.anchor_decay)

    @property
    def limits(self) -> Limits:
        """When the loop ends early."""
        return Limits(self.kl_budget, self.patience, self.length_drift)

    @property
    def replayed(self) -> Replay:
        """What a round trains on besides its own pairs."""
        return Replay(self.replay, self.offline_share)
