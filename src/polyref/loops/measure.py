"""The row of numbers that tells of the start and of each round: reward, gold reward, KL, length, diversity, win rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from polyref.data.prompt_rows import PromptRow
from polyref.data.sources import prompt_key
from polyref.loops.evaluate import Estimate, evaluated, wins
from polyref.loops.generate import Proposed, finite
from polyref.objectives.metrics import mean_interval
from polyref.references.reference_set import ReferenceSet

Row = dict[str, Any]


def measured(
    prompts: Sequence[PromptRow],
    drawn: Sequence[Proposed],
    start: Sequence[Proposed],
    references: ReferenceSet,
    *,
    moving: bool,
    seed: int,
) -> Row:
    """`evaluated`, and what else a round is told by.

    `kl_anchor` is E[log pi(y|x) - log anchor(y|x)] to what the round was held to; `moving`, that is the last of each
    completion's `logps`. `win_rate` is that against `start`, by the gold reward, or by the reward where there is no gold one.
    """
    row: Row = evaluated(prompts, drawn, start, references, seed=seed)
    row["kl_anchor"] = _last_kl(prompts, drawn, seed) if moving else row["kl"]
    row["distinct"] = _estimate([distinct_share([p.text for p in one.proposals]) for one in drawn], prompts, seed)
    row["distinct_bigrams"] = _estimate([distinct_bigrams([p.text for p in one.proposals]) for one in drawn], prompts, seed)
    if row["win_rate"] is None:
        row["win_rate"] = wins(prompts, drawn, start, 0, seed)
    return row


def mean_change(
    prompts: Sequence[PromptRow], before: Sequence[Proposed], after: Sequence[Proposed], which: int, *, seed: int
) -> Estimate:
    """The mean of r(y') - r(y) over draws y of `before` and y' of `after`, as many of each prompt, by reward number `which`.

    The interval is over prompts, whose ease is in both and cancels: it is shorter than those of the two means suggest.
    """
    pairs = [two for a, b in zip(before, after, strict=True) for two in zip(a.proposals, b.proposals, strict=True)]
    changes = [late.rewards[which] - early.rewards[which] for early, late in pairs]
    asked = [prompt_key(row.prompt) for row, one in zip(prompts, before, strict=True) for _ in one.proposals]
    return [finite(end) for end in mean_interval(changes, asked, seed=seed)]


def distinct_share(texts: Sequence[str]) -> float:
    """Different texts over all texts of one prompt; NaN of none."""
    return len(set(texts)) / len(texts) if texts else math.nan


def distinct_bigrams(texts: Sequence[str]) -> float:
    """Different neighbours of two words over all of them, within the texts of one prompt; NaN where no text has two words."""
    words = [text.split() for text in texts]
    bigrams = [pair for one in words for pair in zip(one, one[1:], strict=False)]
    return len(set(bigrams)) / len(bigrams) if bigrams else math.nan


def _estimate(values: Sequence[float], prompts: Sequence[PromptRow], seed: int) -> Estimate | None:
    known = [(value, prompt_key(row.prompt)) for value, row in zip(values, prompts, strict=True) if math.isfinite(value)]
    if not known:
        return None
    return [finite(end) for end in mean_interval([value for value, _ in known], [name for _, name in known], seed=seed)]


def _last_kl(prompts: Sequence[PromptRow], drawn: Sequence[Proposed], seed: int) -> Estimate | None:
    rows = [(row, p) for row, one in zip(prompts, drawn, strict=True) for p in one.proposals]
    known = [(row, p.own - p.logps[-1]) for row, p in rows if p.own is not None and p.logps[-1] is not None]
    return _estimate([value for _, value in known], [row for row, _ in known], seed)
