"""What is said of a policy by completions drawn from it: reward, gold reward, KL to the anchor, length, win rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from polyref.data.prompt_rows import PromptRow
from polyref.data.sources import prompt_key
from polyref.evaluation.winrate import crossed_outcomes, win_rate
from polyref.loops.generate import Proposed, finite
from polyref.loops.policies import anchor_logp
from polyref.objectives.metrics import mean_interval
from polyref.references.reference_set import ReferenceSet

Estimate = list[float | None]
"""[mean, low, high], a 95% interval over prompts; None for an end that one prompt alone does not give."""


def evaluated(
    prompts: Sequence[PromptRow],
    drawn: Sequence[Proposed],
    start: Sequence[Proposed] | None,
    references: ReferenceSet,
    *,
    seed: int,
) -> dict[str, Any]:
    """Estimates from as many completions of each prompt, whose `rewards` are the reward and, if there is one, the gold reward.

    `kl` is E[log pi(y|x) - log anchor(y|x)] in nats over the policy's own draws: sum_i a_i KL(pi || pi_i) for a geometric
    composition, which needs no normaliser [MR], KL(pi || M_a) for an arithmetic one. `kl_each` (K,) is KL(pi || pi_i), over the
    prompts that give the reference weight. A completion that a reference could not score, or gives no probability, is left out
    of both, which then are too small, and counted as `unscored`. `win_rate` compares gold rewards with those of `start`.
    Intervals are over prompts, one under other weights being the same.
    """
    rows = [(row, proposal) for row, one in zip(prompts, drawn, strict=True) for proposal in one.proposals]
    clusters = [prompt_key(row.prompt) for row, _ in rows]
    ratios = [_ratio(p.own, anchor_logp(p, references, row)) for row, p in rows]

    def estimate(values: Sequence[float]) -> Estimate | None:
        known = [(value, cluster) for value, cluster in zip(values, clusters, strict=True) if math.isfinite(value)]
        if not known:
            return None
        return [finite(end) for end in mean_interval([v for v, _ in known], [c for _, c in known], seed=seed)]

    gold = [p.rewards[1] for _, p in rows] if len(rows[0][1].rewards) > 1 else None
    return {
        "reward": estimate([p.rewards[0] for _, p in rows]),
        "gold": estimate(gold) if gold is not None else None,
        "kl": estimate(ratios),
        "kl_each": [estimate([_ratio(p.own, p.logps[k]) for _, p in rows]) for k in range(len(references))],
        "unscored": sum(not math.isfinite(ratio) for ratio in ratios),
        "length": estimate([float(p.tokens) for _, p in rows]),
        "share_ended": sum(p.ended for _, p in rows) / len(rows),
        "win_rate": wins(prompts, drawn, start, 1, seed) if gold is not None and start is not None else None,
    }


def _ratio(own: float | None, other: float | None) -> float:
    return math.nan if own is None or other is None else own - other


def wins(prompts: Sequence[PromptRow], drawn: Sequence[Proposed], start: Sequence[Proposed], which: int, seed: int) -> Estimate:
    """How often completions beat those of `start` to the same prompt by reward number `which`, as in `crossed_outcomes`."""
    now, before = (
        torch.tensor([[p.rewards[which] for p in one.proposals] for one in some], dtype=torch.float64)
        for some in (drawn, start)
    )
    return [finite(end) for end in win_rate(crossed_outcomes(now, before), [row.prompt for row in prompts], seed=seed).rate]
