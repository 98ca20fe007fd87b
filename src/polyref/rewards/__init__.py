"""Completions to scores and preferences: what a policy is tilted towards, and what a label is expected to be.

`protocols` says what a `Reward` and a `PreferenceModel` are. Rewards: `rules` and `functions`, `exact_answer`, `reward_model`;
`cached` keeps their values, `ensemble` and `uncertainty` say how unsure they are, `pessimism` subtracts it. Preference models:
`preference_model` makes them of what is at hand, `cross_encoder` is trained, `judge` asks a server; `cross_fit` keeps each from
the pairs that it judges, and `auxiliary_columns` puts what they say into records. Each is imported from its own file.
"""
