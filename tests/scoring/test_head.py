"""The chunked head: its values, its gradients, and what it does with caps, scales, biases and extreme logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from polyref.errors import ModelError
from polyref.scoring.head import LogitTransform, token_logps

N, H, V = 13, 6, 17


def setup(bias: bool, trained: bool = True, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, dtype=dtype, generator=generator, requires_grad=True)
    targets = torch.randint(V, (N,), generator=generator)
    head = nn.Linear(H, V, bias=bias, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, H, dtype=dtype, generator=generator))
    return hidden, targets, head.requires_grad_(trained)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 3.0), LogitTransform(2.0)])
def test_value_and_gradients_match_cross_entropy(
    trained: bool, bias: bool, transform: LogitTransform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyref.scoring.head.LOGIT_BUDGET", 4 * V)  # several chunks, the last one short
    hidden, targets, head = setup(bias, trained)
    weights = torch.linspace(-1, 2, N, dtype=torch.float64)
    logits = head(hidden) * transform.scale
    logits = logits if transform.cap is None else transform.cap * torch.tanh(logits / transform.cap)
    expected = -nn.functional.cross_entropy(logits, targets, reduction="none")
    wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    expected_grads = torch.autograd.grad((expected * weights).sum(), wanted)
    logps = token_logps(hidden, targets, head, transform)
    grads = torch.autograd.grad((logps * weights).sum(), wanted)
    torch.testing.assert_close(logps, expected)
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want)


def test_gradcheck() -> None:
    hidden, targets, head = setup(bias=True)

    def score(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        layer = nn.Linear(H, V, dtype=torch.float64)
        del layer.weight, layer.bias
        layer.weight, layer.bias = w, b
        return token_logps(h, targets, layer, LogitTransform(0.7, 5.0))

    assert torch.autograd.gradcheck(score, (hidden, head.weight, head.bias))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("loss", [torch.sum, lambda logps: logps.square().sum()])
def test_a_second_derivative_is_refused_before_it_lacks_terms(
    trained: bool, loss: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """What stands before the head has one of its own, which would be all that autograd finds."""
    hidden, targets, head = setup(bias=True, trained=trained)
    logps = token_logps(hidden.tanh(), targets, head)
    with pytest.raises(ModelError, match="no second derivative; leave create_graph out"):
        torch.autograd.grad(loss(logps), hidden, create_graph=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_gradient_is_the_same_under_activation_checkpointing(reentrant: bool) -> None:
    hidden, targets, head = setup(bias=True)
    grads = []
    for score in (token_logps, partial(checkpoint, token_logps, use_reentrant=reentrant)):
        hidden.grad = head.weight.grad = None
        score(hidden, targets, head).sum().backward()
        grads.append((hidden.grad, head.weight.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_a_head_that_is_not_a_plain_linear_layer_gives_the_same() -> None:
    hidden, targets, head = setup(bias=True)
    plain = token_logps(hidden, targets, head)
    wrapped = token_logps(hidden, targets, nn.Sequential(head))
    torch.testing.assert_close(wrapped, plain)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), hidden)[0] for x in (plain, wrapped)))


def test_finite_at_extreme_logits_and_half_precision_sums_in_float32() -> None:
    hidden, targets, head = setup(bias=False, dtype=torch.float32)
    logps = token_logps(hidden * 1e4, targets, head)
    assert torch.isfinite(logps).all()
    grad = torch.autograd.grad(logps.sum(), hidden)[0]
    assert torch.isfinite(grad).all()
    half = token_logps(hidden.bfloat16(), targets, head.bfloat16())
    assert half.dtype == torch.float32
