"""The exact oracle: KL-regularised bandits whose optimum is known, to run the functions that train language models on.

In the order the quantities flow:

1. A problem. `bandit`: contexts, actions, rewards, K references, weights, beta (`FiniteBandit`), and `checks` of it;
   `toy_language`: enumerable autoregressive references, in which composing sequences and composing tokens part.
2. What is true of it. `solutions`: the optimum under reverse and under forward KL; `values`: objectives, gaps, KL
   decompositions; `coverage`: how well the law of the data covers a policy.
3. Data. `preferences`: laws of who prefers what, Bradley-Terry or not; `sampling`: draws of pairs; `replicates`: many at once.
4. What is learned from it. `estimators` (on `newton`): Bradley-Terry by maximum likelihood, to be tilted by `solutions`;
   `auxiliary`: variance-reduced and doubly robust; `direct_fits` (on `descent`): policies by the training losses;
   `asymptotics`: what the fits tend to where Bradley-Terry is wrong.
5. Algorithms. `gshf`: linear rewards, bonus, offline pessimism; `online` with its `enhancer`; `multistep` rejection sampling.
6. Rates. `regression`: slopes with intervals; `results` and `experiments`: the measurements of `polyref lab`; `bounds` and
   `planner`: the pairs that a target gap needs.

No Hugging Face here: torch and numpy, `polyref.objectives` and `polyref.references.compose`; float64, vectorised over
replicates. A name loads what it needs when it is first used, so that planning pairs does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyref.theory.bandit import FiniteBandit, random_bandit, with_coverage
    from polyref.theory.coverage import chi_square_coverage, density_coverage, feature_coverage
    from polyref.theory.direct_fits import fit_doubly_robust, fit_policy, fit_variance_reduced
    from polyref.theory.estimators import fit_linear, fit_tabular
    from polyref.theory.experiments import EXPERIMENTS
    from polyref.theory.preferences import MISSPECIFICATIONS, bradley_terry, pair_law
    from polyref.theory.replicates import map_replicates
    from polyref.theory.sampling import draw_pairs, draw_wins
    from polyref.theory.solutions import ForwardSolution, forward_optimum, reverse_optimum, solve_forward_kl, solve_reverse_kl
    from polyref.theory.toy_language import ToyLanguageBandit, random_toy_language, total_variation
    from polyref.theory.values import (
        forward_gap,
        forward_objective,
        kl,
        kl_decomposition,
        mean_reward,
        reverse_gap,
        reverse_objective,
        reverse_value,
        unregularised_gap,
    )

_HOMES = {
    "FiniteBandit": "polyref.theory.bandit",
    "random_bandit": "polyref.theory.bandit",
    "with_coverage": "polyref.theory.bandit",
    "chi_square_coverage": "polyref.theory.coverage",
    "density_coverage": "polyref.theory.coverage",
    "feature_coverage": "polyref.theory.coverage",
    "fit_doubly_robust": "polyref.theory.direct_fits",
    "fit_policy": "polyref.theory.direct_fits",
    "fit_variance_reduced": "polyref.theory.direct_fits",
    "fit_linear": "polyref.theory.estimators",
    "fit_tabular": "polyref.theory.estimators",
    "EXPERIMENTS": "polyref.theory.experiments",
    "MISSPECIFICATIONS": "polyref.theory.preferences",
    "bradley_terry": "polyref.theory.preferences",
    "pair_law": "polyref.theory.preferences",
    "map_replicates": "polyref.theory.replicates",
    "draw_pairs": "polyref.theory.sampling",
    "draw_wins": "polyref.theory.sampling",
    "ForwardSolution": "polyref.theory.solutions",
    "forward_optimum": "polyref.theory.solutions",
    "reverse_optimum": "polyref.theory.solutions",
    "solve_forward_kl": "polyref.theory.solutions",
    "solve_reverse_kl": "polyref.theory.solutions",
    "ToyLanguageBandit": "polyref.theory.toy_language",
    "random_toy_language": "polyref.theory.toy_language",
    "total_variation": "polyref.theory.toy_language",
    "forward_gap": "polyref.theory.values",
    "forward_objective": "polyref.theory.values",
    "kl": "polyref.theory.values",
    "kl_decomposition": "polyref.theory.values",
    "mean_reward": "polyref.theory.values",
    "reverse_gap": "polyref.theory.values",
    "reverse_objective": "polyref.theory.values",
    "reverse_value": "polyref.theory.values",
    "unregularised_gap": "polyref.theory.values",
}

__all__ = [
    "EXPERIMENTS",
    "MISSPECIFICATIONS",
    "FiniteBandit",
    "ForwardSolution",
    "ToyLanguageBandit",
    "bradley_terry",
    "chi_square_coverage",
    "density_coverage",
    "draw_pairs",
    "draw_wins",
    "feature_coverage",
    "fit_doubly_robust",
    "fit_linear",
    "fit_policy",
    "fit_tabular",
    "fit_variance_reduced",
    "forward_gap",
    "forward_objective",
    "forward_optimum",
    "kl",
    "kl_decomposition",
    "map_replicates",
    "mean_reward",
    "pair_law",
    "random_bandit",
    "random_toy_language",
    "reverse_gap",
    "reverse_objective",
    "reverse_optimum",
    "reverse_value",
    "solve_forward_kl",
    "solve_reverse_kl",
    "total_variation",
    "unregularised_gap",
    "with_coverage",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
