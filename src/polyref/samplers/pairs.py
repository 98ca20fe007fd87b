"""Scored completions of a prompt to preference pairs: which two, in what order, and with what label.

The candidates of a prompt are its pairs of completions with different texts whose rewards differ by at least `min_margin`, each
with the better one first. A pairing chooses among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xxhash

from polyref.data.sources import prompt_key
from polyref.errors import ConfigError, DataError, one_line
from polyref.rewards.protocols import PreferenceModel, check_probabilities
from polyref.samplers.pairing import Candidates, Floats, Pairing
from polyref.types import PreferenceRecord, Text


@dataclass(frozen=True, slots=True)
class Scored:
    """n completions of a prompt with their rewards (n,), and standard deviations (n,) of these where there are any.

    With `groups` (n,), who drew each, only completions of different groups make a pair. `apart` (n, n) is how far two are
    from each other, for pairings that ask. `source` and `row` (1-based) say where they came from, `ended` (n,) which were not
    cut; the records inherit them.
    """

    prompt: Text
    completions: Sequence[Text]
    rewards: Sequence[float]
    stds: Sequence[float] | None = None
    source: str = "memory"
    row: int = 0
    groups: Sequence[int] | None = None
    apart: Floats | None = None
    ended: Sequence[bool] | None = None


class Paired(NamedTuple):
    """`records` in order of prompts, how many of them are ties, and the indices of prompts that have no candidate."""

    records: list[PreferenceRecord]
    ties: int
    without: list[int]


def make_pairs(
    scored: Sequence[Scored],
    pairing: Pairing,
    *,
    seed: int,
    pairs: int = 1,
    min_margin: float = 0.0,
    tie_within: float = 0.0,
    preference: PreferenceModel | None = None,
) -> Paired:
    """At most `pairs` preference pairs of each prompt, as `pairing` chooses, no two of one prompt with the same two texts.

    Labels: by the reward, hard (`chosen_probability` None), or 0.5 where rewards differ by at most `tie_within`: a tie. With
    `preference`, its probability, chosen and rejected swapped where that is below 1/2. `min_margin` and `tie_within` are in
    units of the reward. Prompts without a candidate (one text, or all too close) are left out and named. What a prompt gets
    depends on it, its place in `scored` and `seed`. DataError, naming prompt and completion, for a reward that is not finite,
    numbers of rewards that do not fit, or no pair in all; ConfigError for settings out of range.
    """
    if pairs < 1 or not 0 <= min_margin < math.inf or not 0 <= tie_within < math.inf:
        what = f"pairs is {pairs}, min_margin {min_margin} and tie_within {tie_within}"
        raise ConfigError(what, fix="give at least 1 pair, and margins that are finite and at least 0")
    chosen: list[tuple[Scored, int, int]] = []
    without = []
    for place, one in enumerate(scored):
        candidates = _candidates(one, place, min_margin)
        key = f"{seed} {place} {prompt_key(one.prompt)}"
        stream = np.random.Generator(np.random.Philox(key=xxhash.xxh3_128_intdigest(key.encode())))
        taken = _smallest(one, candidates, pairing(candidates, stream), pairs) if len(candidates.better) else []
        chosen += [(one, better, worse) for better, worse in taken]
        if not taken:
            without.append(place)
    if not chosen:
        what = f"none of {len(scored)} prompts gives a pair: texts are equal, or rewards less than {min_margin:g} apart"
        fix = "draw more completions a prompt, or lower min_margin"
        raise DataError(what, where="pairs", fix=fix)
    ties = sum(abs(one.rewards[better] - one.rewards[worse]) <= tie_within for one, better, worse in chosen)
    return Paired(_records(chosen, tie_within, preference), ties, without)


def _candidates(one: Scored, place: int, min_margin: float) -> Candidates:
    n = len(one.completions)
    rewards = _numbers(one, place, "reward", one.rewards)
    stds = None if one.stds is None else _numbers(one, place, "standard deviation", one.stds, least=0.0)
    first, second = np.triu_indices(n, 1)
    swap = rewards[second] > rewards[first]
    better, worse = np.where(swap, second, first), np.where(swap, first, second)
    codes: dict[str, int] = {}
    texts = np.array([codes.setdefault(prompt_key(text), len(codes)) for text in one.completions], dtype=np.intp)
    kept = (texts[better] != texts[worse]) & (rewards[better] - rewards[worse] >= min_margin)
    if one.groups is not None:
        groups = np.asarray(one.groups)
        kept &= groups[better] != groups[worse]
    better, worse = better[kept], worse[kept]
    return Candidates(better, worse, rewards, stds, None if one.apart is None else one.apart[better, worse])


def _smallest(one: Scored, candidates: Candidates, keys: Floats, pairs: int) -> list[tuple[int, int]]:
    """The `pairs` candidates of the smallest finite keys, the first of those with the same two texts."""
    taken: dict[frozenset[str], tuple[int, int]] = {}
    for i in np.argsort(keys, kind="stable"):
        if len(taken) == pairs or keys[i] == math.inf:
            break
        better, worse = int(candidates.better[i]), int(candidates.worse[i])
        texts = frozenset((prompt_key(one.completions[better]), prompt_key(one.completions[worse])))
        taken.setdefault(texts, (better, worse))
    return list(taken.values())


def _records(
    chosen: Sequence[tuple[Scored, int, int]], tie_within: float, preference: PreferenceModel | None
) -> list[PreferenceRecord]:
    """A record for each (scored, better, worse), labelled."""
    probabilities: list[float | None]
    if preference is None:
        ties = (abs(one.rewards[better] - one.rewards[worse]) <= tie_within for one, better, worse in chosen)
        probabilities = [0.5 if tie else None for tie in ties]
    else:
        prompts = [one.prompt for one, _, _ in chosen]
        first, second = ([one.completions[pair[side]] for one, *pair in chosen] for side in (0, 1))
        probabilities = check_probabilities(preference(prompts, first, second), len(prompts), preference.name).tolist()
    records = []
    for (one, better, worse), p in zip(chosen, probabilities, strict=True):
        if p is not None and p < 0.5:
            better, worse, p = worse, better, 1 - p
        texts = one.completions[better], one.completions[worse]
        fields: dict[str, Any] = {"chosen_probability": p, "source": one.source, "row": one.row}
        if one.ended is not None:
            fields |= {"chosen_ended": one.ended[better], "rejected_ended": one.ended[worse]}
        records.append(PreferenceRecord(one.prompt, *texts, **fields))
    return records


def _numbers(one: Scored, place: int, word: str, values: Sequence[float], least: float = -math.inf) -> Floats:
    """`values` as (n,) float64. DataError unless there is one a completion, finite and at least `least`."""
    text = one.prompt if isinstance(one.prompt, str) else one.prompt[-1]["content"]
    where = f"{one.source}, row {one.row or place + 1}, prompt {one_line(text, 40)!r}"
    found = np.asarray(values, dtype=np.float64)
    if found.shape != (len(one.completions),):
        raise DataError(f"{len(values)} {word}s for {len(one.completions)} completions", where=where, fix="give one of each")
    if bad := np.flatnonzero(~(np.isfinite(found) & (found >= least))).tolist():
        fix = f"a {word} is a finite number" + ("" if least < 0 else ", at least 0")
        raise DataError(f"the {word} of completion {bad[0] + 1} is {found[bad[0]]}", where=where, fix=fix)
    return found
