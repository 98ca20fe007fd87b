"""Log-probabilities of target tokens from hidden states, without ever holding positions x vocabulary.

log p(t | h) = z_t - logsumexp(z), z = f(scale * (W h + b)), f the identity or a soft cap c tanh(z / c). The N positions pass in
chunks: a chunk's logits are made, reduced and dropped. With W frozen the gradient to h is formed in the forward pass (one
product with W fewer); with W trained, logits are made again in the backward pass and dW accumulates in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polyref.errors import ModelError

LOGIT_BUDGET = 2**24
"""Logits held at once (64 MiB in float32): the chunk is this many divided by the vocabulary size."""


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does to `lm_head(h)` before its softmax: multiply by `scale`, then cap softly at `cap` when given."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """(n, V) raw head outputs -> (n, V) logits, in float32 at least."""
        logits = logits.to(_accumulator(logits.dtype))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def backward_(self, grad: Tensor, logits: Tensor | None) -> Tensor:
        """Gradient to the raw head outputs, in place, from that to the `logits` it returned (needed under a cap)."""
        if self.cap is not None and logits is not None:
            grad.mul_(1 - (logits / self.cap) ** 2)
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


def token_logps(hidden: Tensor, targets: Tensor, head: nn.Module, transform: LogitTransform | None = None) -> Tensor:
    """log p(target | hidden): hidden (N, H), targets (N,) int64 -> (N,) in nats, float32 (float64 for a float64 model).

    A plain `nn.Linear` head takes the fused path; any other module (adapters on the head, quantised weights) is called chunk by
    chunk under activation checkpointing.
    """
    transform = transform or LogitTransform()
    if type(head) is nn.Linear:
        with torch.autocast(hidden.device.type, enabled=False):
            logps: Tensor = _LinearLogps.apply(hidden.to(head.weight.dtype), head.weight, head.bias, targets, transform)
        return logps

    def score(states: Tensor, wanted: Tensor) -> Tensor:
        return _gather_logps(transform(head(states)), wanted)

    vocabulary = int(getattr(head, "out_features", 2**17))
    parts = [
        checkpoint(score, hidden[i], targets[i], use_reentrant=False)
        if torch.is_grad_enabled()
        else score(hidden[i], targets[i])
        for i in _chunks(len(targets), vocabulary)
    ]
    return torch.cat(parts)


def _chunks(n: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, LOGIT_BUDGET // vocabulary)
    return (slice(i, i + size) for i in range(0, n, size))


def _gather_logps(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: LogitTransform
    ) -> Tensor:
        ctx.transform = transform
        ctx.head_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        keep_gradient = hidden.requires_grad and not ctx.head_trained
        logps = torch.empty(len(targets), dtype=_accumulator(hidden.dtype), device=hidden.device)
        normaliser = torch.empty_like(logps)
        unit_gradient = torch.empty_like(hidden) if keep_gradient else None
        for i in _chunks(len(targets), weight.shape[0]):
            logits = transform(nn.functional.linear(hidden[i], weight, bias))
            normaliser[i] = logits.logsumexp(1)
            logps[i] = logits.gather(1, targets[i, None])[:, 0] - normaliser[i]
            if unit_gradient is not None:
                d = _logit_gradient(logits, normaliser[i], targets[i], None, transform)
                unit_gradient[i] = d.to(weight.dtype) @ weight
        if unit_gradient is not None:
            ctx.save_for_backward(unit_gradient)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, normaliser)
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        if torch.is_grad_enabled():  # under create_graph: what it returns is a constant, and a second derivative lacks terms
            raise ModelError("this head gives no second derivative", fix="leave create_graph out, or plan with fused=False")
        (grad,) = grads
        if not ctx.head_trained:
            (unit_gradient,) = ctx.saved_tensors
            return unit_gradient * grad[:, None].to(unit_gradient.dtype), None, None, None, None
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, dtype=normaliser.dtype, device=weight.device)
        d_bias = None if bias is None else torch.zeros(bias.shape, dtype=normaliser.dtype, device=bias.device)
        for i in _chunks(len(targets), weight.shape[0]):
            logits = ctx.transform(nn.functional.linear(hidden[i], weight, bias))
            d = _logit_gradient(logits, normaliser[i], targets[i], grad[i], ctx.transform)
            d_hidden[i] = d.to(weight.dtype) @ weight
            d_weight.addmm_(d.T, hidden[i].to(d.dtype))
            if d_bias is not None:
                d_bias += d.sum(0)
        d_bias = d_bias.to(bias.dtype) if d_bias is not None else None
        return d_hidden, d_weight.to(weight.dtype), d_bias, None, None


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _logit_gradient(
    logits: Tensor, normaliser: Tensor, targets: Tensor, grad: Tensor | None, transform: LogitTransform
) -> Tensor:
    """grad * d log p(target) / d raw logits, (n, V) float32: one-hot minus softmax, through the transform.

    Overwrites `logits` unless the transform still needs them.
    """
    kept = logits if transform.cap is not None else None
    d = (logits - normaliser[:, None]).exp_() if kept is not None else logits.sub_(normaliser[:, None]).exp_()
    d.neg_()
    d[torch.arange(len(targets), device=d.device), targets] += 1
    if grad is not None:
        d.mul_(grad[:, None])
    return transform.backward_(d, kept)
