"""Auxiliary preference models g of controlled quality, and what they give: variance-reduced wins, doubly robust win rates.

g is like a preference, (..., X, Y, Y) with g + g^T = 1 (see `polyref.theory.preferences`), made independently of the labels it
is used on. Sources: [VR] arXiv 2504.03784, [DR] 2506.01183.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
from torch import Tensor

from polyref.errors import ConfigError
from polyref.objectives.doubly_robust import doubly_robust_value
from polyref.theory.checks import check_preference, first, shown
from polyref.theory.estimators import fit_tabular
from polyref.theory.preferences import bradley_terry, pair_law
from polyref.theory.sampling import Pairs, draw_cells, draw_wins

AuxiliaryModel = Callable[[Tensor, torch.Generator], Tensor]
"""(preference (X, Y, Y), generator) -> g (X, Y, Y)."""

FITTED_PAIRS: Final = 50
"""Labelled pairs a context that the "fitted" model learns from."""

_EDGE: Final = 1e-9


class VarianceReducedTerms(NamedTuple):
    """What `fit_tabular` and `fit_linear` need for the variance-reduced likelihood."""

    wins: Tensor
    """(..., X, Y, Y) >= 0: (1 - c) wins + c soft wins of the auxiliary pairs."""
    linear: Tensor
    """(..., X, Y): c sum over the data of (z - g)(e_first - e_second)."""


class WinRates(NamedTuple):
    """Estimates of P(pi beats mu), (R,), from the same pairs."""

    doubly_robust: Tensor
    """Consistent if g or mu is right."""
    direct: Tensor
    """Consistent if g is right."""
    importance: Tensor
    """Consistent if mu is right."""


def distorted(
    preference: Tensor, generator: torch.Generator, *, scale: float = 1.0, bias: float = 0.0, noise: float = 0.0
) -> Tensor:
    """s(scale logit P + b_i - b_j + noise N_ij): true at scale 1, bias 0, noise 0.

    scale < 1 is unsure of itself, > 1 too sure; b is normal of deviation `bias`, one an action (a wrong taste: consistent in
    itself); N is skew-symmetric normal, one a pair (no taste at all). P is kept 1e-9 inside [0, 1].
    """
    odds = _odds(preference)
    tastes = bias * torch.randn(odds.shape[:-1], generator=generator, dtype=torch.float64)
    errors = noise * torch.randn(odds.shape, generator=generator, dtype=torch.float64).triu(1)
    return torch.sigmoid(scale * odds + tastes[..., :, None] - tastes[..., None, :] + errors - errors.mT)


def fitted(preference: Tensor, generator: torch.Generator, *, pairs: int = FITTED_PAIRS, radius: float = 5.0) -> Tensor:
    """A Bradley-Terry model, however misspecified, fitted to its own `pairs` labelled pairs a context, uniform over actions."""
    table = preference.reshape(-1, *preference.shape[-3:])
    contexts, actions = table.shape[1:3]
    uniform = torch.zeros(contexts, actions, dtype=torch.float64).log_softmax(-1)
    law = pair_law(torch.full((contexts,), 1 / contexts, dtype=torch.float64), uniform)
    wins = draw_wins(law, table, pairs * contexts, table.shape[0], generator)
    return bradley_terry(fit_tabular(wins, radius=radius)).view(preference.shape)


def uninformed(preference: Tensor, generator: torch.Generator) -> Tensor:
    """1/2 everywhere."""
    return torch.full_like(preference, 0.5)


def arbitrary(preference: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform on [0, 1] for each pair, whatever the preference is."""
    upper = torch.rand(preference.shape, generator=generator, dtype=torch.float64).triu(1)
    lower = (1 - upper).triu(1).mT
    return upper + lower + 0.5 * torch.eye(preference.shape[-1], dtype=torch.float64)


G_QUALITIES: Final[Mapping[str, AuxiliaryModel]] = MappingProxyType(
    {
        "true": lambda preference, generator: preference,
        "noisy": lambda preference, generator: distorted(preference, generator, noise=0.5),
        "overconfident": lambda preference, generator: distorted(preference, generator, scale=2.0),
        "biased": lambda preference, generator: distorted(preference, generator, scale=0.5, bias=1.0),
        "fitted": fitted,
        "uninformed": uninformed,
        "arbitrary": arbitrary,
    }
)
"""Auxiliary models by name, best to worst but for "fitted", which is as good as Bradley-Terry fits."""


def variance_reduced_terms(
    wins: Tensor,
    g: Tensor,
    law: Tensor,
    *,
    draws: int | None = None,
    generator: torch.Generator | None = None,
    control: float = 1.0,
) -> VarianceReducedTerms:
    """The variance-reduced Bradley-Terry likelihood of `wins` (..., X, Y, Y) as fractional wins and a linear term [VR].

    Its sum over the data is sum -(1-c) log s(h_z) - c (z-g) h + c mean_m [soft-label loss at g of auxiliary pair m]. The
    auxiliary pairs of each data pair share its context and follow `law` (X, Y, Y) or (..., X, Y, Y) given it, the joint law of
    the data pairs: M = `draws` of them from `generator`, or None for their expectation, the limit of large M. `control` c in
    [0, 1] (M/(M+1) is the best where g is right). In expectation the plain likelihood, for any g. The order within a pair does
    not enter, as g is antisymmetric. ConfigError for shapes, a g that is not antisymmetric, a law without mass in a context
    that has data, draws < 1 or without a generator.
    """
    g = check_preference(g, "g")
    if not 0 <= control <= 1:
        raise ConfigError(f"control is {control}", fix="give a coefficient between 0 and 1")
    if wins.shape[-3:] != law.shape[-3:] or wins.shape[-3:] != g.shape[-3:]:
        raise ConfigError(f"wins {tuple(wins.shape)}, law {tuple(law.shape)} and g {tuple(g.shape)} do not fit")
    seen, mass = wins.sum((-2, -1)), law.sum((-2, -1), keepdim=True)
    if not ((law >= 0).all() and mass.isfinite().all()):
        raise ConfigError("holds a mass that is negative or not finite", where=f"law {tuple(law.shape)}")
    if (row := first((seen > 0) & (mass[..., 0, 0] == 0))) is not None:
        raise ConfigError(
            f"has no pairs in context {shown(row)}, which has data",
            where=f"law {tuple(law.shape)}",
            fix="give the joint law of the data pairs",
        )
    if draws is None:
        auxiliary = seen[..., None, None] * law / mass.masked_fill(mass == 0, 1.0)
    elif draws < 1 or generator is None:
        raise ConfigError(f"{draws} draws, generator {generator}", fix="ask for at least 1 draw, from an explicit generator")
    else:
        auxiliary = _draw_auxiliary(seen, law, draws, generator) / draws
    soft = (auxiliary + auxiliary.mT) * g
    surprise = wins * (1 - g)
    return VarianceReducedTerms((1 - control) * wins + control * soft, control * (surprise.sum(-1) - surprise.sum(-2)))


def doubly_robust_win_rate(
    pairs: Pairs, g: Tensor, log_policy: Tensor, log_mu: Tensor, *, clip: float | None = None
) -> WinRates:
    """P(pi beats mu) = E_x E_{y~pi, y'~mu} P(y beats y') from labelled `pairs` (R, n) with independent actions [DR].

    `g` (X, Y, Y), `log_policy` and `log_mu` (X, Y), or each with a leading axis R; `log_mu` is what the importance ratios
    take mu to be, right or wrong. `clip` bounds the ratios. The mean over pairs of `objectives.doubly_robust_value`, beside
    the direct method (ratios 0) and importance weighting (g = 1/2). ConfigError for shapes or a g that is not antisymmetric.
    """
    g = check_preference(g, "g")
    contexts, actions = g.shape[-3:-1]
    if log_policy.shape[-2:] != (contexts, actions) or log_mu.shape[-2:] != (contexts, actions):
        raise ConfigError(
            f"log_policy {tuple(log_policy.shape)} and log_mu {tuple(log_mu.shape)} do not fit g {tuple(g.shape)}"
        )
    one, other = (pairs.contexts * actions + action for action in (pairs.first, pairs.second))
    against = (log_policy.exp()[..., :, None] * g).sum(-2)  # P(pi beats y') under g
    direct = 0.5 * (_take(against, one, 2) + _take(against, other, 2))
    log_ratio = log_policy - log_mu
    ratios = _take(log_ratio, one, 2), _take(log_ratio, other, 2)
    beliefs = _take(g, one * actions + pairs.second, 3)
    robust = doubly_robust_value(pairs.z, beliefs, direct, *ratios, clip=clip)
    half = torch.full_like(direct, 0.5)
    importance = doubly_robust_value(pairs.z, half, half, *ratios, clip=clip)
    return WinRates(robust.mean(-1), direct.mean(-1), importance.mean(-1))


def _take(table: Tensor, cells: Tensor, axes: int) -> Tensor:
    """Entries (R, n) of a table with its last `axes` axes flattened, shared or one a replicate."""
    flat = table.flatten(-axes)
    return flat[cells] if flat.dim() == 1 else flat.expand(cells.shape[0], -1).gather(-1, cells)


def _draw_auxiliary(seen: Tensor, law: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Counts (..., X, Y, Y) of `draws` pairs from `law` given x for each of the `seen` (..., X) data pairs in context x."""
    cells = law.shape[-2:].numel()
    rows = torch.arange(seen.numel())
    of_data = rows.repeat_interleave((seen.flatten() * draws).round().to(torch.long))
    table = (law if law.dim() == 3 else law.expand(*seen.shape, *law.shape[-2:])).reshape(-1, cells)
    table = torch.where(table.sum(-1, keepdim=True) > 0, table, 1.0)  # contexts that have no pairs are never asked for one
    of_law = of_data % table.shape[0]
    drawn = draw_cells(table, of_law, generator)
    counts = torch.bincount(of_data * cells + drawn, minlength=seen.numel() * cells)
    return counts.to(torch.float64).view(*seen.shape, *law.shape[-2:])


def _odds(preference: Tensor) -> Tensor:
    return preference.to(torch.float64).logit(eps=_EDGE)
