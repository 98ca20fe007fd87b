"""Hub id, folder, adapter or base model -> a sequence classifier with one logit: the network of a reward or preference model.

Weights are read from safetensors only. A model without a score head, or with one of several logits, is refused in one line;
only `fresh_classifier`, whose result is there to be trained, draws a head.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyref.errors import ModelError
from polyref.scoring.logprobs import causal_lm
from polyref.scoring.models import (
    ModelSource,
    adapter_tensors,
    attach_adapter,
    check_adapter,
    check_config,
    load_config,
    loading_errors,
    make_serialisable,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_FIX = "give a sequence-classification model that was trained with num_labels=1"


def load_classifier(source: ModelSource) -> PreTrainedModel:
    """The trained classifier at `source`, in evaluation mode on the CPU. ModelError unless it is whole and has one logit."""
    if source.gguf_file is not None:
        raise ModelError("a GGUF file holds no score head", where=source.model, fix=_FIX)
    config = _text_config(source)
    if not any("ForSequenceClassification" in name for name in config.architectures or ()):
        what = f"is {', '.join(config.architectures or ()) or 'of no stated architecture'}, which has no score head"
        raise ModelError(what, where=source.model, fix=_FIX)
    check_one_logit(config, source.model)
    model, missing = _load(source)
    if missing:
        what = f"{len(missing)} of its weights are not there, such as {missing[0]}, and would be random"
        raise ModelError(what, where=source.model, fix="give the whole model, as save_pretrained writes it")
    return model


def load_adapted_classifier(
    adapter: str, dtype: str = "float32", *, base: ModelSource | None = None, gguf_file: str | None = None
) -> nn.Module:
    """The classifier that PEFT saved as an adapter with its head in folder or hub id `adapter`, frozen.

    It is put on `base`, by default the model that it names (or `gguf_file` in it), in `dtype`. ModelError where the base is
    gone, or the adapter is of another model, of another task, or came without its score head or another part that its base
    lacks.
    """
    config = _adapter_config(adapter)
    named = config.base_model_name_or_path
    if not (base or named) or config.task_type != "SEQ_CLS" or not getattr(config, "modules_to_save", None):
        fix = "give an adapter of task SEQ_CLS, with the score head in modules_to_save"
        raise ModelError("this adapter brings no score head", where=adapter, fix=fix)
    source = base or ModelSource(named, gguf_file, dtype)
    model, drawn = _drawn_classifier(source, seed=0)
    wrapped: nn.Module = attach_adapter(model, adapter).eval()
    if lost := sorted(set(drawn) - adapter_tensors(adapter)):
        what = f"{len(lost)} weights are neither in it nor in its base, such as {lost[0]}, and would be random"
        raise ModelError(what, where=adapter, fix="train it again, with the modules of these weights in modules_to_save")
    return wrapped


def with_head(peft_config: Any, model: nn.Module) -> Any:
    """A copy of `peft_config` that trains, and saves, whole all that stands between the base of `model` and its logit.

    That is the score head, and before it the pooler or hidden layer of an encoder: what a base need not hold, so that it
    would be drawn anew when the adapter is loaded.
    """
    network: Any = causal_lm(model)
    base = network.base_model_prefix
    above = [name for name, child in network.named_children() if name != base and any(True for _ in child.parameters())]
    poolers = [name for name, _ in network.named_modules() if name.startswith(f"{base}.") and name.endswith(".pooler")]
    changed = copy.copy(peft_config)
    changed.task_type = "SEQ_CLS"
    changed.modules_to_save = list(dict.fromkeys([*(changed.modules_to_save or ()), *above, *poolers]))
    return changed


def fresh_classifier(source: ModelSource, *, seed: int) -> PreTrainedModel:
    """The base model at `source` with a head of one logit drawn from `seed`, or its own if it has such a one already.

    A GGUF file has none. ModelError for a classifier with another head, and for a model that is not whole.
    """
    return _drawn_classifier(source, seed=seed)[0]


def check_one_logit(config: Any, where: str) -> None:
    """ModelError for a configuration of a head with more logits than one."""
    if config.num_labels != 1:
        raise ModelError(f"its head has {config.num_labels} logits, and one is needed", where=where, fix=_FIX)


def is_adapter(folder: str | Path) -> bool:
    """Whether `folder` holds a PEFT adapter."""
    return (Path(folder).expanduser() / "adapter_config.json").is_file()


def base_of(adapter: str, dtype: str = "float32", gguf_file: str | None = None) -> ModelSource:
    """The model that the adapter in folder or hub id `adapter` names as its base. ModelError where it names none."""
    named = _adapter_config(adapter).base_model_name_or_path
    if not named:
        raise ModelError("this adapter names no base model", where=adapter, fix="give the base, and this as its adapter")
    return ModelSource(named, gguf_file, dtype)


def _adapter_config(adapter: str) -> Any:
    from peft import PeftConfig

    check_adapter(adapter)
    with loading_errors(ModelSource(adapter), "adapter"):
        return PeftConfig.from_pretrained(adapter)


def _text_config(source: ModelSource) -> Any:
    config = load_config(source)
    check_config(config, source.model)
    return config


def _drawn_classifier(source: ModelSource, *, seed: int) -> tuple[PreTrainedModel, list[str]]:
    """As `fresh_classifier`, and the names of the weights that were drawn."""
    import torch

    config = _text_config(source)
    if any("ForSequenceClassification" in name for name in config.architectures or ()):
        check_one_logit(config, source.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, missing = _load(source, num_labels=1)
    prefix = f"{model.base_model_prefix}."
    if lost := [name for name in missing if name.startswith(prefix) and ".pooler." not in name]:
        what = f"{len(lost)} of its weights are not there, such as {lost[0]}, and would be random"
        raise ModelError(what, where=source.model, fix="give the whole model, as save_pretrained writes it")
    return model, missing


def _load(source: ModelSource, **changes: Any) -> tuple[PreTrainedModel, list[str]]:
    """The model and the names of its weights that were not there."""
    import torch
    from transformers import AutoModelForSequenceClassification

    options: dict[str, Any] = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    options |= {"use_safetensors": True} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    with loading_errors(source, "model"):
        model, told = AutoModelForSequenceClassification.from_pretrained(
            source.model, dtype=getattr(torch, source.dtype), output_loading_info=True, **options, **changes
        )
    if source.gguf_file is not None:
        make_serialisable(model)
    return model.eval(), sorted(told["missing_keys"])
