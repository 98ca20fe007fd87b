"""Rewards of completions under a model with a score head: one forward pass a batch, the head read where completions end.

The reward of a completion is what the model itself returns for prompt + completion alone: its head's one number at the last
token that is not the padding token. That token is the end of the text where padding has a token of its own, and the one before
it where a tokenizer pads with its end-of-sequence token.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyref.data.collate import collate
from polyref.errors import ModelError
from polyref.scoring.logprobs import PROBE_SEED, ScoringPlan, causal_lm, computing_dtype, decoder_inputs, find_plan, to_device
from polyref.types import TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_NO_HEAD = "give a sequence-classification model with num_labels 1, as `polyref reward` trains"


def score_head(model: nn.Module, where: str = "reward model") -> tuple[str, nn.Linear]:
    """The name in the model, PEFT's wrappers left out, and the module of the linear layer that gives the one number.

    ModelError where there is none.
    """
    linear = [
        (name, module)
        for name, module in causal_lm(model).named_modules()
        if isinstance(module, nn.Linear) and module.out_features == 1 and "original_module" not in name and "lora_" not in name
    ]
    if not linear:
        raise ModelError("it has no score head of one number", where=where, fix=_NO_HEAD)
    name, head = linear[-1]
    return name.split(".modules_to_save")[0].removesuffix(".base_layer"), head


def settle_padding(model: nn.Module, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Give a model that names no padding token its tokenizer's, or else its end-of-sequence token: batches need one."""
    config = causal_lm(model).config
    text = config.get_text_config()
    if text.pad_token_id is None:
        token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if token is None:
            raise ModelError(
                "neither it nor its tokenizer has a padding token", where=where, fix="give the tokenizer a pad_token"
            )
        text.pad_token_id = config.pad_token_id = token


def padding_token(model: nn.Module) -> int:
    """The id of the model's padding token, which `settle_padding` saw to."""
    return int(causal_lm(model).config.get_text_config().pad_token_id)


def last_tokens(batch: TokenBatch, padding: int) -> Tensor:
    """Where the reward of each completion is read: (R, C) positions in its row, of the last token that is not `padding`.

    A completion of nothing but padding tokens is read at its prompt's last token that is none, as in a row of its own.
    """
    index = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    kept = batch.input_ids != padding
    completions = range(1, batch.completions + 1)
    own = torch.stack([kept & ((batch.segment_ids == 0) | (batch.segment_ids == c)) for c in completions], 1)
    return (index * own).argmax(-1)


def completion_rewards(model: nn.Module, batch: TokenBatch, plan: ScoringPlan) -> Tensor:
    """r(x, y) of every completion of `batch`, with gradient: (R, C) float32 (float64 for a float64 model), in reward units.

    C is `batch.completions` under "shared" and 1 under "separate": reshape to (B, C), the order is the same.
    """
    return rewards_and_features(model, batch, plan)[0]


def rewards_and_features(model: nn.Module, batch: TokenBatch, plan: ScoringPlan) -> tuple[Tensor, Tensor]:
    """As `completion_rewards`, and the features (R, C, d) that the head made them from."""
    if not plan.fused:
        return _own_rewards(model, batch)
    hidden, values = _through_head(model, decoder_inputs(model, batch, plan))
    at = last_tokens(batch, padding_token(model))
    rows = torch.arange(len(at), device=at.device)[:, None]
    return _wide(values[rows, at, 0]), _wide(hidden[rows, at])


def probe_rewards(model: nn.Module, *, row_limit: int | None = None) -> ScoringPlan:
    """The fastest way of scoring `model` that agrees with what the model itself returns for one completion at a time.

    `fused` says that the head gives a number at every token; otherwise (an encoder that pools) the model's own output of one
    row a completion is taken. For the rest see `find_plan`, which judges the head's numbers at all tokens.
    """
    own = ScoringPlan(layout="separate", fused=False)
    if _reads_last_token(model):
        plan = find_plan(model, _token_values, row_limit=row_limit)
        return plan if plan.fused else own
    logger.warning("this model's head does not score tokens one by one; scoring one row a completion, which is slower")
    return own


@torch.no_grad()
def _reads_last_token(model: nn.Module) -> bool:
    """Whether the model returns its head's number at the last token, tried on two completions."""
    device, training = next(model.parameters()).device, model.training
    generator = torch.Generator().manual_seed(PROBE_SEED)
    vocabulary = causal_lm(model).config.get_text_config().vocab_size
    texts = torch.randint(vocabulary, (2, 16), generator=generator).tolist()
    batch = to_device(collate([(ids[:9], [ids[9:]]) for ids in texts], layout="separate"), device)
    model.eval()
    try:
        own, read = (completion_rewards(model, batch, ScoringPlan(layout="separate", fused=fused)) for fused in (False, True))
    except (IndexError, TypeError, ValueError) as error:  # a head that saw no tokens, or a model that takes no positions
        logger.info("%s: %s", type(error).__name__, error)
        return False
    finally:
        model.train(training)
    eps = torch.finfo(computing_dtype(model, device)).eps
    return torch.allclose(own, read, rtol=max(1e-3, 16 * eps), atol=1e-4)


def _token_values(model: nn.Module, batch: TokenBatch, plan: ScoringPlan) -> Tensor:
    """The head's number at every place where a token is predicted: (N,), what masks and positions show in."""
    _, values = _through_head(model, decoder_inputs(model, batch, plan))
    return _wide(values.flatten(0, 1)[batch.source_index, 0])


def _own_rewards(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """What the model returns for rows of one completion, (R, 1), and (R, 1, d)."""
    if batch.completions != 1:
        raise ValueError("the model's own output is for one completion a row")
    padding, mask = padding_token(model), batch.segment_ids >= 0
    logits: list[Tensor] = []
    inputs = {"input_ids": batch.input_ids.masked_fill(~mask, padding), "attention_mask": mask.long()}
    hidden, _ = _through_head(model, inputs, logits)
    if hidden.dim() == 3:
        hidden = hidden[torch.arange(len(hidden), device=hidden.device), last_tokens(batch, padding)[:, 0]]
    return _wide(logits[0]), _wide(hidden)[:, None]


def _through_head(model: nn.Module, inputs: dict[str, Any], returned: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The score head's input and output, read on their way through `model`'s own forward; its logits join `returned`.

    Going through the outermost module keeps distributed wrappers working.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    handle = score_head(model)[1].register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    if returned is not None:
        returned.append(logits)
    return seen[-1]


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
