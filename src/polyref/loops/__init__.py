"""Loops that train on what they draw: generate, score, accept, pair, train and evaluate, as stages of a run folder.

Each stage is a function that takes what the ones before it left, keeps what is done in files, and is found done when the run is
started again. A loop is the order in which they are called: `multistep` is one.
"""
