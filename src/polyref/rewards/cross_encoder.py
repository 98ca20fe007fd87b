"""A general preference model: one network reads the prompt and both completions, so it need not believe in any reward.

With f(x, y1, y2) the network's logit, g = s(f(x, y1, y2) - f(x, y2, y1)) is antisymmetric by construction, whatever f is, and
can hold preferences that no reward explains, cycles among them. It is trained by the likelihood of (soft) labels.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from polyref.data.collate import grouped_batches
from polyref.errors import ConfigError, DataError, ModelError, TrainingDivergedError
from polyref.files import atomic_write
from polyref.rewards.classifier import (
    check_one_logit,
    fresh_classifier,
    is_adapter,
    load_adapted_classifier,
    load_classifier,
    with_head,
)
from polyref.rewards.pair_text import PairIds, encode_pairs, separator_of
from polyref.rewards.preference_model import probability_of
from polyref.rewards.protocols import check_probabilities, check_rows
from polyref.scoring.models import ModelSource, default_device, load_tokenizer, loading_errors
from polyref.types import PreferenceRecord, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_FILE, _FORMAT, _LONGEST = "cross_encoder.json", 1, 1024


@dataclass
class CrossEncoder:
    """The `PreferenceModel` of a sequence classifier with one logit, or of a PEFT adapter on one; ModelError for others.

    `max_length` tokens are read of a pair: by default what the model takes, at most 1024. `batch_size` pairs, 2 rows each,
    pass at once; it changes g by rounding only. The model's device is where it was put.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None
    batch_size: int = 16
    name: str = "cross-encoder"

    def __post_init__(self) -> None:
        config: Any = self.model.config
        check_one_logit(config, self.name)
        limits = (getattr(config.get_text_config(), "max_position_embeddings", None), self.tokenizer.model_max_length)
        context = min(limit for limit in (*limits, _LONGEST if self.max_length is None else None) if limit)
        self.max_length = context if self.max_length is None else self.max_length
        if not 0 < self.max_length <= context:
            raise ConfigError(f"max_length is {self.max_length}", where=self.name, fix=f"the model reads {context} tokens")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}", where=self.name, fix="give at least 1")
        self._separator = separator_of(self.tokenizer)
        text = config.get_text_config()
        if text.pad_token_id is None:
            text.pad_token_id = self._separator if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        self.model.eval()

    def __call__(self, prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text]) -> Tensor:
        """g of N rows, (N,) float64 on the CPU; ModelError where the network gives no number.

        The order in which a pair passes through the network is that of its ids, so that g(x, b, a) = 1 - g(x, a, b) and
        g(x, a, a) = 1/2 to the last bit.
        """
        rows = check_rows(self.name, prompts, first, second)
        pairs = self.encode(prompts, first, second)
        log_odds = torch.zeros(rows, dtype=torch.float64)
        with torch.inference_mode():
            for batch in grouped_batches([pair.length for pair in pairs], self.batch_size):
                some = [pairs[i] for i in batch]
                sign = torch.tensor([(p.first < p.second) - (p.first > p.second) for p in some], dtype=torch.float64)
                ordered = [p._replace(first=min(p.first, p.second), second=max(p.first, p.second)) for p in some]
                log_odds[batch] = sign * self.log_odds(ordered).cpu().to(torch.float64)
        return check_probabilities(probability_of(log_odds), rows, self.name)

    def encode(self, prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text]) -> list[PairIds]:
        """The ids of N rows; a log line says how many had to be cut."""
        assert self.max_length is not None
        pairs = list(encode_pairs(self.tokenizer, prompts, first, second, max_length=self.max_length))
        if cut := sum(pair.cut for pair in pairs):
            logger.info("%s: %d of %d pairs were cut to %d tokens", self.name, cut, len(pairs), self.max_length)
        return pairs

    def log_odds(self, pairs: Sequence[PairIds]) -> Tensor:
        """f(x, y1, y2) - f(x, y2, y1) of B pairs, (B,) float32 on the model's device, with its gradient."""
        rows = [pair.sequence(self._separator, swapped=swapped) for swapped in (False, True) for pair in pairs]
        longest = max(map(len, rows))
        pad = self.model.config.get_text_config().pad_token_id  # type: ignore[union-attr, operator]
        device = next(self.model.parameters()).device
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float()
        return logits[: len(pairs)] - logits[len(pairs) :]


def fresh_cross_encoder(
    source: ModelSource,
    *,
    seed: int,
    peft_config: Any = None,
    max_length: int | None = None,
    batch_size: int = 16,
    device: torch.device | str | None = None,
) -> CrossEncoder:
    """An untrained one on the language model or encoder at `source`, its head (and adapter) drawn from `seed`.

    `peft_config`, such as peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"), trains an adapter and the head
    instead of all weights. `device` is the accelerator by default, if there is one.
    """
    model: nn.Module = fresh_classifier(source, seed=seed)
    if peft_config is not None:
        from peft import get_peft_model

        if peft_config.task_type != "SEQ_CLS":
            what = f"its task_type is {peft_config.task_type}, which would leave the score head out"
            raise ConfigError(what, where="peft_config", fix='set task_type="SEQ_CLS"')
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = get_peft_model(model, with_head(peft_config, model))
    name = f"cross-encoder on {source.model}"
    return CrossEncoder(model.to(device or default_device()), load_tokenizer(source), max_length, batch_size, name)


def train_cross_encoder(
    encoder: CrossEncoder,
    records: Sequence[PreferenceRecord],
    *,
    seed: int,
    epochs: int = 1,
    learning_rate: float = 2e-5,
    batch_size: int = 16,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    on_step: Callable[[int, int, float], None] | None = None,
) -> list[float]:
    """Fit `encoder` in place to the labels of `records`; returns the loss of each step, in nats a pair.

    The loss of a pair is -p log s(d) - (1-p) log s(-d), d = f(x, chosen, rejected) - f(x, rejected, chosen), with p its
    `chosen_probability`, 1 where it is None. AdamW, a learning rate that rises over the share `warmup` of the steps and then
    falls to 0, linearly; dropout off, so that `seed` orders the batches and nothing else is random. `on_step` is called with
    the step, their number and the loss. ConfigError, DataError without records, TrainingDivergedError for a loss that is not
    finite, ModelError where nothing is trainable.
    """
    check_training(epochs, batch_size, learning_rate, warmup)
    if not records:
        raise DataError("there are no pairs to train on", where="train_cross_encoder", fix="give at least one record")
    trained = [parameter for parameter in encoder.model.parameters() if parameter.requires_grad]
    if not trained:
        raise ModelError("no parameter is trainable", where=encoder.name, fix="start from fresh_cross_encoder")
    pairs = encoder.encode([r.prompt for r in records], [r.chosen for r in records], [r.rejected for r in records])
    labels = torch.tensor([1.0 if r.chosen_probability is None else r.chosen_probability for r in records])
    lengths = [pair.length for pair in pairs]
    batches = [b for epoch in range(epochs) for b in grouped_batches(lengths, batch_size, seed=(seed, epoch))]
    rising = max(1, round(warmup * len(batches)))
    optimiser = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
    encoder.model.eval()  # no dropout: the two orders of a pair must differ by their order alone
    losses: list[float] = []
    for step, batch in enumerate(batches):
        scale = min((step + 1) / rising, (len(batches) - step) / max(1, len(batches) - rising))
        optimiser.param_groups[0]["lr"] = learning_rate * scale
        log_odds = encoder.log_odds([pairs[i] for i in batch])
        loss = binary_cross_entropy_with_logits(log_odds, labels[batch].to(log_odds.device))
        losses.append(loss.item())
        if not loss.isfinite():
            raise TrainingDivergedError(f"{encoder.name}: the loss of step {step + 1} is {loss.item()}; lower learning_rate")
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, max_grad_norm)
        optimiser.step()
        if on_step is not None:
            on_step(step + 1, len(batches), losses[-1])
    return losses


def save_cross_encoder(encoder: CrossEncoder, folder: str | Path) -> None:
    """Write `encoder` to `folder`, whole or not at all: the weights, or the adapter with its head, as safetensors.

    ModelError for an adapter on a model that was made in memory: nothing says where its base is.
    """
    adapter = getattr(encoder.model, "active_peft_config", None)
    if adapter is not None and not adapter.base_model_name_or_path:
        fix = "save the base model first, and start from that folder"
        raise ModelError("the base of this adapter was made in memory", where=encoder.name, fix=fix)
    dtype = str(next(encoder.model.parameters()).dtype).removeprefix("torch.")
    settings = {"format": _FORMAT, "max_length": encoder.max_length, "dtype": dtype}
    with atomic_write(folder) as temporary:
        encoder.model.save_pretrained(temporary)  # type: ignore[operator]
        encoder.tokenizer.save_pretrained(temporary)
        (temporary / _FILE).write_text(json.dumps(settings) + "\n")


def load_cross_encoder(folder: str | Path, *, batch_size: int = 16, device: torch.device | str | None = None) -> CrossEncoder:
    """What `save_cross_encoder` wrote: the same g, frozen. ModelError for any other folder, or one that is not whole."""
    from transformers import AutoTokenizer

    file = Path(folder) / _FILE
    try:
        settings = json.loads(file.read_text())
        max_length, dtype = int(settings["max_length"]), str(settings["dtype"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = "give a folder that save_cross_encoder wrote"
        raise ModelError(f"no {_FILE} that can be read there", where=str(folder), fix=fix) from error
    source = ModelSource(str(folder), dtype=dtype)
    model = load_adapted_classifier(source.model, dtype) if is_adapter(folder) else load_classifier(source)
    with loading_errors(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source.model)
    model.requires_grad_(False).to(device or default_device())
    return CrossEncoder(model, tokenizer, max_length, batch_size, Path(folder).name)


def check_training(epochs: int, batch_size: int, learning_rate: float, warmup: float = 0.1) -> None:
    """ConfigError for options that `train_cross_encoder` refuses, known before there are records or a model."""
    if epochs < 1 or batch_size < 1 or not 0 < learning_rate < float("inf") or not 0 <= warmup <= 1:
        what = f"epochs {epochs}, batch_size {batch_size}, learning_rate {learning_rate}, warmup {warmup}"
        fix = "epochs and batch_size are at least 1, learning_rate is above 0, warmup is in [0, 1]"
        raise ConfigError(what, where="train_cross_encoder", fix=fix)
