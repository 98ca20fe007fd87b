"""Sequence log-probabilities of completions under any decoder: one forward pass a batch, completion positions only."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyref.data.collate import Item, Layout, batch_tensors, collate
from polyref.errors import ModelError
from polyref.scoring.head import LogitTransform, token_logps
from polyref.scoring.masks import MaskKind, shared_prompt_mask
from polyref.types import LogProbs, TokenBatch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

PROBE_SEED = 0
HALF_EPS = 1e-4  # between the resolution of float32 and those of float16 and bfloat16
_REACH = re.compile(r"window(?!_layers|_pattern)|attention_chunk|local_attention|index_topk")
Size = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class ScoringPlan:
    """How a model is to be scored, found once by `probe`.

    `layout` "shared" passes a prompt once for all its completions under masks of kind `mask` (with the model's sliding
    `window`, if any); "separate" is one ordinary row a completion. `fused` takes the output head apart and scores completion
    positions in chunks, undoing `transform`; otherwise the model's own logits are used.
    """

    layout: Layout = "shared"
    mask: MaskKind = "full"
    window: int | None = None
    fused: bool = True
    transform: LogitTransform = LogitTransform()


Score = Callable[[nn.Module, TokenBatch, ScoringPlan], Tensor]
"""What a model gives each scored token of a batch under a plan: (N,), such as `token_scores`."""


def completion_logps(model: nn.Module, batch: TokenBatch, plan: ScoringPlan) -> LogProbs:
    """log pi(y | x) = sum_t log pi(y_t | x, y_<t) for every completion of `batch`, in nats, with gradient.

    Returns `LogProbs` of shape (B, C) under "shared" (C = `batch.completions`) and (B * C, 1) under "separate": reshape to (B,
    C), the order is the same. Sums are float32 (float64 for a float64 model).
    """
    per_token = token_scores(model, batch, plan)
    shape = (batch.input_ids.shape[0], batch.completions)
    total = torch.zeros(shape[0] * shape[1], dtype=per_token.dtype, device=per_token.device)
    total = total.index_add(0, batch.completion_index, per_token)
    tokens = torch.bincount(batch.completion_index, minlength=len(total))
    return LogProbs(total.view(shape), tokens.view(shape))


def token_scores(model: nn.Module, batch: TokenBatch, plan: ScoringPlan) -> Tensor:
    """log pi(y_t | x, y_<t) of the N scored tokens of `batch`, in its order: (N,), nats, with gradient."""
    inputs = decoder_inputs(model, batch, plan)
    if not plan.fused:
        logits: Tensor = model(**inputs).logits.flatten(0, 1)[batch.source_index]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.gather(1, batch.target_ids[:, None])[:, 0] - logits.logsumexp(1)
    hidden = _last_hidden_state(model, inputs).flatten(0, 1)[batch.source_index]
    return token_logps(hidden, batch.target_ids, causal_lm(model).get_output_embeddings(), plan.transform)


def decoder_inputs(model: nn.Module, batch: TokenBatch, plan: ScoringPlan) -> dict[str, Any]:
    """What `model` is called with for `batch` under `plan`: ids, positions and the mask of the layout."""
    if plan.layout == "shared":
        dtype = computing_dtype(model, batch.input_ids.device)
        mask: Any = shared_prompt_mask(batch, plan.mask, plan.window, dtype)
    else:
        mask = (batch.segment_ids >= 0).long()
    return {"input_ids": batch.input_ids, "attention_mask": mask, "position_ids": batch.position_ids, "use_cache": False}


def computing_dtype(model: nn.Module, device: torch.device) -> torch.dtype:
    """What `model` computes in on `device`: the dtype of autocast where that is on, else of its weights."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def causal_lm(model: nn.Module) -> Any:
    """The transformers model, a causal language model or one with a score head, inside distributed and PEFT wrappers."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if unwrap is not None else model


def _last_hidden_state(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The decoder's last hidden state (R, L, H), read on its way through `model`'s own forward.

    Going through the outermost module keeps distributed wrappers working; `logits_to_keep=1` leaves the head almost no work.
    """
    states: list[Tensor] = []
    decoder = causal_lm(model).get_decoder()
    handle = decoder.register_forward_hook(lambda module, args, output: states.append(output[0]))
    try:
        model(**inputs, logits_to_keep=1)
    finally:
        handle.remove()
    return states[-1]


def probe(model: nn.Module, *, row_limit: int | None = None) -> ScoringPlan:
    """`find_plan` for the token log-probabilities of a language model; a head that cannot be taken apart is told too."""
    plan = find_plan(model, token_scores, row_limit=row_limit)
    if not plan.fused:
        logger.warning("this model's output head cannot be taken apart; scoring holds full logits, which takes more memory")
    return plan


@torch.no_grad()
def find_plan(model: nn.Module, score: Score, *, row_limit: int | None = None) -> ScoringPlan:
    """The fastest way of scoring `model` that agrees with scoring one completion at a time through its own logits.

    Two prompts of different length, with two completions each, are scored in rows longer than any sliding window the model has
    (`row_limit`: the longest row that will ever be scored; a window beyond it cannot matter). The model decides, not a list of
    names: a candidate is kept when its `score` of every token differs from one-by-one scoring by no more than batching itself
    and rounding do: at most in float32 and float64, on average in half precision, where the largest rounding error of a token
    is as large as the effect of a wrong mask. Fallbacks are logged.
    """
    config = causal_lm(model).config.get_text_config()
    device = next(model.parameters()).device
    items = _probe_items(config, row_limit)
    training = model.training
    model.eval()

    def scores(some: list[Item], plan: ScoringPlan) -> Tensor:
        return score(model, to_device(collate(some, layout=plan.layout), device), plan)

    try:
        plain = ScoringPlan(layout="separate", fused=False)
        one_by_one = torch.cat([scores([(p, [c])], plain) for p, cs in items for c in cs])
        if not torch.isfinite(one_by_one).all():
            raise ModelError("the model gives scores that are not finite", fix="check its weights and dtype")
        noise = (scores(items, plain) - one_by_one).abs()
        eps = torch.finfo(computing_dtype(model, device)).eps
        half = eps > HALF_EPS
        size: Size = torch.mean if half else torch.max
        batching, rounding = (4, eps / 4) if half else (8, 4 * eps)
        tolerance = float(batching * size(noise) + rounding * size(one_by_one.abs()))
        for plan in _candidates(config):
            reason = _disagreement(scores, items, plan, one_by_one, tolerance, size)
            if reason is None:
                break
            logger.info("scoring as %s, %s masks, %s head: %s", plan.layout, plan.mask, _head_name(plan), reason)
        else:
            plan = plain
    finally:
        model.train(training)
    if plan.layout == "separate":
        logger.warning("this model cannot share a prompt between completions; scoring one row a completion, which is slower")
    return plan


def _candidates(config: PretrainedConfig) -> list[ScoringPlan]:
    window = getattr(config, "sliding_window", None)
    kinds: list[MaskKind] = ["by_layer_type", "sliding", "full"] if window else ["full"]
    base = ScoringPlan(window=window, transform=_logit_transform(config))
    shared = [replace(base, mask=kind) for kind in kinds]
    fused = [*shared, replace(base, layout="separate")]
    return [*fused, *(replace(plan, fused=False) for plan in shared)]


def _logit_transform(config: PretrainedConfig) -> LogitTransform:
    """Read from the configuration, as the field spells it; the probe judges whether it was read right."""
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))


def _probe_items(config: PretrainedConfig, row_limit: int | None) -> list[Item]:
    context = getattr(config, "max_position_embeddings", None) or 2**20
    reach = max((n for n in _reaches(config) if row_limit is None or n < row_limit), default=0)
    length = min(reach + 8, context - 16)
    lengths = ((max(length, 16), (9, 5)), (max(length, 16) // 2, (4, 11)))
    generator = torch.Generator().manual_seed(PROBE_SEED)

    def draw(n: int) -> list[int]:
        return torch.randint(config.vocab_size, (n,), generator=generator).tolist()

    return [(draw(prompt), [draw(n) for n in completions]) for prompt, completions in lengths]


def _reaches(config: PretrainedConfig) -> list[int]:
    """How far back attention of `config` may stop to look, under every name that configurations have for it, in tokens."""
    return [n for name, n in config.to_dict().items() if _REACH.search(name) and type(n) is int]


def _disagreement(
    scores: Callable[[list[Item], ScoringPlan], Tensor],
    items: list[Item],
    plan: ScoringPlan,
    expected: Tensor,
    tolerance: float,
    size: Size,
) -> str | None:
    """Why `plan` is not usable, or None. A model may refuse a mask with any exception at all."""
    try:
        difference = float(size((scores(items, plan) - expected).abs()))
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return None if difference <= tolerance else f"token scores differ by {difference:.2g} (allowed {tolerance:.2g})"


def _head_name(plan: ScoringPlan) -> str:
    return "fused" if plan.fused else "full"


def to_device(batch: TokenBatch, device: torch.device | str) -> TokenBatch:
    """`batch` with its tensors on `device`."""
    moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in batch_tensors(batch).items()}
    return replace(batch, **moved)
