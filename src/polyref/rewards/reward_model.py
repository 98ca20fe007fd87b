"""A trained reward model as a reward: texts in, numbers out, each prompt passed once for all its completions."""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor, nn

from polyref.data.collate import Item, collate, grouped_batches, row_length
from polyref.data.records import to_messages
from polyref.data.tokenize import tokenize_records, tokenizer_fingerprint
from polyref.errors import ConfigError, DataError
from polyref.references.score import check_fit
from polyref.rewards.classifier import base_of, is_adapter, load_adapted_classifier, load_classifier
from polyref.rewards.protocols import check_rewards, check_rows
from polyref.rewards.reward_settings import RewardModelSettings, read_reward_settings
from polyref.scoring.logprobs import causal_lm, to_device
from polyref.scoring.models import (
    ModelSource,
    adapter_fingerprint,
    default_device,
    load_tokenizer,
    loading_errors,
    module_fingerprint,
    weights_fingerprint,
)
from polyref.scoring.score_head import padding_token, probe_rewards, rewards_and_features, score_head, settle_padding
from polyref.stages import content_digest
from polyref.types import PreferenceRecord, Text, TokenBatch, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_AT_ONCE = 4
"""Completions of one prompt that share a row."""


class RewardModel:
    """r(x, y): a sequence classifier with one logit, as a `Reward`.

    The value is the model's own for the tokens of prompt + completion: strings as raw text with BOS and EOS, messages through
    the chat template up to the end of the assistant's turn. It does not depend on the other rows, nor, but for rounding, on
    `batch_size`. The model is frozen and switched to evaluation.

    Args:
        model: the classifier, a PEFT model too.
        tokenizer: the one it was trained with.
        name: what reports call it.
        max_length: cut prompt + completion to so many tokens; by default nothing is cut, and what the model's context cannot
            hold is refused.
        truncation_mode: keep_start cuts the end of the completion, keep_end the start of the prompt.
        prompt_format: "chat" reads a prompt and completion that are strings as one user and one assistant turn, "transcript" as
            Human/Assistant turns, "as_is" as raw text.
        temperature: what differences of reward are best divided by, where that is known: `from_reward` does.
        batch_size: prompts in one forward pass.
        device: by default the accelerator, if there is one.

    Raises ModelError for a model without a head of one number, ConfigError for a setting that cannot be; calls raise DataError
    naming the row that cannot be scored.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "reward model",
        max_length: int | None = None,
        truncation_mode: str = "keep_start",
        prompt_format: str = "as_is",
        temperature: float | None = None,
        batch_size: int = 8,
        device: torch.device | str | None = None,
    ) -> None:
        RewardModelSettings("float32", max_length, truncation_mode, prompt_format, temperature)  # refuses what cannot be
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}", where=name, fix="give at least 1")
        score_head(model, name)
        settle_padding(model, tokenizer, name)
        self.device = torch.device(device) if device is not None else default_device()
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.tokenizer, self.name, self.batch_size = tokenizer, name, batch_size
        self.max_length, self.truncation_mode = max_length, truncation_mode
        self.prompt_format, self.temperature = prompt_format, temperature
        self.plan = probe_rewards(self.model, row_limit=max_length and _AT_ONCE * max_length)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        adapter: str | Path | None = None,
        tokenizer: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        name: str | None = None,
        max_length: int | None | Literal["saved"] = "saved",
        truncation_mode: str | None = None,
        prompt_format: str | None = None,
        temperature: float | None | Literal["saved"] = "saved",
        batch_size: int = 8,
        device: torch.device | str | None = None,
    ) -> Self:
        """The reward model at hub id or folder `model`: a whole classifier, or a PEFT adapter saved with its score head.

        `adapter` names such an adapter where `model` is its base; an adapter given as `model` is put on the base it names. The
        tokenizer is the one beside the weights, unless `tokenizer` names another. dtype, max_length, truncation_mode,
        prompt_format and temperature are those that `polyref reward` left beside the weights (`read_reward_settings`), unless
        given; where it left none, float32 and the defaults of `RewardModel`. ModelError says in one line what is wrong.
        """
        saved = adapter if adapter is not None else model if is_adapter(model) else None
        kept = read_reward_settings(*((model, revision) if saved is None else (saved,))) or RewardModelSettings()
        source = ModelSource(str(model), None, dtype or kept.dtype, revision, trust_remote_code)
        if saved is None:
            network: nn.Module = load_classifier(source)
        else:
            base = source if adapter is not None else None
            network = load_adapted_classifier(str(saved), source.dtype, base=base, gguf_file=kept.gguf_file)
        beside = replace(source, model=causal_lm(network).config._name_or_path) if saved is not None else source
        words = load_tokenizer(replace(source, model=tokenizer)) if tokenizer else tokenizer_beside(saved, beside)
        return cls(
            network,
            words,
            name=name or Path(str(saved if saved is not None else model)).name,
            max_length=kept.max_length if max_length == "saved" else max_length,
            truncation_mode=truncation_mode or kept.truncation_mode,
            prompt_format=prompt_format or kept.prompt_format,
            temperature=kept.temperature if temperature == "saved" else temperature,
            batch_size=batch_size,
            device=device,
        )

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        """N prompts and a completion of each -> their rewards, (N,) float64 on the CPU."""
        return check_rewards(self._score(prompts, completions)[0], len(prompts), self.name)

    def features(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        """What the score head reads: (N, d) float64 on the CPU; a reward is the head's weight times this, and its bias."""
        return self._score(prompts, completions)[1]

    def with_features(self, prompts: Sequence[Text], completions: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """Rewards and `features`, (N,) and (N, d), from one pass through the model."""
        values, phi = self._score(prompts, completions)
        return check_rewards(values, len(prompts), self.name), phi

    @functools.cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits: of weights, padding token, tokenizer, cut and format, which with the text decide a reward."""
        network = [module_fingerprint(self.model), padding_token(self.model)]  # the head is read at the last token but padding
        text = [tokenizer_fingerprint(self.tokenizer), self.max_length, self.truncation_mode, self.prompt_format]
        return content_digest([*network, *text])

    @torch.no_grad()
    def _score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """Rewards (N,) and features (N, d): rows of one prompt share it, and rows of similar length a batch."""
        n = check_rows(self.name, prompts, completions)
        values = torch.empty(n, dtype=torch.float64)
        features = torch.empty(n, score_head(self.model)[1].in_features, dtype=torch.float64)
        for rows, batch in self._batches(self._tokens(prompts, completions)):
            r, phi = rewards_and_features(self.model, to_device(batch, self.device), self.plan)
            values[rows], features[rows] = r.flatten().cpu().to(values), phi.flatten(0, 1).cpu().to(features)
        return values, features

    def _tokens(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[TokenizedPair]:
        """Each row as the pair of its completion with itself, so that where the prompt ends is its own affair."""
        rows = zip(prompts, completions, strict=True)
        records = [self._record(x, y, i) for i, (x, y) in enumerate(rows, 1)]
        data = tokenize_records(records, self.tokenizer, max_length=self.max_length, truncation_mode=self.truncation_mode)
        if data.report.dropped_rows:
            _, row = data.report.dropped_rows[0]
            fix = "raise max_length, or leave out empty completions"
            raise DataError("no token of the completion is left", where=f"{self.name}, row {row}", fix=fix)
        if cut := sum(pair.chosen_cut for pair in data.pairs):
            logger.warning("%s: %d completions were cut, to %s tokens with their prompt", self.name, cut, self.max_length)
        check_fit(causal_lm(self.model).config, data.pairs, data.records, self.name)
        return data.pairs

    def _record(self, prompt: Text, completion: Text, row: int) -> PreferenceRecord:
        record = PreferenceRecord(prompt, completion, completion, source=self.name, row=row)
        plain = isinstance(prompt, str) and isinstance(completion, str)
        return to_messages(record, self.prompt_format) if plain else record

    def _batches(self, pairs: Sequence[TokenizedPair]) -> Iterator[tuple[list[int], TokenBatch]]:
        """Row numbers and their completions, at most `_AT_ONCE` of one prompt in a row of the batch."""
        by_prompt: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, pair in enumerate(pairs):
            by_prompt[pair.prompt_ids].append(i)
        by_count: dict[int, list[list[int]]] = defaultdict(list)
        for rows in by_prompt.values():
            for start in range(0, len(rows), _AT_ONCE):
                some = rows[start : start + _AT_ONCE]
                by_count[len(some)].append(some)
        for groups in by_count.values():
            items: list[Item] = [(pairs[rows[0]].prompt_ids, [pairs[i].chosen_ids for i in rows]) for rows in groups]
            for batch in grouped_batches([row_length(*item) for item in items], self.batch_size):
                yield [i for g in batch for i in groups[g]], collate([items[g] for g in batch], layout=self.plan.layout)


def saved_fingerprint(
    model: str,
    *,
    adapter: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """A text that changes with anything saved that the values of `RewardModel.load` with these arguments depend on.

    That is the weights, of an adapter and of its base too, the tokenizer, and the settings kept beside them; nothing is loaded
    but the tokenizer. ModelError as `load`.
    """
    saved = adapter if adapter is not None else model if is_adapter(model) else None
    kept = read_reward_settings(*((model, revision) if saved is None else (saved,)))
    own = kept or RewardModelSettings()
    source = ModelSource(model, None, dtype or own.dtype, revision, trust_remote_code)
    base = source if saved is None or adapter is not None else base_of(saved, source.dtype, own.gguf_file)
    words = tokenizer_beside(saved, replace(source, model=base.model))
    return content_digest([weights_fingerprint(base), adapter_fingerprint(saved), tokenizer_fingerprint(words), str(kept)])


def tokenizer_beside(saved: str | Path | None, source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer saved with an adapter, if it is there, else that of the model at `source`: the adapter's base, or all."""
    if saved is None or not (Path(saved).expanduser() / "tokenizer_config.json").is_file():
        return load_tokenizer(source)
    from transformers import AutoTokenizer

    with loading_errors(ModelSource(str(saved)), "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(saved)
    return tokenizer
