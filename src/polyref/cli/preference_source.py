"""Where an auxiliary preference model comes from: settings of five kinds, and g of the pairs that are asked about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyref.cli.settings import LoraSettings, peft_config
from polyref.errors import ConfigError
from polyref.rewards.judge_settings import JudgeSettings
from polyref.scoring.models import ModelSource

if TYPE_CHECKING:
    from torch import Tensor

    from polyref.rewards.cross_encoder import CrossEncoder
    from polyref.rewards.cross_fit import Comparison
    from polyref.rewards.protocols import PreferenceModel
    from polyref.types import PreferenceRecord, Text

    Ask = Callable[[Sequence[Comparison]], Tensor]

_PIECE = 256
KINDS = ("cross_encoder", "reward", "ensemble", "votes", "judge")


JUDGE_BUDGET = tuple(
    f"judge.{name}"
    for name in ("tries", "timeout", "attempts", "first_wait", "longest_wait", "concurrency", "max_requests", "max_tokens")
)
"""What may change in a run: a judge that gave up, or whose budget is spent, is asked on; what it said is kept."""


@dataclass
class CrossEncoderSettings:
    """A pairwise cross-encoder, fitted to the data in folds, each pair judged by the fit that never saw its prompt.

    Args:
        model: hub id or folder of the language model or encoder that it starts from.
        dtype: of the model's weights.
        revision: revision of a hub model.
        trust_remote_code: run code that comes with the model.
        lora: train a low-rank adapter and the score head instead of all weights.
        max_length: longest prompt + both completions in tokens; by default what the model reads, at most 1024.
        folds: how many fits; each is of the pairs of all other folds.
        epochs: passes over the pairs of a fit.
        learning_rate: highest of AdamW, after the warm-up; it falls to 0.
        batch_size: pairs a step.
    """

    model: str
    dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    lora: LoraSettings | None = None
    max_length: int | None = None
    folds: int = 5
    epochs: int = 1
    learning_rate: float = 2e-5
    batch_size: int = 16

    @property
    def source(self) -> ModelSource:
        """Where its weights come from."""
        return ModelSource(self.model, None, self.dtype, self.revision, self.trust_remote_code)


@dataclass
class RewardSource:
    """A reward whose difference, over a temperature, is the log-odds of a preference.

    Args:
        model: hub id or folder of a reward model, as `polyref reward` leaves one, or a rule:NAME.
        temperature: what differences are divided by; by default what the reward model was calibrated with, or 1.
        adapter: folder of a PEFT adapter saved with its score head, where model is its base.
        dtype: of the model's weights; by default what it was trained in, or float32.
        revision: revision of a hub model.
        trust_remote_code: run code that comes with the model.
        max_length: cut prompt + completion to so many tokens; by default as in its training, or not at all.
        batch_size: prompts scored at once.
    """

    model: str
    temperature: float | None = None
    adapter: str | None = None
    dtype: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    max_length: int | None = None
    batch_size: int = 8

    def check(self) -> None:
        """ConfigError for a temperature that is none, and for settings of a model where it is a rule."""
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ConfigError(f"the temperature of {self.model} is {self.temperature}", fix="give a number above 0")
        others = (field for field in fields(self) if field.name not in ("model", "temperature"))
        ignored = [field.name for field in others if getattr(self, field.name) != field.default]
        if self.model.startswith("rule:") and ignored:
            raise ConfigError(f"{ignored[0]} has no effect on {self.model}", fix="leave it out")

    @property
    def fingerprint(self) -> str:
        """Of weights (an adapter's base too), tokenizer and what is kept beside them, or of a rule with the data it reads."""
        from polyref.rewards.reward_model import saved_fingerprint
        from polyref.rewards.rules import rule

        if self.model.startswith("rule:"):
            return rule(self.model).fingerprint or self.model
        given = {"adapter": self.adapter, "dtype": self.dtype, "revision": self.revision}
        return saved_fingerprint(self.model, trust_remote_code=self.trust_remote_code, **given)

    def load(self) -> PreferenceModel:
        """The preference model, ready."""
        from polyref.rewards.preference_model import from_reward
        from polyref.rewards.reward_model import RewardModel
        from polyref.rewards.rules import rule

        given = {name: value for name, value in asdict(self).items() if value is not None}
        temperature = {"temperature": given.pop("temperature")} if "temperature" in given else {}
        reward = rule(self.model) if self.model.startswith("rule:") else RewardModel.load(**given)
        return from_reward(reward, **temperature)


@dataclass
class PreferenceSource:
    """Where g, the probability that the first of two completions is preferred, comes from: one of five.

    Args:
        cross_encoder: fitted here to the data, in folds.
        reward: the difference of a reward.
        ensemble: the mean over several rewards.
        votes: a data source with the shares of other annotators' votes in chosen_probability, read by the split, columns and
            data_revision of the data; auxiliary pairs are other pairs of the prompt there.
        judge: a language model behind an OpenAI-compatible server.
    """

    cross_encoder: CrossEncoderSettings | None = None
    reward: RewardSource | None = None
    ensemble: list[RewardSource] | None = None
    votes: str | None = None
    judge: JudgeSettings | None = None

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            fix = f"give one of {', '.join(KINDS)}"
            raise ConfigError(f"the preference model is {' and '.join(given) or 'not given'}", fix=fix)
        if self.ensemble is not None and not self.ensemble:
            raise ConfigError("the ensemble has no member", fix="give at least one reward")
        for part in self.rewards:
            part.check()

    @property
    def kind(self) -> str:
        """Which of the five."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def rewards(self) -> list[RewardSource]:
        """The rewards it is made of."""
        return [self.reward] if self.reward is not None else list(self.ensemble or ())

    def inputs(self) -> dict[str, str]:
        """What g depends on beyond the configuration and the data, by the words that a refusal uses for it."""
        from polyref.data.tokenize import tokenizer_fingerprint
        from polyref.scoring.models import load_tokenizer, weights_fingerprint

        if (own := self.cross_encoder) is not None:
            tokenizer = tokenizer_fingerprint(load_tokenizer(own.source))
            return {"weights of the cross-encoder": weights_fingerprint(own.source) + tokenizer}
        return {f"weights of reward {number}": part.fingerprint for number, part in enumerate(self.rewards, 1)}


@contextmanager
def opened(source: PreferenceSource, votes: Sequence[PreferenceRecord], transcript: Path) -> Iterator[Ask]:
    """What answers with g of some pairs; NaN where a judge gave no verdict. For all kinds but the cross-encoder."""
    from polyref.rewards.judge import Judge
    from polyref.rewards.preference_model import from_ensemble, from_votes

    with ExitStack() as stack:
        if source.judge is not None:
            judge = stack.enter_context(Judge(source.judge, transcript))
            yield lambda pairs: judge.verdicts(*_columns(pairs)).probability
            return
        members = [part.load() for part in source.rewards]
        model = from_votes(votes) if source.votes is not None else members[0] if source.reward else from_ensemble(members)
        yield lambda pairs: model(*_columns(pairs))


def fresh(settings: CrossEncoderSettings, seed: int) -> CrossEncoder:
    """The untrained cross-encoder that `settings` ask for. ConfigError for settings that it could not be trained by."""
    from polyref.rewards.classifier import fresh_classifier
    from polyref.rewards.cross_encoder import check_training, fresh_cross_encoder

    check_training(settings.epochs, settings.batch_size, settings.learning_rate)
    adapter = peft_config(settings.lora, fresh_classifier(settings.source, seed=seed)) if settings.lora else None
    if adapter is not None:
        adapter.task_type = "SEQ_CLS"
    options: dict[str, Any] = {"max_length": settings.max_length, "batch_size": settings.batch_size}
    return fresh_cross_encoder(settings.source, seed=seed, peft_config=adapter, **options)


def cross_fitted(
    settings: CrossEncoderSettings,
    records: Sequence[PreferenceRecord],
    pairs: Sequence[Comparison],
    *,
    seed: int,
    folder: Path,
    inputs: dict[str, str],
    progress: Callable[[str, int, int], None],
) -> Tensor:
    """g of `pairs`, each from the fold that never saw its prompt; folds that are done are kept in `folder`."""
    from polyref.rewards.cross_encoder import train_cross_encoder
    from polyref.rewards.cross_fit import cross_fit

    def fit(others: list[PreferenceRecord], fold: int) -> PreferenceModel:
        encoder = fresh(settings, seed)
        options = {"epochs": settings.epochs, "learning_rate": settings.learning_rate, "batch_size": settings.batch_size}

        def told(step: int, steps: int, loss: float) -> None:
            progress(f"fit {fold + 1} of {settings.folds}", step, steps)

        train_cross_encoder(encoder, others, seed=seed, on_step=told, **options)  # type: ignore[arg-type]
        return _in_pieces(encoder, lambda done, rows: progress(f"asking fit {fold + 1}", done, rows))

    kept = {"cross_encoder": asdict(settings), "inputs": inputs}
    return cross_fit(records, fit, folds=settings.folds, seed=seed, pairs=pairs, folder=folder, settings=kept).probability


def _in_pieces(model: PreferenceModel, told: Callable[[int, int], None]) -> PreferenceModel:
    """`model`, asked about some rows at a time, with `told` how far it is."""
    import torch

    from polyref.rewards.preference_model import NamedPreferences

    def preferences(prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text]) -> Tensor:
        found = []
        for start in range(0, len(prompts), _PIECE):
            piece = slice(start, start + _PIECE)
            found.append(model(prompts[piece], first[piece], second[piece]))
            told(min(start + _PIECE, len(prompts)), len(prompts))
        return torch.cat(found)

    return NamedPreferences(model.name, preferences)


def _columns(pairs: Sequence[Comparison]) -> tuple[list[Any], list[Any], list[Any]]:
    return [p.prompt for p in pairs], [p.first for p in pairs], [p.second for p in pairs]
