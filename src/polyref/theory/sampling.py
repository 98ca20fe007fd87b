"""Preference data drawn from its law: many replicates at once, as win counts (what the likelihood needs) or as ordered pairs.

Laws are (X, Y, Y), one for all replicates, or (R, X, Y, Y), one each; entry [x, i, j] is the probability that context x comes
with first action i and second action j. Every draw is by inversion, exact up to float64, and never lands on a cell of mass 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from polyref.errors import ConfigError
from polyref.theory.checks import check_preference

_DRAWS_AT_ONCE = 1 << 18


class Pairs(NamedTuple):
    """n labelled pairs a replicate, in the order drawn; each (R, n): indices, and z = 1.0 where the first action won."""

    contexts: Tensor
    first: Tensor
    second: Tensor
    z: Tensor


def draw_wins(law: Tensor, preference: Tensor, pairs: int, replicates: int, generator: torch.Generator) -> Tensor:
    """wins (R, X, Y, Y), float64: how often i was preferred to j in context x, among `pairs` labelled pairs a replicate.

    `law` as above, of sum 1, and `preference` P(i beats j), (X, Y, Y) or (R, X, Y, Y). The likelihood needs no more than the
    wins; where the order of a pair matters, see `draw_pairs`. ConfigError names a law or a preference that is not one.
    """
    law, preference = _checked(law, preference, pairs, replicates)
    outcomes = ((law + law.mT) * preference).flatten(-3).reshape(-1, law.shape[-3:].numel())
    return draw_counts(outcomes, pairs, replicates, generator).view(replicates, *law.shape[-3:])


def draw_pairs(law: Tensor, preference: Tensor, pairs: int, replicates: int, generator: torch.Generator) -> Pairs:
    """The pairs themselves, in order, with their labels. Arguments and errors as for `draw_wins`."""
    law, preference = _checked(law, preference, pairs, replicates)
    actions, cells = law.shape[-1], law.shape[-3:].numel()
    rows = torch.arange(replicates)[:, None].expand(replicates, pairs) if law.dim() == 4 else torch.zeros(replicates, pairs)
    drawn = draw_cells(law.reshape(-1, cells), rows.to(torch.long), generator)
    beats = preference.reshape(-1, cells)
    wins = beats[0][drawn] if beats.shape[0] == 1 else beats.gather(-1, drawn)
    z = (torch.rand(drawn.shape, generator=generator, dtype=torch.float64) < wins).to(torch.float64)
    return Pairs(drawn // actions**2, drawn // actions % actions, drawn % actions, z)


def count_wins(pairs: Pairs, contexts: int, actions: int) -> Tensor:
    """The wins (R, X, Y, Y) of `pairs`, X and Y given."""
    won = pairs.z == 1
    winner, loser = torch.where(won, pairs.first, pairs.second), torch.where(won, pairs.second, pairs.first)
    cells = (pairs.contexts * actions + winner) * actions + loser
    return _count(cells, contexts * actions**2).view(-1, contexts, actions, actions)


def draw_counts(probabilities: Tensor, draws: int, replicates: int, generator: torch.Generator) -> Tensor:
    """(R, cells), float64: counts of `draws` independent draws a replicate from `probabilities` (1, cells) or (R, cells)."""
    at_once = max(1, _DRAWS_AT_ONCE // max(draws, 1))
    counts = []
    for start in range(0, replicates, at_once):
        size = min(at_once, replicates - start)
        table = probabilities if probabilities.shape[0] == 1 else probabilities[start : start + size]
        rows = torch.arange(size)[:, None] if table.shape[0] > 1 else torch.zeros(size, 1, dtype=torch.long)
        drawn = draw_cells(table, rows.expand(size, draws), generator)
        counts.append(_count(drawn, probabilities.shape[-1]))
    return torch.cat(counts)


def draw_cells(probabilities: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
    """One cell a draw: `probabilities` (B, cells), each row of positive sum, and `rows` (...) the row of each draw; (...).

    Row b of the distribution function is shifted by b, so that one sorted table serves every row; a uniform is kept a few
    roundings below 1, which keeps its draw in its own row.
    """
    table = probabilities.to(torch.float64).cumsum(-1)
    table = table / table[:, -1:]
    uniform = torch.rand(rows.shape, generator=generator, dtype=torch.float64)
    if table.shape[0] == 1:
        return torch.searchsorted(table[0], uniform, right=True)
    shifts = torch.arange(table.shape[0], dtype=torch.float64)
    below_one = 1 - 4 * table.shape[0] * torch.finfo(torch.float64).eps
    drawn = torch.searchsorted((table + shifts[:, None]).flatten(), uniform.clamp_(max=below_one).add_(rows), right=True)
    return drawn - rows * table.shape[-1]


def _count(cells: Tensor, size: int) -> Tensor:
    """(R, n) indices below `size` to (R, size) counts."""
    flat = cells + torch.arange(cells.shape[0])[:, None] * size
    return torch.bincount(flat.flatten(), minlength=cells.shape[0] * size).view(-1, size).to(torch.float64)


def _checked(law: Tensor, preference: Tensor, pairs: int, replicates: int) -> tuple[Tensor, Tensor]:
    if pairs < 1 or replicates < 1:
        raise ConfigError(f"{pairs} pairs in {replicates} replicates", fix="ask for at least 1 of each")
    for name, table in (("law", law), ("preference", preference)):
        if table.dim() not in (3, 4) or table.shape[-1] != table.shape[-2] or table.shape[-3:] != law.shape[-3:]:
            raise ConfigError("is not (X, Y, Y) or (R, X, Y, Y)", where=f"{name} {tuple(table.shape)}")
        if table.dim() == 4 and table.shape[0] != replicates:
            raise ConfigError(f"has {table.shape[0]} rows for {replicates} replicates", where=f"{name} {tuple(table.shape)}")
    law, preference = law.to(torch.float64), check_preference(preference, "preference")
    if not ((law >= 0).all() and ((law.sum((-3, -2, -1)) - 1).abs() <= 1e-6).all()):
        raise ConfigError("is not a probability law of (x, y1, y2)", where=f"law {tuple(law.shape)}")
    return law, preference
