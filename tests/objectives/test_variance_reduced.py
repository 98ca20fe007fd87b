"""The variance-reduced loss by enumeration: of data pairs, labels and auxiliary draws, on three completions of one prompt."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from polyref.errors import ConfigError
from polyref.objectives import PairLoss, VarianceReduced, optimal_control, realised_factor, term_variances, variance_reduced
from polyref.objectives.pairwise import LOSSES, hinge, ipo, sigmoid, smoothed

EVERY = {name: make(0.3, 0.15 if name in ("smoothed", "robust") else 0.0) for name, make in LOSSES.items()}
every_loss = pytest.mark.parametrize("loss", EVERY.values(), ids=EVERY)

ORDERED = list(itertools.permutations(range(3), 2))
UNORDERED = list(itertools.combinations(range(3), 2))
REWARD = torch.tensor([0.4, -0.3, 1.1], dtype=torch.float64)
MU = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
CYCLE = torch.tensor([[0.5, 0.8, 0.3], [0.2, 0.5, 0.65], [0.7, 0.35, 0.5]], dtype=torch.float64)


def bradley_terry(reward: Tensor) -> Tensor:
    return torch.sigmoid(reward[:, None] - reward[None, :])


def any_antisymmetric(seed: int) -> Tensor:
    logits = 2 * torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.sigmoid(logits - logits.T)


def law_of(pairs: list[tuple[int, int]], mu: Tensor = MU) -> Tensor:
    """Independent draws from mu, drawn again until distinct; an unordered pair holds both of its orders."""
    law = torch.stack([mu[i] * mu[j] for i, j in pairs])
    return law / law.sum()


class Outcomes:
    """Every outcome of (pair, label, M auxiliary pairs) in the rows, with its probability."""

    def __init__(
        self, preference: Tensor, g: Tensor, auxiliary: int, *, pairs=ORDERED, auxiliary_pairs=None, auxiliary_law=None
    ):
        auxiliary_pairs = auxiliary_pairs or pairs
        auxiliary_law = law_of(auxiliary_pairs) if auxiliary_law is None else auxiliary_law
        law, rows, chances = law_of(pairs), [], []
        # The mean over draws does not see their order, so draws are enumerated as multisets, with multinomial chances.
        for draws in itertools.combinations_with_replacement(range(len(auxiliary_pairs)), auxiliary):
            counts = [draws.count(cell) for cell in range(len(auxiliary_pairs))]
            orders = math.factorial(auxiliary) / math.prod(math.factorial(c) for c in counts)
            drawn = orders * math.prod(auxiliary_law[cell].item() ** c for cell, c in enumerate(counts))
            for cell, (i, j) in enumerate(pairs):
                for z in (0, 1):
                    rows.append((i, j, z, *(auxiliary_pairs[d] for d in draws)))
                    chances.append(drawn * law[cell] * (preference[i, j] if z else preference[j, i]))
        self.first, self.second = torch.tensor([row[:2] for row in rows]).T
        self.z = torch.tensor([row[2] for row in rows], dtype=torch.float64)
        self.drawn_first, self.drawn_second = torch.tensor([row[3:] for row in rows]).permute(2, 0, 1)
        self.chance, self.g = torch.stack(chances), g

    def terms(self, reward: Tensor, loss: PairLoss, control: float = 1.0) -> VarianceReduced:
        """`reward` (3,), or one row an outcome."""
        rows = reward.expand(len(self.z), 3)
        h = rows.gather(1, self.first[:, None]) - rows.gather(1, self.second[:, None])
        drawn_h = rows.gather(1, self.drawn_first) - rows.gather(1, self.drawn_second)
        g, drawn_g = self.g[self.first, self.second], self.g[self.drawn_first, self.drawn_second]
        return variance_reduced(h[:, 0], self.z, g, drawn_h, drawn_g, loss, control=control)

    def mean(self, values: Tensor) -> Tensor:
        return self.chance @ values

    def variance(self, values: Tensor) -> Tensor:
        return self.chance @ (values - self.mean(values)) ** 2


def value_and_slope(expectation, reward: Tensor) -> tuple[Tensor, Tensor]:
    reward = reward.clone().requires_grad_()
    value = expectation(reward)
    return value.detach(), torch.autograd.grad(value, reward)[0]


# Expectation.


@every_loss
@pytest.mark.parametrize("control", [1.0, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_no_auxiliary_model_biases_the_loss_or_its_gradient(loss, control, seed):
    outcomes = Outcomes(CYCLE, any_antisymmetric(seed), 2)
    assert outcomes.chance.sum().item() == pytest.approx(1)
    found = value_and_slope(lambda r: outcomes.mean(outcomes.terms(r, loss, control).loss), REWARD)
    plain = value_and_slope(lambda r: outcomes.mean(loss(r[outcomes.first] - r[outcomes.second], outcomes.z)), REWARD)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)


@every_loss
def test_the_unordered_law_suffices_as_for_pairs_kept_chosen_first(loss):
    g = any_antisymmetric(1)
    either, sorted_draws = Outcomes(CYCLE, g, 2), Outcomes(CYCLE, g, 2, auxiliary_pairs=UNORDERED)
    torch.testing.assert_close(
        *(value_and_slope(lambda r, o=o: o.mean(o.terms(r, loss).loss), REWARD) for o in (either, sorted_draws))
    )
    h, z, drawn_h, drawn_g = torch.randn(4, 9, dtype=torch.float64).unbind()
    g, drawn_h, drawn_g, z = drawn_g.sigmoid(), drawn_h[:, None], drawn_g.sigmoid()[:, None], z.sigmoid()
    turned = variance_reduced(-h, 1 - z, 1 - g, -drawn_h, 1 - drawn_g, loss)
    torch.testing.assert_close(turned, variance_reduced(h, z, g, drawn_h, drawn_g, loss))


@every_loss
def test_if_only_the_auxiliary_model_is_right_the_loss_is_that_of_the_auxiliary_law(loss):
    other = law_of(ORDERED, torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64))
    outcomes = Outcomes(CYCLE, CYCLE, 2, auxiliary_law=other)
    h, p = (torch.stack([table[i, j] for i, j in ORDERED]) for table in (REWARD[:, None] - REWARD[None, :], CYCLE))
    found = outcomes.mean(outcomes.terms(REWARD, loss).loss)
    torch.testing.assert_close(found, other @ loss(h, p))
    assert (found - law_of(ORDERED) @ loss(h, p)).abs() > 1e-3
    wrong = Outcomes(CYCLE, any_antisymmetric(0), 2, auxiliary_law=other)
    assert (wrong.mean(wrong.terms(REWARD, loss).loss) - other @ loss(h, p)).abs() > 1e-3


# Variance.


def parts(preference: Tensor, loss: PairLoss) -> tuple[float, float]:
    """E Var(l | pair) and Var(E[l | pair]), from conditional moments."""
    law = law_of(UNORDERED)
    h, p = (torch.stack([table[i, j] for i, j in UNORDERED]) for table in (REWARD[:, None] - REWARD[None, :], preference))
    won, lost = loss(h), loss(-h)
    mean = p * won + (1 - p) * lost
    within = p * won**2 + (1 - p) * lost**2 - mean**2
    return (law @ within).item(), (law @ mean**2 - (law @ mean) ** 2).item()


@every_loss
@pytest.mark.parametrize("drawn", [1, 4, 16])
def test_the_variance_under_the_true_model(loss, drawn):
    outcomes = Outcomes(CYCLE, CYCLE, drawn, pairs=UNORDERED)
    within, between = parts(CYCLE, loss)
    terms = outcomes.terms(REWARD, loss)
    assert outcomes.variance(terms.data).item() == pytest.approx(within + between, rel=1e-10)
    assert outcomes.variance(terms.loss).item() == pytest.approx(within + between / drawn, rel=1e-10)


@every_loss
@pytest.mark.parametrize("drawn", [1, 4, 16])
def test_the_control_coefficient_is_the_best_of_a_grid_and_never_worse_than_plain(loss, drawn):
    outcomes = Outcomes(CYCLE, CYCLE, drawn, pairs=UNORDERED)

    def variance(control: float) -> float:
        return outcomes.variance(outcomes.terms(REWARD, loss, control).loss).item()

    best = variance(optimal_control(drawn))
    assert best <= min(variance(c / 20) for c in range(31)) * (1 + 1e-12)
    assert best < variance(0.0) == pytest.approx(outcomes.variance(outcomes.terms(REWARD, loss).data).item())
    if drawn == 1:
        assert variance(1.0) == pytest.approx(variance(0.0), rel=1e-10)


@pytest.mark.parametrize("drawn", [1, 4, 16])
def test_simulated_variances_and_the_realised_factor(drawn):
    """Four standard errors of a sample variance at 100,000 pairs, from the fourth moment of the sample."""
    generator, pairs = torch.Generator().manual_seed(drawn), 100_000
    cells = torch.multinomial(law_of(ORDERED), pairs * (1 + drawn), replacement=True, generator=generator)
    first, second = torch.tensor(ORDERED)[cells].view(pairs, 1 + drawn, 2).unbind(-1)
    h = (REWARD[:, None] - REWARD[None, :])[first, second]
    g = CYCLE[first, second]
    z = (torch.rand(pairs, generator=generator, dtype=torch.float64) < g[:, 0]).double()
    terms = variance_reduced(h[:, 0], z, g[:, 0], h[:, 1:], g[:, 1:], sigmoid)
    within, between = parts(CYCLE, sigmoid)
    found = term_variances(terms)
    for values, variance, expected in (
        (terms.data, found.data, within + between),
        (terms.correction, found.correction, between),
        (terms.auxiliary, found.auxiliary, between / drawn),
        (terms.loss, found.loss, within + between / drawn),
    ):
        error = ((values - values.mean()) ** 2).std() / pairs**0.5
        assert abs(variance - expected) < 4 * error
    assert realised_factor(terms).item() == pytest.approx((within + between) / (within + between / drawn), rel=0.03)


def gradient_covariance(outcomes: Outcomes, reward: Tensor, control: float) -> Tensor:
    rows = reward.repeat(len(outcomes.z), 1).requires_grad_()
    (slopes,) = torch.autograd.grad(outcomes.terms(rows, sigmoid, control).loss.sum(), rows)
    slopes = slopes - outcomes.mean(slopes)
    return slopes.T @ (outcomes.chance[:, None] * slopes)


@pytest.mark.parametrize("drawn", [1, 4, 16])
def test_a_right_bradley_terry_model_leaves_the_gradient_variance_at_the_optimum(drawn):
    preference = bradley_terry(REWARD)
    outcomes = Outcomes(preference, preference, drawn, pairs=UNORDERED)
    plain = gradient_covariance(outcomes, REWARD, 0.0)
    for control in (1.0, optimal_control(drawn)):
        torch.testing.assert_close(gradient_covariance(outcomes, REWARD, control), plain, rtol=1e-10, atol=1e-14)
    assert (
        outcomes.variance(outcomes.terms(REWARD, sigmoid).loss)
        <= outcomes.variance(outcomes.terms(REWARD, sigmoid).data) + 1e-12
    )


def test_misspecification_is_where_the_gradient_variance_falls():
    pseudo_true = torch.zeros(3, dtype=torch.float64)
    outcomes = Outcomes(CYCLE, CYCLE, 4, pairs=UNORDERED)
    for _ in range(200):
        pseudo_true = (
            pseudo_true - 4 * value_and_slope(lambda r: outcomes.mean(outcomes.terms(r, sigmoid).data), pseudo_true)[1]
        )
    plain, reduced = (gradient_covariance(outcomes, pseudo_true, c).trace() for c in (0.0, 1.0))
    assert reduced < 0.95 * plain
    alone = Outcomes(CYCLE, CYCLE, 1, pairs=UNORDERED)
    torch.testing.assert_close(gradient_covariance(alone, pseudo_true, 1.0).trace(), plain)


# Numbers and gradients.


def random_pairs(*shape: int, drawn: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """h, z, g, auxiliary_h, auxiliary_g with soft labels, off the kinks of the hinge."""
    generator = torch.Generator().manual_seed(7)
    h, drawn_h = (2 * torch.randn(*shape, n, dtype=torch.float64, generator=generator) for n in (1, drawn))
    z, g, drawn_g = (torch.rand(*shape, n, dtype=torch.float64, generator=generator) for n in (1, 1, drawn))
    h, drawn_h = (x + 0.02 * ((x.abs() - 1).abs() < 0.01) for x in (h, drawn_h))
    return tuple(x.to(dtype) for x in (h[..., 0], z[..., 0], g[..., 0], drawn_h, drawn_g))


@every_loss
@pytest.mark.parametrize("control", [1.0, 0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_its_three_terms(loss, control, dtype):
    pairs = random_pairs(4, 5, dtype=dtype)
    terms = variance_reduced(*pairs, loss, control=control)
    torch.testing.assert_close(terms.loss, terms.data - control * terms.correction + control * terms.auxiliary)
    assert all(term.shape == (4, 5) and term.dtype == dtype for term in terms)
    torch.testing.assert_close(terms.data, loss(pairs[0], pairs[1]))


@pytest.mark.parametrize("h", [1e-6, 1e-3, 0.7, 30.0, 1e4])
def test_the_data_part_of_sigmoid_is_linear_to_the_last_digit(h):
    """Auxiliary pairs of loss 0 leave it alone; l(h) - l(-h) in float32 would have an error of 1e-7 whatever h."""
    h = torch.tensor([h, -h], requires_grad=True)
    z, g = torch.tensor([1.0, 0.25]), torch.tensor([0.3, 0.9])
    loss = variance_reduced(h, z, g, torch.full((2, 1), 1000.0), torch.ones(2, 1), sigmoid).loss
    expected = -(z.double() - g.double()) * h.detach().double()
    torch.testing.assert_close(loss.detach(), expected.float(), rtol=1e-7, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), h)[0], -(z - g), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("loss", "slope"), [(partial(ipo, beta=0.3), 2 / 0.3**2), (partial(smoothed, epsilon=0.1), 0.8)], ids=["ipo", "smoothed"]
)
def test_the_label_enters_linearly_for_the_other_smooth_losses_too(loss, slope):
    h, z, g, drawn_h, drawn_g = random_pairs(6)
    terms = variance_reduced(h, z, g, drawn_h, drawn_g, loss)
    torch.testing.assert_close(terms.loss - terms.auxiliary, -(z - g) * slope * h)


@every_loss
@pytest.mark.parametrize("control", [1.0, 0.75])
def test_gradients_match_finite_differences(loss, control):
    h, z, g, drawn_h, drawn_g = random_pairs(6)
    inputs = (h.requires_grad_(), drawn_h.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: variance_reduced(a, z, g, b, drawn_g, loss, control=control).loss, inputs)


@every_loss
def test_the_auxiliary_model_carries_no_gradient(loss):
    h, z, g, drawn_h, drawn_g = random_pairs(5)
    g.requires_grad_(), drawn_g.requires_grad_(), h.requires_grad_()
    sum(variance_reduced(h, z, g, drawn_h, drawn_g, loss, control=0.5)).sum().backward()
    assert g.grad is None and drawn_g.grad is None and h.grad.abs().sum() > 0


@every_loss
def test_one_by_one_is_all_at_once(loss):
    pairs = random_pairs(4)
    h, drawn_h = pairs[0].requires_grad_(), pairs[3].requires_grad_()
    together = variance_reduced(*pairs, loss)
    alone = [variance_reduced(*(x[i : i + 1] for x in pairs), loss) for i in range(4)]
    for term, parts_of_it in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(term, torch.cat(parts_of_it), rtol=1e-15, atol=1e-15)
    for gradient in torch.autograd.grad(together.loss[2], (h, drawn_h)):
        assert not gradient[[0, 1, 3]].any()


@every_loss
@pytest.mark.parametrize("control", [1.0, 0.8])
def test_finite_at_extreme_differences(loss, control):
    h = torch.tensor([-1e5, -200.0, 0.0, 200.0, 1e5], requires_grad=True)
    drawn_h = torch.stack([h.detach(), -h.detach()], -1).requires_grad_()
    g = torch.tensor([0.0, 0.3, 1.0, 0.7, 1.0])
    terms = variance_reduced(h, 1.0, g, drawn_h, torch.stack([g, 1 - g], -1), loss, control=control)
    terms.loss.sum().backward()
    assert all(term.isfinite().all() for term in terms)
    assert h.grad.isfinite().all() and drawn_h.grad.isfinite().all()


def test_no_control_is_the_plain_loss_and_half_a_label_is_both():
    pairs = random_pairs(5)
    torch.testing.assert_close(variance_reduced(*pairs, hinge, control=0.0).loss, hinge(pairs[0], chosen_probability=pairs[1]))
    h, _, *rest = pairs
    soft, won, lost = (variance_reduced(h, z, *rest, sigmoid).loss for z in (0.5, 1.0, 0.0))
    torch.testing.assert_close(soft, (won + lost) / 2)


def test_variances_of_the_terms_are_those_of_the_pairs():
    terms = variance_reduced(*random_pairs(3, 4), sigmoid)
    found = term_variances(VarianceReduced(*(t.float().requires_grad_() for t in terms)))
    assert found.loss.item() == pytest.approx(torch.var(terms.loss).item(), rel=1e-5) and not found.loss.requires_grad
    assert realised_factor(terms) == terms.data.var() / terms.loss.var()
    assert realised_factor(variance_reduced(*random_pairs(1), sigmoid)).isnan()


def test_shapes_that_would_mix_pairs_are_refused():
    h, z, g, drawn_h, drawn_g = random_pairs(3)
    with pytest.raises(ConfigError, match=r"g has shape \(3, 1\) and z \(3,\) for pairs of shape \(3,\)"):
        variance_reduced(h, z, g[:, None], drawn_h, drawn_g, sigmoid)
    with pytest.raises(ConfigError, match=r"z \(1, 3\)"):
        variance_reduced(h, z[None], g, drawn_h, drawn_g, sigmoid)
    for bad_h, bad_g in ((drawn_h[:2], drawn_g[:2]), (drawn_h, drawn_g[:, :2]), (drawn_h[:, :0], drawn_g[:, :0]), (h, g)):
        with pytest.raises(ConfigError, match=r"auxiliary_h has shape .* M >= 1"):
            variance_reduced(h, z, g, bad_h, bad_g, sigmoid)
    with pytest.raises(ConfigError, match="control is nan"):
        variance_reduced(h, z, g, drawn_h, drawn_g, sigmoid, control=math.nan)
    with pytest.raises(ConfigError, match="0 auxiliary pairs"):
        optimal_control(0)
