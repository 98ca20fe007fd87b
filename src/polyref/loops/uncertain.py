"""How far completions are apart where a reward's pairs say little: |phi - phi'|_{S^-1} [IT], arXiv 2312.11456."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from polyref.loops.generate import blaming
from polyref.loops.pairing import Apart
from polyref.rewards.uncertainty import FeatureReward, checked_features, pair_covariance
from polyref.samplers.pairing import Floats
from polyref.samplers.pairs import Scored
from polyref.types import PreferenceRecord, Text


def feature_distances(reward: FeatureReward, earlier: Sequence[PreferenceRecord], ridge: float) -> Apart:
    """Distances in the last-layer features of `reward`, with S = ridge I + the sum over the pairs of `earlier` rounds.

    The pair that is farthest apart is what the main agent and an enhancer that maximises uncertainty make of these completions;
    S is that of the rounds before, the same for a whole round.
    """

    def features(prompts: Sequence[Text], completions: Sequence[Text]) -> torch.Tensor:
        with blaming(reward.name, f"the features of {len(prompts)} completions"):
            return checked_features(reward, prompts, completions)

    def apart(scored: Sequence[Scored]) -> Sequence[Floats]:
        phi = features(
            [one.prompt for one in scored for _ in one.completions], [text for one in scored for text in one.completions]
        )
        first = second = phi[:0]
        if earlier:
            prompts = [one.prompt for one in earlier]
            first, second = (features(prompts, texts) for texts in zip(*((p.chosen, p.rejected) for p in earlier), strict=True))
        factor = torch.linalg.cholesky(pair_covariance(first, second, ridge))
        whitened = torch.linalg.solve_triangular(factor, phi.T, upper=False).T
        parts = whitened.split([len(one.completions) for one in scored])
        return [np.asarray(torch.cdist(part, part, compute_mode="donot_use_mm_for_euclid_dist").numpy()) for part in parts]

    return apart
