"""The predicted precision of the tabular fit, against many fits of drawn data."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from polyref.errors import ConfigError
from polyref.theory.asymptotics import error_covariance, pseudo_true
from polyref.theory.estimators import fit_tabular
from polyref.theory.preferences import bradley_terry, intransitive, pair_law
from polyref.theory.sampling import count_wins, draw_pairs, draw_wins

CONTEXTS, ACTIONS, PAIRS, REPLICATES = 2, 3, 2000, 1500


def problem(strength: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The law of the pairs, and intransitive preferences."""
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn(CONTEXTS, ACTIONS, generator=generator, dtype=torch.float64).mul(0.5).log_softmax(-1)
    rewards = torch.randn(CONTEXTS, ACTIONS, generator=generator, dtype=torch.float64)
    return pair_law(torch.tensor([0.3, 0.7], dtype=torch.float64), mu), intransitive(rewards, strength, generator)


def guess(seed: int = 5) -> Tensor:
    """An auxiliary model that is wrong."""
    table = torch.randn(CONTEXTS, ACTIONS, ACTIONS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.sigmoid(table - table.mT)


def variance_reduced_fits(law: Tensor, preference: Tensor, g: Tensor, auxiliary: int, control: float) -> Tensor:
    """Fits of -c (z - g) h and (1-c) of the data, with soft labels of drawn auxiliary pairs: the loss term by term."""
    generator = torch.Generator().manual_seed(1)
    data = draw_pairs(law, preference, PAIRS, REPLICATES, generator)
    residual = data.z - g[data.contexts, data.first, data.second]
    linear = torch.zeros(REPLICATES, CONTEXTS * ACTIONS, dtype=torch.float64)
    linear.scatter_add_(1, data.contexts * ACTIONS + data.first, residual)
    linear.scatter_add_(1, data.contexts * ACTIONS + data.second, -residual)
    given = (law / law.sum((-2, -1), keepdim=True)).flatten(-2).numpy()
    draws = np.random.default_rng(3)
    used = auxiliary * np.stack([(data.contexts == x).sum(-1) for x in range(CONTEXTS)], -1)
    counts = torch.as_tensor(draws.multinomial(used, given), dtype=torch.float64).view(-1, CONTEXTS, ACTIONS, ACTIONS)
    soft = (counts + counts.mT) * g
    wins = control * soft / auxiliary + (1 - control) * count_wins(data, CONTEXTS, ACTIONS)
    return fit_tabular(wins, linear=control * linear.view(REPLICATES, CONTEXTS, ACTIONS))


def scatter(fits: Tensor, centre: Tensor) -> Tensor:
    """n times the mean square of the error of each reward."""
    return PAIRS * ((fits - centre) ** 2).mean(0)


def diagonal(covariance: Tensor) -> Tensor:
    return covariance.diagonal(dim1=-2, dim2=-1)


@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_the_plain_fit_scatters_as_predicted(strength: float) -> None:
    law, preference = problem(strength)
    centre = pseudo_true(law, preference)
    fits = fit_tabular(draw_wins(law, preference, PAIRS, REPLICATES, torch.Generator().manual_seed(2)))
    ratio = scatter(fits, centre) / diagonal(error_covariance(law, preference, centre))
    assert (ratio - 1).abs().max() < 5 * math.sqrt(2 / REPLICATES)


@pytest.mark.parametrize(("auxiliary", "control"), [(1, 1.0), (4, 1.0), (2, 2 / 3)])
def test_the_variance_reduced_fit_scatters_as_predicted_even_with_a_wrong_guess(auxiliary: int, control: float) -> None:
    law, preference = problem(2.0)
    centre = pseudo_true(law, preference)
    fits = variance_reduced_fits(law, preference, guess(), auxiliary, control)
    covariance = error_covariance(law, preference, centre, g=guess(), auxiliary_pairs=auxiliary, control=control)
    ratio = scatter(fits, centre) / diagonal(covariance)
    assert (ratio - 1).abs().max() < 5 * math.sqrt(2 / REPLICATES)


def test_where_bradley_terry_is_right_a_true_guess_changes_nothing() -> None:
    law, preference = problem(0.0)
    centre = pseudo_true(law, preference)
    torch.testing.assert_close(bradley_terry(centre), preference, atol=1e-6, rtol=0)
    plain = error_covariance(law, preference, centre)
    for auxiliary in (1, 4, math.inf):
        reduced = error_covariance(law, preference, centre, g=preference, auxiliary_pairs=auxiliary)
        torch.testing.assert_close(reduced, plain, rtol=1e-5, atol=1e-8)


def test_where_it_is_wrong_a_true_guess_gains_from_four_pairs_and_nothing_from_one() -> None:
    law, preference = problem(2.0)
    centre = pseudo_true(law, preference)
    plain = error_covariance(law, preference, centre)

    def eigenvalues(auxiliary: float, control: float = 1.0) -> Tensor:
        reduced = error_covariance(law, preference, centre, g=preference, auxiliary_pairs=auxiliary, control=control)
        return torch.linalg.eigvalsh(plain - reduced)

    assert eigenvalues(4).amax() > 0.05 * plain.diagonal(dim1=-2, dim2=-1).amax() and eigenvalues(4).amin() > -1e-9
    torch.testing.assert_close(eigenvalues(1), torch.zeros(CONTEXTS, ACTIONS, dtype=torch.float64), atol=1e-9, rtol=0)
    assert eigenvalues(1, control=0.5).amin() > -1e-9 and eigenvalues(1, control=0.5).amax() > 0.05


def test_a_context_without_pairs_changes_no_other() -> None:
    law, preference = problem(2.0)
    for g in (None, guess()):
        whole = error_covariance(law, preference, pseudo_true(law, preference), g=g)
        empty = law.clone()
        empty[0] = 0
        found = error_covariance(empty, preference, pseudo_true(empty, preference), g=g)
        assert (found[0] == 0).all()
        torch.testing.assert_close(found[1], whole[1])


def test_fewer_than_one_auxiliary_pair_is_refused() -> None:
    law, preference = problem(1.0)
    with pytest.raises(ConfigError, match="auxiliary_pairs is 0"):
        error_covariance(law, preference, pseudo_true(law, preference), g=preference, auxiliary_pairs=0)
