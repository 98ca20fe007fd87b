"""Pair objectives: an implied reward difference h becomes one loss per pair. No reduction, no model.

h (...) = r(y_w) - r(y_l) in reward units, from `polyref.references.compose`. `chosen_probability` p = P(y_w preferred) in
[0, 1] is one number or one a pair; every loss is then the expectation p l(h) + (1-p) l(-h) over the label; None means p = 1.

What minimises each one in the population, when the pairs connect all completions (tests/objectives/test_minimisers.py):

- `sigmoid`: the optimum of the KL-regularised reward, when labels are Bradley-Terry;
- `robust(e)`: the same optimum, when those labels are flipped at rate e;
- `smoothed(e)`, e > 0: never that optimum (unless all rewards are equal): it shrinks the implied rewards;
- `ipo`, pairs drawn independently from mu: the optimum with r(y) replaced by P(y beats mu);
- `hinge`: h takes the sign of 2p - 1 pair by pair; no optimum is claimed.

Sources: [DPO] arXiv 2305.18290, [IPO] 2310.12036, [rDPO] 2403.00409, [DrDPO] 2407.07880; hinge: 2305.10425.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from polyref.errors import ConfigError

Probability = Tensor | float | None


class PairLoss(Protocol):
    """(h (...), chosen_probability) -> one loss per pair (...)."""

    def __call__(self, h: Tensor, chosen_probability: Probability = None) -> Tensor: ...


def sigmoid(h: Tensor, *, chosen_probability: Probability = None) -> Tensor:
    """-p log s(h) - (1-p) log s(-h), s the logistic function: h (...) to (...), in nats. Source: [DPO] eq. 7."""
    return _expected(lambda d: -logsigmoid(d), h, chosen_probability)


def hinge(h: Tensor, *, chosen_probability: Probability = None) -> Tensor:
    """p max(0, 1-h) + (1-p) max(0, 1+h): h (...) to (...). Source: arXiv 2305.10425 (SLiC)."""
    return _expected(lambda d: torch.relu(1 - d), h, chosen_probability)


def ipo(h: Tensor, beta: float, *, chosen_probability: Probability = None) -> Tensor:
    """(h/beta - 1/(2 beta))^2, at a soft label p (h/beta - 1/(2 beta))^2 + (1-p) (h/beta + 1/(2 beta))^2.

    h (...) to (...), in squared nats; beta > 0, the one that h was made with, is the tau of the paper. Nothing is divided by
    length: h is of SUMMED log-probabilities, as in the paper. TRL divides each by its completion's token count; for that loss
    make h from mean log-probabilities, and the statement about its minimiser no longer holds. Source: [IPO] eq. 17.
    """
    return _expected(lambda d: (d / beta - 1 / (2 * beta)) ** 2, h, chosen_probability)


def smoothed(h: Tensor, epsilon: float, *, chosen_probability: Probability = None) -> Tensor:
    """-(1-e) log s(h) - e log s(-h), also called cDPO: h (...) to (...), in nats.

    It is `sigmoid` at the label p(1-e) + (1-p)e. ConfigError unless 0 <= epsilon < 1/2. Source: [rDPO], the smoothed form.
    """
    epsilon = _checked_epsilon(epsilon)
    p = _label(h, 1.0 if chosen_probability is None else chosen_probability)
    return sigmoid(h, chosen_probability=p * (1 - epsilon) + (1 - p) * epsilon)


def robust(h: Tensor, epsilon: float, *, chosen_probability: Probability = None) -> Tensor:
    """[-(1-e) log s(h) + e log s(-h)] / (1-2e), whose mean over labels flipped at rate e is `sigmoid` of the true label.

    h (...) to (...), in nats. It is `sigmoid` at the label (p-e)/(1-2e), which undoes the flips, so p here is the NOISY share:
    a clean p takes epsilon = 0. A label outside [0, 1] (a hard one always is) leaves the loss unbounded below in h.
    ConfigError unless 0 <= epsilon < 1/2. Source: [rDPO].
    """
    epsilon = _checked_epsilon(epsilon)
    p = _label(h, 1.0 if chosen_probability is None else chosen_probability)
    return sigmoid(h, chosen_probability=(p - epsilon) / (1 - 2 * epsilon))


def dr_dpo(losses: Tensor, beta_prime: float, *, weights: Tensor | None = None) -> Tensor:
    """-b' log mean exp(-loss/b'): one scalar from the per-pair losses of the WHOLE effective batch [DrDPO].

    It is not the average of its values on parts of the batch, so gradient accumulation and data parallelism gather first. As b'
    grows it tends to the mean. Labels go INSIDE the exponential when `losses` were made with `chosen_probability`: the
    minimiser under Bradley-Terry labels stays. They go OUTSIDE it with `losses` = [l(h), l(-h)] stacked and `weights` =
    [p, 1-p] (same shape, >= 0, not all zero), the mean over drawn labels: under `sigmoid` the implied rewards are then
    stretched by b'/(b'-1), which is why b' <= 1 is a ConfigError.
    """
    if not beta_prime > 1:
        raise ConfigError(f"beta_prime is {beta_prime}", where="dr_dpo", fix="give a value above 1")
    log_weights = (torch.ones_like(losses) if weights is None else weights.to(losses)).log().flatten()
    return beta_prime * (log_weights.logsumexp(0) - (log_weights - losses.flatten() / beta_prime).logsumexp(0))


def _expected(loss: Callable[[Tensor], Tensor], h: Tensor, chosen_probability: Probability) -> Tensor:
    """p loss(h) + (1-p) loss(-h)."""
    if chosen_probability is None:
        return loss(h)
    p = _label(h, chosen_probability)
    return p * loss(h) + (1 - p) * loss(-h)


def _label(h: Tensor, chosen_probability: Tensor | float) -> Tensor:
    """The label in the type and on the device of h: one number, or exactly of h's shape, as a broadcast would mix pairs."""
    p = torch.as_tensor(chosen_probability, dtype=h.dtype, device=h.device)
    if p.dim() and p.shape != h.shape:
        raise ConfigError(
            f"chosen_probability has shape {tuple(p.shape)} for pairs of shape {tuple(h.shape)}", fix="give one number a pair"
        )
    return p


def _checked_epsilon(epsilon: float) -> float:
    if 0 <= epsilon < 0.5:
        return epsilon
    raise ConfigError(f"label_smoothing is {epsilon}", fix="give a flip rate of at least 0 and below 0.5")


def _sigmoid(beta: float, label_smoothing: float) -> PairLoss:
    _refuse_smoothing("sigmoid", label_smoothing)
    return lambda h, chosen_probability=None: sigmoid(h, chosen_probability=chosen_probability)


def _hinge(beta: float, label_smoothing: float) -> PairLoss:
    _refuse_smoothing("hinge", label_smoothing)
    return lambda h, chosen_probability=None: hinge(h, chosen_probability=chosen_probability)


def _ipo(beta: float, label_smoothing: float) -> PairLoss:
    _refuse_smoothing("ipo", label_smoothing)
    return lambda h, chosen_probability=None: ipo(h, beta, chosen_probability=chosen_probability)


def _smoothed(beta: float, label_smoothing: float) -> PairLoss:
    epsilon = _checked_epsilon(label_smoothing)
    return lambda h, chosen_probability=None: smoothed(h, epsilon, chosen_probability=chosen_probability)


def _robust(beta: float, label_smoothing: float) -> PairLoss:
    epsilon = _checked_epsilon(label_smoothing)
    return lambda h, chosen_probability=None: robust(h, epsilon, chosen_probability=chosen_probability)


def _refuse_smoothing(name: str, label_smoothing: float) -> None:
    if label_smoothing != 0:
        raise ConfigError(
            f"loss_type {name!r} does not use label_smoothing={label_smoothing}",
            fix="take loss_type 'robust' (unbiased under flipped labels) or 'smoothed', or label_smoothing 0",
        )


LOSSES: Final[Mapping[str, Callable[[float, float], PairLoss]]] = MappingProxyType(
    {"sigmoid": _sigmoid, "hinge": _hinge, "ipo": _ipo, "smoothed": _smoothed, "robust": _robust}
)
"""loss_type -> factory (beta, label_smoothing) -> PairLoss. A label_smoothing that the loss would ignore is a ConfigError."""


def pair_loss(loss_type: str, beta: float, label_smoothing: float = 0.0) -> PairLoss:
    """The loss named `loss_type` in LOSSES, with its settings bound. ConfigError for an unknown name or beta <= 0."""
    if not isinstance(loss_type, str) or loss_type not in LOSSES:  # TRL's may be a list
        raise ConfigError(f"unknown loss_type {loss_type!r}", fix=f"take one of {', '.join(LOSSES)}")
    if not 0 < beta < float("inf"):
        raise ConfigError(f"beta is {beta}", fix="give a finite value above 0, or nothing holds the policy to its anchor")
    return LOSSES[loss_type](beta, label_smoothing)
