"""Completions drawn from a product of members' next-token laws, its missing mass kept as a coin or left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from polyref.references.compose import geometric
from polyref.samplers.members_lockstep import LockStep


@dataclass
class Row:
    """A completion: tokens, the last of which ends it if it `ended`; log-probs (K,); `kept` False where a coin failed.

    `steps` counts next-token laws that were asked for.
    """

    token_ids: list[int] = field(default_factory=list)
    ended: bool = False
    kept: bool = True
    logps: tuple[float, ...] = ()
    steps: int = 0


def draw_rows(steps: LockStep, weights: Tensor, uniforms: np.ndarray, ends: frozenset[int], *, coins: bool) -> list[Row]:
    """Completions of at most T tokens, each found by one of `uniforms` (R, T) in the law prod_i pi_i(. | prefix)^{a_i}.

    `weights` (R, K). The law sums to z_t <= 1. With `coins`, a number beyond z_t stops the row: it goes on with probability
    prod_t z_t. Without, the law is renormalised at every token: with several members that is the token-level composition.
    """
    rows = [Row() for _ in uniforms]
    logps = torch.zeros(weights.shape, dtype=torch.float64)
    alive, most = list(range(len(rows))), uniforms.shape[1]
    for step in range(most):
        law = steps.law
        at = torch.tensor(alive)
        joint = geometric(law, weights[at][:, None].to(law.device))
        token, inside = find_tokens(joint, torch.from_numpy(uniforms[alive, step]).to(law.device), coins=coins)
        logps[at] += law[torch.arange(len(alive), device=law.device), token].cpu()
        going = []
        for place, (row, chosen, kept) in enumerate(zip(alive, token.tolist(), inside.tolist(), strict=True)):
            mine = rows[row]
            mine.steps += 1
            mine.kept = kept
            if kept:
                mine.token_ids.append(chosen)
                mine.ended = chosen in ends
                if not mine.ended:
                    going.append(place)
        if not going or step + 1 == most:
            break
        if len(going) < len(alive):
            steps, alive = steps.pick(going), [alive[place] for place in going]
        steps.step(token[torch.tensor(going, device=token.device)])
    for drawn, values in zip(rows, logps.tolist(), strict=True):
        drawn.logps = tuple(values)
    return rows


def find_tokens(joint: Tensor, uniforms: Tensor, *, coins: bool) -> tuple[Tensor, Tensor]:
    """Tokens (R,) by inversion of the masses exp(`joint`) (R, V), and whether the number fell inside them (R,).

    Without `coins` the numbers are scaled to the mass, and fall outside only where there is none.
    """
    if not coins:
        top = joint.max(-1, keepdim=True).values
        joint = joint - top.masked_fill(top == -torch.inf, 0.0)
    cumulative = joint.exp().cumsum(-1)
    total = cumulative[:, -1]
    at = uniforms if coins else uniforms * total
    inside = at < total
    token = torch.searchsorted(cumulative, at[:, None].contiguous(), right=True)[:, 0]
    last = (cumulative < total[:, None]).sum(-1)  # the last token with mass: rounding must not step over it
    return torch.minimum(token, last.clamp(max=joint.shape[-1] - 1)), inside


def chunks(order: Sequence[int], size: int) -> list[Sequence[int]]:
    """`order` in pieces of at most `size`."""
    return [order[start : start + size] for start in range(0, len(order), size)]
