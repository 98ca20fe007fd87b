"""Exact samples of composed references: one function over the methods, which a name chooses.

| method | draws from | exact | members |
| --- | --- | --- | --- |
| mixture | M_a = sum_i a_i pi_i | yes | any |
| rejection | G_a = prod_i pi_i^{a_i} / F_a | yes | any |
| tokens | G_a | yes | of one tokenizer |
| smc | G_a | no: weighted, consistent | of one tokenizer |
| auto | either | where the budget allows | any |
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from polyref.data.sources import prompt_key
from polyref.errors import ConfigError, ModelError, ReferenceSetError
from polyref.references.compose import check_weights
from polyref.samplers.arithmetic import draw_mixture
from polyref.samplers.composed_auto import draw_auto
from polyref.samplers.composed_values import Drawn, Method, Plan, Task
from polyref.samplers.engine import Progress, SamplingParameters, Tally
from polyref.samplers.geometric import draw_rejection
from polyref.samplers.geometric_tokens import draw_tokens
from polyref.samplers.members import Member, Members
from polyref.samplers.smc import draw_smc
from polyref.types import Text

METHODS: Final[Mapping[str, tuple[str, bool, Method]]] = MappingProxyType(
    {
        "mixture": ("arithmetic", False, draw_mixture),
        "rejection": ("geometric", False, draw_rejection),
        "tokens": ("geometric", True, draw_tokens),
        "smc": ("geometric", True, draw_smc),
    }
)
"""By name: the composition drawn from, whether members must have one tokenizer, and what draws."""

LONGEST_PROPOSALS: Final = 100
"""The budget where none is given: what as many proposals of full length take, for each completion asked for."""


def draw_composed(
    members: Members,
    prompts: Sequence[Text],
    n: int,
    parameters: SamplingParameters,
    *,
    seed: int,
    method: str = "auto",
    weights: Sequence[Sequence[float] | None] | None = None,
    places: Sequence[int] | None = None,
    budget: int | None = None,
    fixed: bool = False,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[Drawn]:
    """`n` completions of each prompt from the composition of `members`, in the order of `prompts`.

    `weights` (P, K) replaces those of the set for the prompts that have some; members of weight 0 are left out. `budget` is the
    most `calls` (completion tokens through members) a prompt may take: it is never exceeded, and a result that is short of
    what was asked says so in its `note`; by default 100 n proposals of full length. `fixed` makes n proposals and returns those
    accepted. A completion cut at `max_new_tokens` is part of the support, except where tokenizers differ. What is drawn for a
    prompt depends on the prompt, its place among equal ones (in `prompts`, or as `places` (P,) say), its weights and `seed`, up
    to rounding. `progress` is told of n a prompt as they are done, of fewer where a budget ends it.

    Raises ConfigError for settings out of range, a method that is not one of the composition, temperature or top_p other than
    1; ReferenceSetError for weights off the simplex, of members not loaded, and for a method of tokens with several tokenizers.
    """
    draw = _method(members, method, fixed)
    if parameters.temperature != 1 or parameters.top_p != 1:
        what = f"temperature is {parameters.temperature} and top_p {parameters.top_p}"
        raise ConfigError(what, fix="leave both at 1: a composition is of the members' own laws")
    if weights is not None and len(weights) != len(prompts):
        raise ConfigError(
            f"{len(weights)} rows of weights for {len(prompts)} prompts", fix="give one row a prompt, or None for it"
        )
    if n < 1 or batch_size < 1 or (budget is not None and budget < 1):
        what = f"n is {n}, batch_size {batch_size}, budget {budget}"
        raise ConfigError(what, fix="give at least 1 of each")
    tally = Tally(n * len(prompts), progress)
    plan = Plan(n, parameters.max_new_tokens, seed, batch_size, fixed, not members.one_tokenizer, tally)
    rows = [_weights(members, i, None if weights is None else weights[i]) for i in range(len(prompts))]
    keys = _keys(prompts, places)
    found: dict[int, Drawn] = {}
    with members.drawing():
        for active in dict.fromkeys(tuple(k for k, a in enumerate(row) if a > 0) for row in rows):
            some = [i for i, row in enumerate(rows) if tuple(k for k, a in enumerate(row) if a > 0) == active]
            group = [_loaded(members, k) for k in active]
            tasks = [_task(group, prompts[i], i, [rows[i][k] for k in active], keys[i], plan) for i in some]
            if plan.by_text:
                _check_ends(group, tasks[0])
            each = budget or LONGEST_PROPOSALS * n * len(group) * plan.max_new_tokens
            for i, drawn in zip(some, draw(group, tasks, [each] * len(tasks), plan), strict=True):
                found[i] = _widened(drawn, active, len(members.members))
    return [found[i] for i in range(len(prompts))]


def _method(members: Members, method: str, fixed: bool) -> Method:
    if method == "auto":
        if fixed:
            raise ConfigError("fixed is set, and the method is auto", fix="name a method, or leave fixed out")
        if members.composition == "arithmetic":
            return draw_mixture
        return draw_auto if members.one_tokenizer else draw_rejection
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}", fix=f"use one of auto, {', '.join(METHODS)}")
    composition, by_token, draw = METHODS[method]
    if composition != members.composition:
        names = ", ".join(name for name, (other, _, _) in METHODS.items() if other == members.composition)
        what = f"method {method} draws from a composition that is {composition}, and the references' is {members.composition}"
        raise ConfigError(what, fix=f"use one of {names}")
    if by_token and not members.one_tokenizer:
        what = f"method {method} composes next-token laws, and the references have different tokenizers"
        raise ReferenceSetError(what, fix="use rejection, which needs whole completions only")
    return draw


def _weights(members: Members, row: int, own: Sequence[float] | None) -> list[float]:
    checked = check_weights(members.weights if own is None else own, members=len(members.members))
    values = [float(value) for value in checked.tolist()]
    total = math.fsum(values)  # within the tolerance of 1; the bound on acceptance needs 1
    return [value / total for value in values]


def _keys(prompts: Sequence[Text], given: Sequence[int] | None) -> list[str]:
    if given is not None:
        return [f"{place} {prompt_key(prompt)}" for place, prompt in zip(given, prompts, strict=True)]
    places: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        key = prompt_key(prompt)
        keys.append(f"{places[key]} {key}")
        places[key] += 1
    return keys


def _loaded(members: Members, place: int) -> Member:
    member = members.members[place]
    if member is None:
        what = f"reference {place} has weight for a prompt, but is not loaded"
        raise ReferenceSetError(what, fix="name it in `needed` of load_members, as ReferenceSet.needed(weights) does")
    return member


def _task(group: Sequence[Member], prompt: Text, row: int, weights: Sequence[float], key: str, plan: Plan) -> Task:
    ids = tuple(member.prompt_ids(prompt, plan.max_new_tokens, row + 1) for member in group)
    return Task(prompt, ids, tuple(weights), key)


def _check_ends(group: Sequence[Member], task: Task) -> None:
    """ModelError for a member under which no text has a canonical encoding: nothing would ever be accepted."""
    for member in group:
        if member.canonical_ids(task.prompt, "a") is None:
            what = "its encoding of a completion does not begin with the prompt's, or does not end with what ends completions"
            raise ModelError(what, where=member.label, fix="use a chat template that ends a turn with the model's end token")


def _widened(drawn: Drawn, active: Sequence[int], members: int) -> Drawn:
    """`drawn` with log-probs of all K members, NaN for those that were not asked."""

    def widened(logps: Sequence[float]) -> tuple[float, ...]:
        known = dict(zip(active, logps, strict=True))
        return tuple(known.get(place, math.nan) for place in range(members))

    return replace(drawn, samples=tuple(replace(sample, logps=widened(sample.logps)) for sample in drawn.samples))
