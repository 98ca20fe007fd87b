"""A composition as an engine: whatever draws from one model draws from several, tilts by a reward included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from polyref.errors import ConfigError, ModelError
from polyref.references.compose import COMPOSITIONS
from polyref.samplers.composed import draw_composed
from polyref.samplers.engine import Completion, Progress, SamplingParameters
from polyref.samplers.members import Members
from polyref.types import Text


class ComposedEngine:
    """An `Engine` whose completions are exact draws from the composition of `members`, under the weights of their set.

    A tilt of it, exp(r/beta) times G_a, is the optimum of reverse KL to every reference. A completion's `logp` and `drawn_logp`
    are log M_a(y|x), or for a geometric composition sum_i a_i log pi_i(y|x): log G_a up to log F_a(x). `method` (by default the
    cheapest exact one), `budget` (of a call, each prompt), `batch_size` and `progress` are those of `draw_composed`.
    ConfigError for smc and auto, whose samples may be weighted; ModelError, naming the prompt, where the budget does not give n
    completions.
    """

    def __init__(
        self,
        members: Members,
        *,
        method: str | None = None,
        budget: int | None = None,
        batch_size: int = 32,
        progress: Progress | None = None,
        name: str = "composition",
    ) -> None:
        if method in ("smc", "auto"):
            what = f"the method is {method}, and an engine's completions all weigh the same"
            raise ConfigError(what, where=name, fix="use an exact method, or call draw_composed")
        if method is None:
            exact = "tokens" if members.one_tokenizer else "rejection"
            method = "mixture" if members.composition == "arithmetic" else exact
        self.members, self.method, self.budget, self.batch_size, self.name = members, method, budget, batch_size, name
        self.progress = progress

    def __call__(self, prompts: Sequence[Text], n: int, parameters: SamplingParameters, *, seed: int) -> list[list[Completion]]:
        """`n` completions of each prompt, as the protocol says."""
        settings: dict[str, Any] = {"budget": self.budget, "batch_size": self.batch_size, "progress": self.progress}
        drawn = draw_composed(self.members, prompts, n, parameters, seed=seed, method=self.method, **settings)
        for row, some in enumerate(drawn, 1):
            if len(some.samples) < n:
                fix = "raise the budget, or take weighted completions from draw_composed (method smc)"
                raise ModelError(some.note, where=f"{self.name}, prompt {row}", fix=fix)
        compose, weights = COMPOSITIONS[self.members.composition], self.members.weights
        found = []
        for some in drawn:
            logps = compose(torch.tensor([sample.logps for sample in some.samples], dtype=torch.float64), weights).tolist()
            found.append(
                [
                    Completion(sample.token_ids, sample.text, logp, logp, sample.ended)
                    for sample, logp in zip(some.samples, logps, strict=True)
                ]
            )
        return found
