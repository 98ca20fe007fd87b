"""The exact oracle: KL-regularised bandits whose optimum is known, to run the functions that train language models on.

In the order the quantities flow:

1. A problem. `bandit`: contexts, actions, rewards, K references, weights, beta (`FiniteBandit`), refused by `checks` where it is
   none; `toy_language`: enumerable autoregressive references, in which composing sequences and composing tokens part.
2. What is true of it. `solutions`: the optimum under reverse and under forward KL; `values`: objectives, gaps, KL
   decompositions; `coverage`: how well the law of the data covers a policy.
3. Data. `preferences`: laws of who prefers what, Bradley-Terry or not; `sampling`: draws of pairs; `replicates`: many at once.
4. What is learned from it. `estimators` (on `newton`): Bradley-Terry by maximum likelihood, to be tilted by `solutions`;
   `auxiliary`: variance-reduced and doubly robust; `direct_fits` (on `descent`): policies by the losses of `polyref.objectives`;
   `asymptotics`: what the fits tend to where Bradley-Terry is wrong.
5. Algorithms. `gshf`: linear rewards, bonus, offline pessimism; `online` with its `enhancer`; `multistep` rejection sampling.
6. Rates. `regression`: slopes with intervals; `results` and `experiments`: the named measurements of `polyref lab`; `bounds` and
   `planner`: the pairs that a target gap needs.

No Hugging Face here: torch, numpy and scipy, `polyref.objectives` and `polyref.references.compose`; float64, vectorised over
replicates.
"""

from polyref.theory.bandit import FiniteBandit, random_bandit, with_coverage
from polyref.theory.coverage import chi_square_coverage, density_coverage, feature_coverage
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

__all__ = [
    "FiniteBandit",
    "ForwardSolution",
    "ToyLanguageBandit",
    "chi_square_coverage",
    "density_coverage",
    "feature_coverage",
    "forward_gap",
    "forward_objective",
    "forward_optimum",
    "kl",
    "kl_decomposition",
    "mean_reward",
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
