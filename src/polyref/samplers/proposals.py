"""Proposals of any engine with their rewards, and rejection sampling of the tilt in rounds within a budget of proposals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash
from torch import Tensor

from polyref.data.sources import prompt_key
from polyref.errors import ConfigError, DataError, ModelError, one_line
from polyref.rewards.protocols import Reward
from polyref.samplers.auxiliary import as_completion
from polyref.samplers.engine import Completion, Engine, SamplingParameters
from polyref.samplers.tilt import Kept, reject
from polyref.types import Text


@dataclass
class Proposals:
    """What an engine drew for one prompt, in the order drawn, with the `rewards` (N,) of it."""

    prompt: Text
    completions: list[Completion] = field(default_factory=list)
    rewards: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def of(self, kept: Kept) -> list[Completion]:
        """The completions that `kept` names."""
        return [self.completions[i] for i in kept.indices.tolist()]


def propose(
    engine: Engine, reward: Reward, prompts: Sequence[Text], n: int, parameters: SamplingParameters, *, seed: int
) -> list[Proposals]:
    """`n` completions of each prompt with their rewards, for the functions of `polyref.samplers.tilt`.

    What a prompt gets depends on it, its place among equal prompts, and `seed`. Errors: those of the engine and the reward;
    ModelError, naming prompt and completion, for a reward that is no finite number.
    """
    found = [Proposals(prompt) for prompt in prompts]
    _add(found, list(range(len(prompts))), engine, reward, n, parameters, f"{seed} 0")
    return found


def draw_tilted(
    engine: Engine,
    reward: Reward,
    prompts: Sequence[Text],
    wanted: int,
    parameters: SamplingParameters,
    *,
    beta: float,
    seed: int,
    budget: int,
    a_round: int,
    r_max: Sequence[float] | None = None,
) -> list[tuple[Proposals, Kept]]:
    """`wanted` completions of each prompt from the engine's law tilted by exp(r/beta), by `reject`, one result a prompt.

    Rounds of `a_round` proposals go to the prompts that still lack some, at most `budget` a prompt, the last round cut to it.
    A prompt that lacks some then has fewer, and may have none (`refuse_empty`). `r_max` (one a prompt): as for `reject`. What a
    prompt gets depends on neither the other prompts nor their order. Errors as for `propose` and `reject`; ConfigError for
    wanted or a_round below 1, budget below wanted, or another number of `r_max`.
    """
    if min(wanted, a_round) < 1 or budget < wanted:
        what = f"wanted is {wanted}, a_round {a_round} and budget {budget}"
        raise ConfigError(what, fix="give at least 1 of each, and a budget that could be enough")
    if r_max is not None and len(r_max) != len(prompts):
        raise ConfigError(f"{len(r_max)} r_max for {len(prompts)} prompts", fix="give one a prompt, or none")
    found = [Proposals(prompt) for prompt in prompts]
    places = zip(prompts, _places(prompts), strict=True)
    uniforms = [_uniforms(f"{seed} coins {place} {prompt_key(prompt)}", budget) for prompt, place in places]
    results: dict[int, Kept] = {}
    lacking, spent = list(range(len(prompts))), 0
    while lacking and spent < budget:
        n = min(a_round, budget - spent)
        _add(found, lacking, engine, reward, n, parameters, f"{seed} {spent}")
        spent += n
        for i in lacking:
            bound = None if r_max is None else r_max[i]
            results[i] = reject(found[i].rewards, uniforms[i][:spent], beta, r_max=bound, wanted=wanted)
        lacking = [i for i in lacking if len(results[i].indices) < wanted]
    return [(proposals, results[i]) for i, proposals in enumerate(found)]


def refuse_empty(results: Sequence[tuple[Proposals, Kept]]) -> None:
    """DataError that names the first prompt of which nothing was kept, if there is one."""
    empty = [i for i, (_, kept) in enumerate(results) if not len(kept.indices)]
    if empty:
        proposals, kept = results[empty[0]]
        what = f"none of {kept.proposals} proposals was accepted, nor for {len(empty) - 1} other prompts"
        fix = "raise beta or the budget, or take several steps"
        raise DataError(what, where=_where(empty[0], proposals.prompt), fix=fix)


def _add(
    found: Sequence[Proposals],
    which: Sequence[int],
    engine: Engine,
    reward: Reward,
    n: int,
    parameters: SamplingParameters,
    key: str,
) -> None:
    """`n` more proposals for each of `which`. Equal prompts go in calls of their own, under seeds of their own."""
    places = _places([proposals.prompt for proposals in found])
    for place in sorted({places[i] for i in which}):
        group = [i for i in which if places[i] == place]
        seed = xxhash.xxh3_64_intdigest(f"{key} {place}".encode()) >> 1
        drawn = engine([found[i].prompt for i in group], n, parameters, seed=seed)
        texts = [as_completion(found[i].prompt, one.text) for i, row in zip(group, drawn, strict=True) for one in row]
        repeated = [found[i].prompt for i in group for _ in range(n)]
        rewards = torch.as_tensor(reward(repeated, texts), dtype=torch.float64).view(len(group), n)
        for i, row, own in zip(group, drawn, rewards, strict=True):
            if bad := (~own.isfinite()).nonzero().flatten().tolist():
                where = f"{reward.name}, {_where(i, found[i].prompt)}, completion {len(found[i].completions) + bad[0] + 1}"
                raise ModelError(f"gave {own[bad[0]].item()} as reward", where=where, fix="a reward is a finite number")
            found[i].completions += row
            found[i].rewards = torch.cat([found[i].rewards, own])


def _places(prompts: Sequence[Text]) -> list[int]:
    """How many equal prompts come before each."""
    seen: Counter[str] = Counter()
    places = []
    for prompt in prompts:
        key = prompt_key(prompt)
        places.append(seen[key])
        seen[key] += 1
    return places


def _uniforms(key: str, n: int) -> Tensor:
    """(n,) float64 in [0, 1) from `key` alone."""
    stream = np.random.Generator(np.random.Philox(key=xxhash.xxh3_128_intdigest(key.encode())))
    return torch.from_numpy(stream.random(n))


def _where(index: int, prompt: Text) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return f"prompt {index + 1} ({one_line(text, 40)!r})"
