"""What the settings of `polyref iterate` mean for the loop: its plan, its rewards and labels, and what it depends on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from polyref.cli.iterate_settings import IterateSettings
from polyref.cli.loop_plan import checked_settings, drawing_inputs, held_to, training_settings
from polyref.cli.loop_settings import LoopPrompts
from polyref.cli.settings import peft_config
from polyref.errors import ConfigError
from polyref.training.config import PreferenceConfig

if TYPE_CHECKING:
    from polyref.cli.progress import Meter
    from polyref.cli.training_rewards import Opened
    from polyref.data.prompt_rows import PromptRow
    from polyref.labelling.desk import Desk
    from polyref.loops.iterate import Plan
    from polyref.loops.label import Labeller
    from polyref.rewards.cross_fit import Comparison
    from polyref.rewards.protocols import PreferenceModel, Reward
    from polyref.types import PreferenceRecord

logger = logging.getLogger(__name__)


def check_training(own: IterateSettings, training: Mapping[str, Any]) -> PreferenceConfig:
    """The configuration of every training. ConfigError for an option that is the run's own, or has no meaning here."""
    args = checked_settings(training, own.beta, own.output_dir)
    if args.objective != "plain":
        raise ConfigError(f"objective is {args.objective}, but rounds have no auxiliary pairs", fix="leave it out")
    if args.eval_strategy != "no" or args.load_best_model_at_end:
        raise ConfigError("rounds are judged by completions, not by held-out pairs", fix="leave eval_strategy out")
    return args


def open_rewards(
    own: IterateSettings, fitted: Callable[[], Sequence[PreferenceRecord]], reward: Reward | None, gold: Reward | None
) -> Opened:
    """As `TrainingRewards.open`. ConfigError too for a function without the features that the pairing needs."""
    if own.pairing == "farthest" and reward is not None and not hasattr(reward, "features"):
        raise ConfigError("pairing farthest needs a reward with features", fix="give a RewardModel, or choose another pairing")
    return own.rewards.open(fitted, reward, gold)


class Offline(NamedTuple):
    """The offline pairs that are trained on, and how many were left out."""

    pairs: Sequence[PreferenceRecord]
    left_out: int


def offline_of(own: IterateSettings, source: LoopPrompts, held_out: Sequence[PromptRow]) -> Offline:
    """The offline pairs without those of prompts that `held_out` took; those of eval_data may be trained on.

    ConfigError where none is left.
    """
    from polyref.data.sources import prompt_key

    given = source.pairs(own.offline_data)
    taken = {prompt_key(row.prompt) for row in held_out} if source.eval_data is None else set()
    pairs = [record for record in given if prompt_key(record.prompt) not in taken]
    if given and not pairs:
        what = f"all {len(given)} pairs of offline_data are of held-out prompts"
        raise ConfigError(what, fix="give pairs of other prompts, or judge on eval_data")
    if left_out := len(given) - len(pairs):
        logger.info("%d of %d offline pairs are of held-out prompts, and are left out", left_out, len(given))
    return Offline(pairs, left_out)


def inputs_of(
    own: IterateSettings,
    prompts: Sequence[PromptRow],
    held_out: Sequence[PromptRow],
    offline: Sequence[PreferenceRecord],
    fitted: Sequence[PreferenceRecord],
    given: Mapping[str, Any],
) -> dict[str, str]:
    """What the run depends on beyond its configuration, by the words that a refusal uses for it.

    `given` are the functions that stand in for named rewards and labels. DataError for a prompt that leaves no room for a
    completion; ConfigError for fewer prompts than the rounds take.
    """
    from polyref.data.records import record_to_row
    from polyref.stages import content_digest

    if own.prompts_per_round is not None and (needed := own.rounds * own.prompts_per_round) > len(prompts):
        what = f"{own.rounds} rounds of {own.prompts_per_round} fresh prompts take {needed}, and there are {len(prompts)}"
        raise ConfigError(what, fix="give more prompts, fewer rounds, or fewer prompts a round")
    inputs = drawing_inputs(own.source, own.reference_set, prompts, held_out, own.max_new_tokens)
    if offline:
        inputs["offline pairs"] = content_digest([record_to_row(record) for record in offline])
    inputs |= own.labeller.inputs() if own.labeller is not None else {}
    return inputs | own.rewards.inputs(fitted, given)


def open_labeller(
    own: IterateSettings, preference: PreferenceModel | None, folder: Path, seed: int, stack: ExitStack
) -> Labeller | None:
    """Who labels where the reward does not: a preference model, loaded when first asked, or a person."""
    from polyref.cli.label import ask
    from polyref.cli.preference_source import opened
    from polyref.loops.label import by_model, by_person

    if own.label == "human":
        sheet = f"annotate{'-' if own.annotator else ''}{own.annotator}"

        def vote(desk: Desk, number: int) -> str:
            return ask(desk, own.label_how, folder / f"{sheet}-{number}.csv", own.port)

        return by_person(folder, vote, seed=seed, annotator=own.annotator, question=own.question)
    if own.label != "model":
        return None
    if preference is not None:

        def asked(pairs: Sequence[Comparison]) -> Any:
            return preference(*map(list, zip(*((p.prompt, p.first, p.second) for p in pairs), strict=True)))

        return by_model(asked, preference.name)
    source = own.labeller
    assert source is not None
    ready = cache(lambda: stack.enter_context(opened(source, [], folder / "judge.jsonl")))
    return by_model(lambda pairs: ready()(pairs), f"labeller {source.kind}")


def check_labeller(own: IterateSettings, preference: PreferenceModel | None) -> None:
    """ConfigError unless label model has just one preference model, and the others none."""
    if (own.labeller is not None) + (preference is not None) != (own.label == "model"):
        what = f"label is {own.label}, with {'a' if own.labeller or preference else 'no'} preference model"
        raise ConfigError(what, fix="give labeller with label model, and only then")


def make_plan(
    own: IterateSettings,
    training: Mapping[str, Any],
    seed: int,
    rewards: Opened,
    labeller: Labeller | None,
    offline: Sequence[PreferenceRecord],
    meter: Meter,
    told: Callable[[dict[str, Any]], None],
) -> Plan:
    """The plan of the loop."""
    from polyref.cli.progress import TrainingProgress
    from polyref.loops.iterate import Plan
    from polyref.loops.pairing import Pairing
    from polyref.loops.train import Training
    from polyref.loops.uncertain import feature_distances
    from polyref.samplers.engine import SamplingParameters

    settings = partial(training_settings, training)
    adapter = None if own.lora is None else partial(peft_config, own.lora)
    held = held_to(own.moving.told, own.source, own.reference_set)
    how = Training(own.reference_set, own.source, settings, adapter, [TrainingProgress(meter)], meter, held)

    def apart(earlier: Sequence[PreferenceRecord]) -> Any:
        assert rewards.plain is not None  # the settings refuse the features of an ensemble
        features: Any = rewards.plain()
        return feature_distances(features, earlier, own.ridge)

    return Plan(
        model=own.source,
        references=own.reference_set,
        open_reward=rewards.reward,
        open_gold=rewards.gold,
        beta=own.beta,
        rounds=own.rounds,
        batch=own.prompts_per_round,
        main=own.main,
        enhancer=own.enhancer_agent,
        pairing=Pairing(
            own.pairing, own.pairs, "soft" if own.label == "soft" else "hard", own.min_margin, own.tie_within, seed
        ),
        labeller=labeller,
        apart=apart if own.pairing == "farthest" else None,
        offline=offline,
        replay=own.replayed,
        anchor=own.moving,
        from_start=own.from_start,
        limits=own.limits,
        parameters=SamplingParameters(own.max_new_tokens),
        eval_completions=own.eval_completions,
        batch_size=own.batch_size,
        prompts_at_once=own.prompts_at_once,
        seed=seed,
        training=how,
        progress=meter,
        told=told,
    )
