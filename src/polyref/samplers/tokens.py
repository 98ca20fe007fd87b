"""A next token from logits and one uniform number, and the law it is drawn from."""

from __future__ import annotations

import torch
from torch import Tensor

from polyref.samplers.engine import SamplingParameters


def next_tokens(logits: Tensor, uniforms: Tensor, parameters: SamplingParameters) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (R,), their log-probabilities under the model and under the law drawn from, by inverting the distribution.

    `logits` (R, V), `uniforms` (R,) float64 in [0, 1): the token is the first whose cumulative probability exceeds the number.
    """
    own, law = laws(logits, parameters)
    cumulative = law.exp().cumsum(-1)
    token = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]
    if (beyond := token == logits.shape[-1]).any():  # rounding must not step over the last token of the support
        token[beyond] = (law[beyond] > -torch.inf).long().cumsum(-1).argmax(-1)
    return token, own.gather(-1, token[:, None])[:, 0], law.gather(-1, token[:, None])[:, 0]


def laws(logits: Tensor, parameters: SamplingParameters) -> tuple[Tensor, Tensor]:
    """log-probabilities (R, V) in float64 under the model, and under its temperature cut to the likeliest `top_p`."""
    own = logits.to(torch.float64).log_softmax(-1)
    law = (own / parameters.temperature).log_softmax(-1) if parameters.temperature != 1 else own
    if parameters.top_p < 1:
        order = law.argsort(dim=-1, descending=True, stable=True)
        before = law.gather(-1, order).exp().cumsum(-1).roll(1, -1)
        before[:, 0] = 0  # the likeliest token is always kept
        outside = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= parameters.top_p)
        law = law.masked_fill(outside, -torch.inf).log_softmax(-1)
    return own, law
