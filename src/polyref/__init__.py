"""Align language models with human preferences when one reference model is not enough.

Data flows through the rooms in this order:

    load_preferences          rows of any source -> records, checked                              polyref.data
    Reference, ReferenceSet   K models, adapters or system prompts -> one anchor                  polyref.references
    score_references          records -> sequence log-probs of K references, through a cache      polyref.references.score
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
    from polyref.training.config import PreferenceConfig
    from polyref.training.preference_trainer import PreferenceTrainer

_HOMES = {
    "load_preferences": "polyref.data.sources",
    "split_by_prompt": "polyref.data.sources",
    "Reference": "polyref.references.reference_set",
    "ReferenceSet": "polyref.references.reference_set",
    "score_references": "polyref.references.score",
    "PreferenceConfig": "polyref.training.config",
    "PreferenceTrainer": "polyref.training.preference_trainer",
}

__all__ = [
    "PreferenceConfig",
    "PreferenceTrainer",
    "Reference",
    "ReferenceSet",
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
