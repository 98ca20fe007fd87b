"""What a trainer is given as data -> records -> tokens, checked against the model; their order, and the batch of a step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from polyref.data.collate import Layout
from polyref.data.sources import load_preferences
from polyref.data.tokenize import TokenizedPreferences, tokenize_records
from polyref.errors import DataError
from polyref.references.score import check_fit
from polyref.scoring.logprobs import causal_lm
from polyref.training.dataset import GroupedSampler, ScoredPairs
from polyref.types import PreferenceRecord, TokenBatch

logger = logging.getLogger(__name__)

_BATCH_FIELDS = ("input_ids", "position_ids", "segment_ids", "source_index", "target_ids", "completion_index")


def records_of(source: Any, prompt_format: Any) -> list[PreferenceRecord]:
    """The records of scored pairs, of a list of records, or of anything that `load_preferences` takes."""
    if isinstance(source, ScoredPairs):
        return [pair.record for pair in source.pairs]
    if isinstance(source, Sequence) and source and isinstance(source[0], PreferenceRecord):
        return list(source)
    return load_preferences(source, prompt_format=prompt_format)


def tokens_of(
    records: Sequence[PreferenceRecord], name: str, args: Any, tokenizer: PreTrainedTokenizerBase, model: nn.Module, whose: str
) -> TokenizedPreferences:
    """`records` as the tokens of `model`, cut as `args` say. DataError where nothing is left of the `name` set."""
    data = tokenize_records(records, tokenizer, max_length=args.max_length, truncation_mode=args.truncation_mode)
    if not data.pairs:
        raise DataError(
            f"no pair of the {name} set has a completion left within {args.max_length} tokens", fix="raise max_length"
        )
    logger.info("%s set: %s", name, data.report)
    check_fit(causal_lm(model).config, data.pairs, data.records, whose)
    return data


def step_batch(inputs: Mapping[str, Tensor], layout: Layout, completions: int = 2) -> TokenBatch:
    """The `TokenBatch` among the tensors of a step, of `completions` a prompt."""
    fields = {name: inputs[name] for name in _BATCH_FIELDS}
    return TokenBatch(**fields, completions=completions if layout == "shared" else 1)


def grouped_sampler(dataset: ScoredPairs, args: TrainingArguments, batch_size: int) -> GroupedSampler:
    """The order of training on `dataset`, made from the data seed, for `batch_size` pairs on every process."""
    seed = args.seed if args.data_seed is None else args.data_seed
    return GroupedSampler(dataset.lengths, batch_size * args.world_size, seed)
