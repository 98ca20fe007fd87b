"""What a loop raises, and what only judges: a reward or an ensemble, less its uncertainty, and a gold reward beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from polyref.cli import checks
from polyref.cli.preference_source import RewardSource
from polyref.cli.sample_stages import load_reward
from polyref.errors import ConfigError

if TYPE_CHECKING:
    from polyref.rewards.protocols import Reward
    from polyref.types import PreferenceRecord


class Opened(NamedTuple):
    """What gives the training reward, and the gold one where there is one: each loaded when first asked for, and only then.

    `plain` gives the one reward before its uncertainty is subtracted, which has features if it is a model; None of an ensemble.
    """

    reward: Callable[[], Reward]
    gold: Callable[[], Reward] | None
    plain: Callable[[], Reward] | None


@dataclass(frozen=True)
class TrainingRewards:
    """The settings of rewards that `polyref iterate` and `polyref multistep` have, checked when made."""

    reward: RewardSource | None
    ensemble: list[RewardSource] | None
    pessimism: float
    bonus_data: str | None
    ridge: float
    gold: RewardSource | None

    def __post_init__(self) -> None:
        if self.reward is not None and self.ensemble is not None:
            raise ConfigError("reward and ensemble are both given", fix="give one of them")
        if self.ensemble is not None and len(self.ensemble) < 2:
            raise ConfigError("the ensemble has fewer than 2 rewards", fix="give at least 2, or name one as reward")
        checks.not_negative(self, "pessimism")
        checks.positive("ridge", self.ridge)
        if self.ensemble is None and self.pessimism and (self.by_rule or self.bonus_data is None):
            what = "pessimism needs an ensemble, or a reward model with the pairs it was fitted to"
            raise ConfigError(what, fix="give ensemble, or reward and bonus_data")
        if self.bonus_data is not None and self.ensemble is None and not self.pessimism:
            raise ConfigError("bonus_data has no effect without pessimism", fix="leave it out, or set pessimism")
        for name, source in (("reward", self.reward), ("gold", self.gold), *(("ensemble", one) for one in self.ensemble or ())):
            if source is not None and source.temperature is not None:
                raise ConfigError(f"the temperature of the {name} has no effect here", fix="leave it out; beta is the scale")
            if source is not None:
                source.check()

    @property
    def by_rule(self) -> bool:
        """Whether the one reward is a rule, which has no features."""
        return self.reward is not None and self.reward.model.startswith("rule:")

    @property
    def named(self) -> bool:
        """Whether the settings name what is raised; a function stands in for it otherwise."""
        return self.reward is not None or self.ensemble is not None

    @property
    def told(self) -> str:
        """What is raised, as summaries and pages call it."""
        if self.ensemble is not None:
            return f"an ensemble of {', '.join(one.model for one in self.ensemble)}"
        return self.reward.model if self.reward is not None else "a function"

    def load(self, fitted: Sequence[PreferenceRecord], plain: Reward | None = None) -> Reward:
        """The one reward or the mean of the ensemble, less `pessimism` times its uncertainty beside the pairs `fitted`.

        `plain` is the one reward where it is loaded already.
        """
        from polyref.rewards.ensemble import RewardEnsemble
        from polyref.rewards.pessimism import pessimistic
        from polyref.rewards.uncertainty import FeatureUncertainty

        prompts = [one.prompt for one in fitted]
        if self.ensemble is not None:
            ensemble = RewardEnsemble(tuple(map(load_reward, self.ensemble)))
            ensemble = ensemble.centred_on(prompts, [one.chosen for one in fitted]) if fitted else ensemble
            return pessimistic(ensemble, self.pessimism) if self.pessimism else ensemble
        reward: Any = self._plain() if plain is None else plain
        if not self.pessimism:
            return cast("Reward", reward)
        chosen, rejected = [one.chosen for one in fitted], [one.rejected for one in fitted]
        return pessimistic(FeatureUncertainty.fit(reward, prompts, chosen, rejected, ridge=self.ridge), self.pessimism)

    def _plain(self) -> Reward:
        assert self.reward is not None
        return load_reward(self.reward)

    def open(self, fitted: Callable[[], Sequence[PreferenceRecord]], reward: Reward | None, gold: Reward | None) -> Opened:
        """What gives the training reward and the gold one. ConfigError for no training reward, or for two of either.

        `reward` and `gold` stand in for those that are not named; `fitted` gives the pairs of bonus_data. ConfigError too for
        pessimism of a function without features.
        """
        for name, by_name, given in (("reward", self.named, reward), ("gold", self.gold is not None, gold)):
            if by_name and given is not None:
                raise ConfigError(f"{name} is given twice, by name and as a function", fix="give one of them")
        if not self.named and reward is None:
            raise ConfigError("no reward is given", fix="name a reward model or a rule as reward.model")
        if self.pessimism and reward is not None and not hasattr(reward, "features"):
            fix = "give one with features, or one that is pessimistic already, and leave pessimism out"
            raise ConfigError(f"pessimism is {self.pessimism:g}, and the reward is a function without features", fix=fix)
        plain = cache(lambda: self._plain() if reward is None else reward)
        raised = cache(lambda: self.load(fitted(), plain() if self.ensemble is None else None))

        @cache
        def judge() -> Reward:
            if gold is not None:
                return gold
            assert self.gold is not None
            return load_reward(self.gold)

        judged = self.gold is not None or gold is not None
        return Opened(raised, judge if judged else None, plain if self.ensemble is None else None)

    def inputs(self, fitted: Sequence[PreferenceRecord], given: Mapping[str, Any]) -> dict[str, str]:
        """What rewards depend on, by the words that a refusal uses for it; `given` are functions, None where there is none."""
        from polyref.data.records import record_to_row
        from polyref.stages import content_digest

        named = {"reward": self.reward, "gold reward": self.gold}
        named |= {f"reward {number} of the ensemble": one for number, one in enumerate(self.ensemble or (), 1)}
        inputs = {f"weights of the {name}": source.fingerprint for name, source in named.items() if source is not None}
        if fitted:
            inputs["pairs of bonus_data"] = content_digest([record_to_row(record) for record in fitted])
        functions = {name: function for name, function in given.items() if function is not None}
        return inputs | {name: f"{one.name} {getattr(one, 'fingerprint', None)}" for name, one in functions.items()}
