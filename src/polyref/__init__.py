"""Align language models with human preferences when one reference model is not enough.

Data flows through the rooms in this order:

    load_preferences          rows of any source -> records, checked                              polyref.data
    Reference, ReferenceSet   K models, adapters or system prompts -> one anchor                  polyref.references
    score_references          records -> sequence log-probs of K references, through a cache      polyref.references.score
    RewardConfig              loss_type, centring, cut; TrainingArguments                         polyref.training.reward_config
    RewardTrainer             pairs -> reward model                                               polyref.training
    RewardModel               trained weights -> rewards of completions                           polyref.rewards.reward_model
    from_reward, from_votes,  a reward, votes or models -> g(x, y1, y2) = P(y1 preferred)         polyref.rewards
    from_ensemble
    PreferenceConfig          beta, loss_type, composition and divergence; TrainingArguments      polyref.training.config
    PreferenceTrainer         policy + anchor + pairs -> aligned policy                           polyref.training

The mathematics is in two rooms of pure functions, `polyref.references.compose` and `polyref.objectives.pairwise`. Importing
`polyref` is light: a name loads what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyref.data.sources import load_preferences, split_by_prompt
    from polyref.references.reference_set import Reference, ReferenceSet
    from polyref.references.score import score_references
    from polyref.rewards.preference_model import from_ensemble, from_reward, from_votes
    from polyref.rewards.reward_model import RewardModel
    from polyref.training.config import PreferenceConfig
    from polyref.training.preference_trainer import PreferenceTrainer
    from polyref.training.reward_config import RewardConfig
    from polyref.training.reward_trainer import RewardTrainer

_HOMES = {
    "load_preferences": "polyref.data.sources",
    "split_by_prompt": "polyref.data.sources",
    "Reference": "polyref.references.reference_set",
    "ReferenceSet": "polyref.references.reference_set",
    "score_references": "polyref.references.score",
    "RewardConfig": "polyref.training.reward_config",
    "RewardTrainer": "polyref.training.reward_trainer",
    "RewardModel": "polyref.rewards.reward_model",
    "from_ensemble": "polyref.rewards.preference_model",
    "from_reward": "polyref.rewards.preference_model",
    "from_votes": "polyref.rewards.preference_model",
    "PreferenceConfig": "polyref.training.config",
    "PreferenceTrainer": "polyref.training.preference_trainer",
}

__all__ = [
    "PreferenceConfig",
    "PreferenceTrainer",
    "Reference",
    "ReferenceSet",
    "RewardConfig",
    "RewardModel",
    "RewardTrainer",
    "from_ensemble",
    "from_reward",
    "from_votes",
    "load_preferences",
    "score_references",
    "split_by_prompt",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
