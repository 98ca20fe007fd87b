"""The exact oracle: KL-regularised bandits whose optimum is known, to run the functions that train language models on.

In the order the quantities flow:

1. `bandit`: a problem (`FiniteBandit`): contexts, actions, rewards, K references, weights, beta; `random_bandit` draws one.
2. `toy_language`: enumerable autoregressive references, in which sequence-level and token-level composition part.
3. `solutions`: the optimum under reverse and under forward KL; `values`: objectives, gaps, KL decompositions; `coverage`.

No Hugging Face here: torch, numpy and scipy, `polyref.objectives` and `polyref.references.compose`, float64, vectorised over
replicates.
"""
