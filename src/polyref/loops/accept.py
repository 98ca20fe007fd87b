"""From the proposals of a step to draws of its tilt: by rejection, or by weights that also correct the policy's own error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polyref.data.prompt_rows import PromptRow
from polyref.data.sources import prompt_key
from polyref.errors import DataError
from polyref.loops.generate import Proposed
from polyref.loops.policies import anchor_logp
from polyref.references.reference_set import ReferenceSet
from polyref.samplers.sampled import stream
from polyref.samplers.schedule import step_beta
from polyref.samplers.tilt import Kept, importance, reject, resample


@dataclass(frozen=True)
class Acceptance:
    """How a step from the tilt at `previous` (None: the references) to the one at `beta` keeps at most `keep` a prompt.

    `correct` names the original references where proposals of a policy are weighed by what they should have been drawn from.
    """

    beta: float
    previous: float | None
    keep: int
    r_max: float | None
    seed: int
    correct: ReferenceSet | None = None


def accept(row: PromptRow, one: Proposed, how: Acceptance, place: int = 0) -> Kept | None:
    """Which proposals of the prompt `row` are kept; None where there is no proposal, or none that may be.

    Rejection at 1/beta_k - 1/beta_{k-1} [RSO]: exact for a known r_max, else under the largest reward proposed. Weighted
    proposals, and those of a policy to be corrected, are resampled to `keep` by importance weights, which for the latter are
    prod_i pi_i^{a_i} exp(r/beta_k) / policy [IT]. A proposal that a reference cannot give, or cannot score, has weight 0.
    Coins are those of the prompt under its own weights, after `place` equal ones.
    """
    if not one.proposals:
        return None
    rewards = torch.tensor([proposal.rewards[0] for proposal in one.proposals], dtype=torch.float64)
    beta = step_beta(how.previous, how.beta)
    draws = stream(how.seed, "accept", row.prompt, row.reference_weights, place).random(len(rewards))
    if how.correct is not None and one.proposals[0].own is not None:
        anchor = torch.tensor([anchor_logp(p, how.correct, row) for p in one.proposals], dtype=torch.float64)
        own = torch.tensor([p.own for p in one.proposals], dtype=torch.float64)
        log_weights = (anchor - own).nan_to_num(nan=-torch.inf)
        if not log_weights.isfinite().any():
            return None
        return resample(importance(rewards, how.beta, log_weights=log_weights), how.keep, float(draws[0]))
    if one.weighted:
        log_weights = torch.tensor([proposal.log_weight for proposal in one.proposals], dtype=torch.float64)
        return resample(importance(rewards, beta, log_weights=log_weights), how.keep, float(draws[0]))
    return reject(rewards, torch.from_numpy(draws), beta, r_max=how.r_max, wanted=how.keep)


def accept_all(prompts: Sequence[PromptRow], proposed: Sequence[Proposed], how: Acceptance, step: int) -> list[Kept | None]:
    """`accept` for each prompt. DataError where nothing at all is kept."""
    seen, kept = Counter[tuple[str, tuple[float, ...] | None]](), list[Kept | None]()
    for row, one in zip(prompts, proposed, strict=True):
        equal = prompt_key(row.prompt), row.reference_weights
        kept.append(accept(row, one, how, seen[equal]))
        seen[equal] += 1
    if not any(one is not None and len(one.indices) for one in kept):
        drawn = sum(len(one.proposals) for one in proposed)
        what = f"none of {drawn} proposals of step {step} was accepted"
        fix = "raise proposals, budget or steps, lower r_max to the largest reward there is, or raise beta"
        raise DataError(what, where="multistep", fix=fix)
    return kept
