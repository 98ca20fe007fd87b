"""Completions to scores and preferences: what a policy is tilted towards, and what a label is expected to be."""
