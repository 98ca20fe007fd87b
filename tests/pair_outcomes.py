"""Every pair, label and set of auxiliary pairs that a small problem can give, so that means over data are exact sums."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from polyref.objectives.variance_reduced import VarianceReduced

TEXTS = (" a", " bb", " c?")
UNORDERED = list(itertools.combinations(range(3), 2))
MU = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
LAW = torch.stack([MU[i] * MU[j] for i, j in UNORDERED]) / sum(MU[i] * MU[j] for i, j in UNORDERED)
CYCLE = torch.tensor([[0.5, 0.8, 0.3], [0.2, 0.5, 0.65], [0.7, 0.35, 0.5]], dtype=torch.float64)
WRONG = torch.tensor([[0.5, 0.1, 0.9], [0.9, 0.5, 0.45], [0.1, 0.55, 0.5]], dtype=torch.float64)
LOSSES = ["sigmoid", "hinge", "ipo", "smoothed", "robust"]


def outcomes(g: Tensor, pairs: int) -> tuple[list[dict[str, Any]], Tensor]:
    """Rows for every (pair, label, multiset of `pairs` auxiliary pairs), and their chances; 0 pairs: no auxiliary model."""
    rows, chances = [], []
    for draws in itertools.combinations_with_replacement(range(3), pairs):
        counts = [draws.count(cell) for cell in range(3)]
        drawn = math.factorial(pairs) * math.prod(float(LAW[c]) ** n / math.factorial(n) for c, n in enumerate(counts))
        for (i, j), chance in zip(UNORDERED, LAW.tolist(), strict=True):
            for y, other in ((i, j), (j, i)):
                row = {"prompt": "question", "chosen": TEXTS[y], "rejected": TEXTS[other]}
                if pairs:
                    cells = [UNORDERED[draw] for draw in draws]
                    row["predicted_probability"] = float(g[y, other])
                    row["auxiliary_1"], row["auxiliary_2"] = ([TEXTS[cell[side]] for cell in cells] for side in (0, 1))
                    row["auxiliary_probability"] = [float(g[cell]) for cell in cells]
                rows.append(row)
                chances.append(drawn * chance * float(CYCLE[y, other]))
    assert math.fsum(chances) == pytest.approx(1)
    return rows, torch.tensor(chances, dtype=torch.float64)


def pair_losses(trainer: Any) -> tuple[Tensor, VarianceReduced | None]:
    """The losses of all training pairs as one batch of the trainer's own step, and what was logged of them."""
    batch = trainer.data_collator(list(trainer.train_dataset.pairs))
    found: list[tuple[Tensor, Any]] = []
    name = "step_objective" if trainer.step_objective is not None else "pair_loss"
    original = getattr(trainer, name)

    class Seen:
        columns = getattr(original, "columns", ())

        def __call__(self, *args: Any) -> Any:
            result = original(*args)
            found.append(result if isinstance(result, tuple) else (result, None))
            return result

    setattr(trainer, name, Seen())
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    setattr(trainer, name, original)
    ((losses, values),) = found
    torch.testing.assert_close(loss, losses.mean())
    return losses, None if values is None else VarianceReduced(*values[:, :4].unbind(1))


def expectation(trainer: Any, chances: Tensor) -> tuple[float, Tensor]:
    """Mean loss over outcomes, and its gradient in all trained weights."""
    mean = (pair_losses(trainer)[0].double() * chances).sum()
    trainer.model.zero_grad()
    mean.backward()
    return mean.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def assert_known_variance(plain: Any, trainer: Any, pairs: int, control: Any) -> None:
    """With `pairs` auxiliary pairs and g = CYCLE the variance is theory's; trainers of `outcomes(CYCLE, 0)` and of `pairs`."""
    plain_chances, chances = outcomes(CYCLE, 0)[1], outcomes(CYCLE, pairs)[1]
    with torch.no_grad():
        losses, found = (pair_losses(each)[0].double() for each in (plain, trainer))
    by_pair, chance = losses.view(3, 2), plain_chances.view(3, 2)
    label = chance / LAW[:, None]
    lbar = (label * by_pair).sum(1)
    within = (chance * (by_pair - lbar[:, None]) ** 2).sum()
    between = (LAW * (lbar - (LAW * lbar).sum()) ** 2).sum()
    assert between > 0.01 * within
    variance = float((chances * (found - (chances * found).sum()) ** 2).sum())
    c = pairs / (pairs + 1) if control == "optimal" else 1.0
    assert variance == pytest.approx(float(within + ((1 - c) ** 2 + c**2 / pairs) * between), rel=2e-3)
    assert (variance < float(within + between) * 0.999) == (pairs > 1 or c < 1), "no gain from one pair at c = 1"
