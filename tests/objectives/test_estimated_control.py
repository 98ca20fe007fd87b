"""The control coefficient that is estimated from pairs, against what is best by enumeration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyref.errors import ConfigError
from polyref.objectives import PairLoss, control_moments, estimated_control, optimal_control, variance_reduced
from polyref.objectives.pairwise import LOSSES, sigmoid

BETA, FLIPS = 0.3, 0.15
EVERY = {name: make(BETA, FLIPS if name in ("smoothed", "robust") else 0.0) for name, make in LOSSES.items()}
every_loss = pytest.mark.parametrize("loss", EVERY.values(), ids=EVERY)

PAIRS = torch.tensor([(0, 1), (0, 2), (1, 2)])
LAW = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
TRUE = torch.tensor([0.8, 0.3, 0.65], dtype=torch.float64)  # a cycle: no reward explains it
WRONG = [
    torch.tensor(g, dtype=torch.float64) for g in ((0.1, 0.9, 0.45), (0.5, 0.5, 0.5), (0.95, 0.2, 0.9), (0.99, 0.01, 0.99))
]
REWARD = torch.tensor([0.4, -0.3, 1.1], dtype=torch.float64)


def difference(reward: Tensor) -> Tensor:
    """h of the three pairs of completions, from rewards (..., 3)."""
    return reward[..., PAIRS[:, 0]] - reward[..., PAIRS[:, 1]]


def expected_moments(h: Tensor, g: Tensor, loss: PairLoss) -> Tensor:
    """The mean of `control_moments` over pairs and labels."""
    label_laws = torch.stack([1 - TRUE, TRUE])
    return sum(LAW[i] * label_laws[z, i] * control_moments(h[i], float(z), g[i], loss) for i in range(3) for z in (0, 1))  # type: ignore[return-value]


def gradient_variance(reward: Tensor, g: Tensor, loss: PairLoss, control: float, drawn: int = 1) -> float:
    """Trace of the gradient's covariance over pairs, labels and `drawn` independent auxiliary pairs, in the three rewards."""
    draws = torch.cartesian_prod(*[torch.arange(3)] * drawn).reshape(-1, drawn)
    cells = [(i, z, k) for i in range(3) for z in (0, 1) for k in range(len(draws))]
    own, label, drawn_cells = (torch.tensor(x) for x in zip(*cells, strict=True))
    chance = LAW[own] * torch.where(label == 1, TRUE[own], 1 - TRUE[own]) * LAW[draws].prod(1)[drawn_cells]
    rows = reward.repeat(len(cells), 1).requires_grad_()
    h = difference(rows)
    auxiliary = draws[drawn_cells]
    found = variance_reduced(
        h.gather(1, own[:, None])[:, 0], label.double(), g[own], h.gather(1, auxiliary), g[auxiliary], loss, control=control
    )
    (slopes,) = torch.autograd.grad(found.loss.sum(), rows)
    return float(chance @ ((slopes - chance @ slopes) ** 2).sum(1))


def optimum(loss: PairLoss) -> Tensor:
    """The rewards that plain training would end at."""
    reward = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([reward], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def value() -> Tensor:
        search.zero_grad()
        mean = LAW @ loss(difference(reward), chosen_probability=TRUE)
        mean.backward()
        return mean

    search.step(value)
    return reward.detach()


def test_of_sigmoid_the_sums_are_those_of_labels_and_predictions_less_the_models_own() -> None:
    generator = torch.Generator().manual_seed(0)
    h, z, g = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)
    z, g, s = z.sigmoid(), g.sigmoid(), h.sigmoid()
    expected = torch.stack([((z - s) * (g - s)).sum(), ((g - s) ** 2).sum()])
    torch.testing.assert_close(control_moments(h.requires_grad_(), z, g, sigmoid), expected, rtol=1e-14, atol=0)
    with torch.no_grad():
        found = control_moments(h.detach().float(), 1.0, g.float(), sigmoid)
    assert found.dtype == torch.float64 and not found.requires_grad
    assert float(found[1]) == pytest.approx(float(expected[1]), rel=1e-6)


@every_loss
def test_the_slopes_are_those_worked_out_by_hand(loss: PairLoss) -> None:
    h, g = torch.tensor([-1.7, 0.4, 2.3], dtype=torch.float64), TRUE
    s = h.sigmoid()
    by_hand = {
        "sigmoid": lambda p: s - p,
        "hinge": lambda p: (1 - p) * (h > -1) - p * (h < 1),
        "ipo": lambda p: 2 / BETA**2 * (h + 0.5 - p),
        "smoothed": lambda p: s - p * (1 - FLIPS) - (1 - p) * FLIPS,
        "robust": lambda p: s - (p - FLIPS) / (1 - 2 * FLIPS),
    }
    slope = by_hand[next(name for name in EVERY if EVERY[name] is loss)]
    for z in (torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), 1.0):
        label = slope(torch.as_tensor(z, dtype=torch.float64))
        expected = torch.stack([(label * slope(g)).sum(), (slope(g) ** 2).sum()])
        torch.testing.assert_close(control_moments(h, z, g, loss), expected)


@every_loss
@pytest.mark.parametrize("drawn", [1, 4, 16])
def test_a_right_auxiliary_model_has_the_optimal_coefficient_whatever_the_policy(loss: PairLoss, drawn: int) -> None:
    found = estimated_control(expected_moments(difference(REWARD), TRUE, loss), drawn)
    assert found == pytest.approx(optimal_control(drawn), rel=1e-12)


@pytest.mark.parametrize("g", WRONG, ids=str)
def test_a_wrong_auxiliary_model_has_none_beside_a_right_policy(g: Tensor) -> None:
    assert abs(estimated_control(expected_moments(TRUE.logit(), g, sigmoid), 4)) < 1e-12


@every_loss
def test_a_model_that_knows_nothing_has_hardly_any(loss: PairLoss) -> None:
    """Four standard errors, at a policy that prefers nothing: predictions of random sign, labels of their own."""
    generator = torch.Generator().manual_seed(0)
    pairs, h = 20_000, torch.zeros(20_000, dtype=torch.float64)
    z = (torch.rand(pairs, generator=generator, dtype=torch.float64) < TRUE[0]).double()
    g = torch.rand(pairs, generator=generator, dtype=torch.float64)
    assert estimated_control(control_moments(h, z, g, loss), 4) < 4 * (1 / 12) ** -0.5 / (2 * pairs**0.5) / (1 - 2 * FLIPS)


@every_loss
@pytest.mark.parametrize("drawn", [1, 2])
@pytest.mark.parametrize("g", [TRUE, *WRONG], ids=str)
def test_the_gradient_never_varies_more_than_the_plain_one_at_the_optimum(loss: PairLoss, g: Tensor, drawn: int) -> None:
    at = optimum(loss) if loss is not EVERY["hinge"] else REWARD / 4  # hinge has kinks there: any point off them will do
    chosen = estimated_control(expected_moments(difference(at), g, loss), drawn)
    plain = gradient_variance(at, g, loss, 0.0)
    if loss is not EVERY["hinge"]:
        assert gradient_variance(at, g, loss, chosen, drawn) <= plain * (1 + 1e-9)
    if g is TRUE:
        best = min(gradient_variance(at, g, loss, c / 20, drawn) for c in range(21))
        assert gradient_variance(at, g, loss, chosen, drawn) <= best * (1 + 1e-9) < plain * (1 + 1e-9)


def test_it_is_clipped_and_falls_back_on_the_optimal_one() -> None:
    assert estimated_control(torch.tensor([-3.0, 2.0]), 4) == 0.0
    assert estimated_control(torch.tensor([3.0, 2.0]), 4) == 1.0
    assert estimated_control(torch.tensor([1.0, 2.0]), 4) == pytest.approx(0.4)
    assert estimated_control(torch.zeros(2), 4) == optimal_control(4)
    with pytest.raises(ConfigError, match="0 auxiliary pairs"):
        estimated_control(torch.zeros(2), 0)
