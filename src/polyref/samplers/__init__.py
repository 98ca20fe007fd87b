"""Policies and references to completions, drawn with explicit seeds.

`engine` says what an engine is and what a drawn completion carries; `local` draws with a model on this machine.
`tilt` turns draws into draws of the law tilted by a reward, `proposals` does so over an engine; `schedule` goes there in steps.
`composed` draws from the composition of several references, which `members` keeps in memory.
`pairing` and `pairs` make preference pairs of scored completions.
"""
