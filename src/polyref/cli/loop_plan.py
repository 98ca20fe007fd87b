"""What the plans of `polyref multistep` and `polyref iterate` share: every training, and what drawing depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from polyref.cli.training_run import DEFAULTS, check_resumable
from polyref.errors import ConfigError
from polyref.training.config import PreferenceConfig

if TYPE_CHECKING:
    from polyref.data.prompt_rows import PromptRow
    from polyref.references.reference_set import ReferenceSet
    from polyref.scoring.models import ModelSource


_OWN = ("beta", "prompt_format", "output_dir")


def checked_settings(training: Mapping[str, Any], beta: float, folder: str) -> PreferenceConfig:
    """As `training_settings`. ConfigError too for an option that is the run's own."""
    if given := sorted(set(_OWN) & training.keys()):
        raise ConfigError(f"training has {given[0]}, which is the run's own", fix="leave it out, or set it beside training")
    return training_settings(training, beta, folder)


def training_settings(training: Mapping[str, Any], beta: float, folder: str) -> PreferenceConfig:
    """The configuration of one training. ConfigError for an option that there is none of, or under which no run resumes."""
    check_resumable(training)
    try:
        return PreferenceConfig(**DEFAULTS | dict(training) | {"beta": beta, "output_dir": folder})
    except TypeError as error:
        raise ConfigError(str(error), where="training settings", fix="name options of PreferenceConfig") from error


def held_to(anchor: str, source: ModelSource, references: ReferenceSet) -> dict[str, Any]:
    """What manifest and summary say of the KL: the `anchor` in words, and the dtypes of the policy and of each reference."""
    dtypes = {"policy": source.dtype, "references": [member.scoring_dtype for member in references.members]}
    return {"anchor": anchor, "dtypes": dtypes}


def drawing_inputs(
    source: ModelSource,
    references: ReferenceSet,
    prompts: Sequence[PromptRow],
    held_out: Sequence[PromptRow],
    max_new_tokens: int,
) -> dict[str, str]:
    """What drawing depends on, by the words that a refusal uses for it: the prompts, the weights of policy and references.

    DataError for a prompt that leaves no room for a completion in the context of the policy or of a reference.
    """
    from polyref.references.reference_set import Reference, ReferenceSet
    from polyref.samplers.references import refuse_long, without_room
    from polyref.stages import content_digest, plain
    from polyref.training.inputs import model_inputs, reference_inputs

    inputs = {
        "prompts": content_digest([plain(row) for row in prompts]),
        "held-out prompts": content_digest([plain(row) for row in held_out]),
        **model_inputs(source, "policy"),
    }
    inputs |= reference_inputs(references, "reference", inputs["tokenizer"])
    own = Reference(**asdict(source))
    for members in (references, ReferenceSet((own,))):
        everything = [*prompts, *held_out]
        refuse_long(everything, without_room(everything, members, max_new_tokens), max_new_tokens)
    return inputs
