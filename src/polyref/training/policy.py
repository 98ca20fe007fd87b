"""A policy or reward model made ready to train: adapter, dropout, inputs, and what would otherwise break when it is saved."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from polyref.errors import ConfigError, ModelError
from polyref.scoring.logprobs import causal_lm
from polyref.scoring.models import ModelSource, check_config, load_tokenizer, refuse_prompt_learning

logger = logging.getLogger(__name__)


def prepare_policy(model: nn.Module, args: TrainingArguments, peft_config: Any, *, who: str = "policy") -> nn.Module:
    """The policy with its adapter, dropout off (`args.disable_dropout`) and inputs ready for gradient checkpointing.

    `who` is what errors call it.
    """
    check_config(causal_lm(model).config, who)
    if peft_config is not None:
        from peft import PeftModel, get_peft_model

        if isinstance(model, PeftModel):
            raise ConfigError("peft_config is given for a model that is a PEFT model already", fix="give one or the other")
        set_seed(args.seed)  # a fresh adapter is drawn from it
        try:
            model = get_peft_model(model, peft_config)
        except ValueError as error:
            raise ConfigError(str(error), where="peft_config", fix="name layers of this model in target_modules") from error
    refuse_prompt_learning(model, who)
    _mend_generation_config(causal_lm(model))
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(f"no parameter of the {who} is trainable", fix="load the adapter with is_trainable=True")
    if args.activation_checkpointing:
        causal_lm(model).enable_input_require_grads()
    if getattr(args, "disable_dropout", False):
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
            vars(module).update({k: 0.0 for k, v in vars(module).items() if "drop" in k and isinstance(v, float)})
    return model


def _mend_generation_config(model: Any) -> None:
    """Many hub models carry sampling settings without do_sample, which transformers refuses to save hours later."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        logger.info("the policy's generation_config sets sampling options without do_sample; do_sample is now true")
        settings.do_sample = True
        try:
            settings.validate(strict=True)
        except ValueError as error:
            fix = "mend generation_config.json"
            raise ModelError(f"its generation_config cannot be saved: {error}", where="policy", fix=fix) from error


def tokenizer_of(model: nn.Module, who: str = "policy") -> PreTrainedTokenizerBase:
    """The tokenizer kept with the model's weights."""
    name = causal_lm(model).config._name_or_path
    if not name:
        raise ModelError(f"the {who} was made in memory and brings no tokenizer", fix="pass processing_class")
    return load_tokenizer(ModelSource(name))
