"""Policies and references to completions, drawn with explicit seeds.

`engine` says what an engine is and what a drawn completion carries; `local` draws with a model on this machine.
"""
