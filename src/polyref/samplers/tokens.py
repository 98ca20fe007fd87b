"""A next token drawn from logits, and the law that it is drawn from.

A coupling is how a sequence's stream of randomness chooses tokens. Any is exact; they differ in how often rounding, as of
another batch, makes them choose another token. Where log-probabilities move by about e, the chance that one token changes is

    INVERSE  one uniform number a token, found in the cumulative distribution: up to about e times the tokens likelier than e
    RACE     an exponential number E_i for each token i of the vocabulary, the least E_i / p_i wins: about e
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyref.samplers.engine import SamplingParameters

_AT_ONCE = 2**16
"""Log-probabilities that are worked on together on a CPU: what is made of them stays in a core's own cache."""


class Coupling(NamedTuple):
    """`stream` makes of a key of 128 bits and a length what a sequence keeps; `choose` gives tokens (R,) for log-probabilities
    (R, V), the streams of the rows, and the steps that they are at.
    """

    stream: Callable[[int, int], Any]
    choose: Callable[[Tensor, Sequence[Any], Sequence[int]], Tensor]


def next_tokens(
    logits: Tensor, streams: Sequence[Any], steps: Sequence[int], parameters: SamplingParameters, coupling: Coupling
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (R,) after `logits` (R, V), and their log-probabilities under the model and under the law drawn from."""
    at_once = max(_AT_ONCE // logits.shape[-1], 1) if logits.device.type == "cpu" else len(logits)
    found = []
    for start in range(0, len(logits), at_once):
        some = slice(start, start + at_once)
        own, law = laws(logits[some], parameters)
        token = coupling.choose(law, streams[some], steps[some])
        found.append((token, own.gather(-1, token[:, None])[:, 0], law.gather(-1, token[:, None])[:, 0]))
    tokens, logps, drawn_logps = map(torch.cat, zip(*found, strict=True))
    return tokens, logps, drawn_logps


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


def _uniforms(key: int, length: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=key)).random(length)


def _invert(law: Tensor, streams: Sequence[np.ndarray], steps: Sequence[int]) -> Tensor:
    """The first token whose cumulative probability exceeds the number of this step."""
    numbers = np.array([stream[step] for stream, step in zip(streams, steps, strict=True)])
    cumulative = law.exp().cumsum(-1)
    uniforms = torch.from_numpy(numbers).to(law.device)
    token = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]
    if (beyond := token == law.shape[-1]).any():  # rounding must not step over the last token of the support
        token[beyond] = (law[beyond] > -torch.inf).long().cumsum(-1).argmax(-1)
    return token


def _first_arrival(law: Tensor, streams: Sequence[int], steps: Sequence[int]) -> Tensor:
    """argmax of log p_i - log E_i, E_i = -log u_i, where u_i is a hash of stream, step and token: the same on any device."""
    vocabulary = law.shape[-1]
    starts = [_signed(stream + step * vocabulary * _GOLDEN) for stream, step in zip(streams, steps, strict=True)]
    at = torch.arange(vocabulary, device=law.device) * _signed(_GOLDEN)
    bits = _mix(torch.tensor(starts, device=law.device)[:, None] + at).bitwise_right_shift_(12).bitwise_and_(2**52 - 1)
    uniform = bits.to(torch.float64).add_(0.5).mul_(2.0**-52)  # never 0, never 1
    return uniform.log_().neg_().log_().neg_().add_(law).argmax(-1)


_GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: Tensor) -> Tensor:
    """The output function of splitmix64 (Steele, Lea and Flood, 2014) in place, of int64, whose products wrap around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(_signed(factor))
    return x.bitwise_xor_((x >> 31).bitwise_and_(2**33 - 1))


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return ((value + 2**63) % 2**64) - 2**63


INVERSE = Coupling(_uniforms, _invert)
"""One uniform number a token."""

RACE = Coupling(lambda key, length: (key ^ (key >> 64)) % 2**64, _first_arrival)
"""A number for each token of the vocabulary: the same sequence in nearly any batch."""
