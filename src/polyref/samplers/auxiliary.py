"""Auxiliary pairs: two completions of a prompt that differ, by the law that data pairs have.

Data hold no pair of equal completions, so their law is that of two independent draws *given that they differ*. A pair whose
completions turn out equal is therefore drawn again as a whole; a new second completion alone would lean to rare first ones.
A mixture of policies draws the member of every completion, or one of every pair: whichever made the data.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash

from polyref.data.sources import by_prompt, prompt_key
from polyref.errors import ConfigError, DataError, ModelError
from polyref.samplers.engine import Completion, Engine, SamplingParameters
from polyref.types import PreferenceRecord, Text

Pair = tuple[Text, Text]


class Policy(NamedTuple):
    """What completions are drawn from: `engines` (K,), each with its weight; `per_pair`: both of a pair by one of them."""

    engines: Sequence[Engine]
    weights: Sequence[float]
    per_pair: bool = False


@dataclass
class Drawn:
    """`pairs`, for each of N prompts M texts and M others, and what it took: completions, their tokens, how many ended.

    `equal` counts pairs that were drawn again, as their completions were equal.
    """

    pairs: list[list[tuple[str, str]]]
    completions: int = 0
    tokens: int = 0
    ended: int = 0
    equal: int = 0


def draw_pairs(
    prompts: Sequence[Text], policy: Policy, pairs: int, parameters: SamplingParameters, *, seed: int, redraws: int
) -> Drawn:
    """`pairs` pairs for each of `prompts`, independent of each other, of equal prompts too, if all of these are in one call.

    What is drawn for a prompt depends on its text, its place among equal ones, and `seed`, up to the engines' rounding. A pair
    of equal completions is drawn again at most `redraws` times, ModelError after that. ConfigError for fewer than 1 pair or 0
    redraws.
    """
    if pairs < 1 or redraws < 0:
        fix = "draw at least 1 pair a prompt, and again at least 0 times"
        raise ConfigError(f"pairs is {pairs} and redraws {redraws}", fix=fix)
    streams, seen = [], dict[str, int]()
    for prompt in prompts:
        key = prompt_key(prompt)
        streams.append(f"{seen.setdefault(key, 0)} {key}")
        seen[key] += 1
    found = Drawn([[] for _ in prompts])
    for attempt in range(redraws + 1):
        lacking = {i: pairs - len(some) for i, some in enumerate(found.pairs) if len(some) < pairs}
        if not lacking:
            break
        slots = {i: _members(policy, count, f"{seed} {attempt} {streams[i]}") for i, count in lacking.items()}
        for i, texts in _completions(prompts, policy, slots, parameters, seed, attempt, found).items():
            drawn = list(zip(texts[::2], texts[1::2], strict=True))
            different = [pair for pair in drawn if pair[0] != pair[1]]
            found.equal += len(drawn) - len(different)
            found.pairs[i] += different
    if short := sum(len(some) < pairs for some in found.pairs):
        what = f"{short} of {len(prompts)} prompts still lack a pair of different completions after {redraws} redraws"
        raise ModelError(what, where="sampling policy", fix="raise temperature or redraws, or remove such prompts")
    return found


def _members(policy: Policy, pairs: int, key: str) -> list[int]:
    """Which member draws each of 2 `pairs` completions."""
    stream = np.random.Generator(np.random.Philox(key=xxhash.xxh3_128_intdigest(key.encode())))
    weights = np.array(policy.weights, dtype=np.float64)
    drawn = stream.choice(len(weights), p=weights / weights.sum(), size=pairs if policy.per_pair else 2 * pairs)
    return [int(member) for member in (np.repeat(drawn, 2) if policy.per_pair else drawn)]


def _completions(
    prompts: Sequence[Text],
    policy: Policy,
    slots: Mapping[int, Sequence[int]],
    parameters: SamplingParameters,
    seed: int,
    attempt: int,
    found: Drawn,
) -> dict[int, list[str]]:
    """A text for every slot of every prompt in `slots`, by the member named there; counted in `found`.

    Prompts that want as many completions of a member are one call of its engine, under a seed of their own: equal prompts in
    one call have streams of their own already.
    """
    texts = {i: [""] * len(members) for i, members in slots.items()}
    for member, engine in enumerate(policy.engines):
        places = {i: [slot for slot, who in enumerate(members) if who == member] for i, members in slots.items()}
        for count in sorted({len(some) for some in places.values()} - {0}):
            group = [i for i, some in places.items() if len(some) == count]
            own = xxhash.xxh3_64_intdigest(f"{seed} {attempt} {member} {count}".encode()) >> 1
            drawn = engine([prompts[i] for i in group], count, parameters, seed=own)
            for i, completions in zip(group, drawn, strict=True):
                _count(completions, found)
                for slot, completion in zip(places[i], completions, strict=True):
                    texts[i][slot] = completion.text
    return texts


def _count(completions: Sequence[Completion], found: Drawn) -> None:
    found.completions += len(completions)
    found.tokens += sum(len(completion.token_ids) for completion in completions)
    found.ended += sum(completion.ended for completion in completions)


def as_completions(prompt: Text, pairs: Sequence[Sequence[str]]) -> list[Pair]:
    """Pairs of texts, each in the form of `as_completion`."""
    return [(as_completion(prompt, first), as_completion(prompt, second)) for first, second in pairs]


def as_completion(prompt: Text, text: str) -> Text:
    """`text` in the form that completions of `prompt` have: text, or one assistant message."""
    return text if isinstance(prompt, str) else ({"role": "assistant", "content": text},)


def other_pairs(
    records: Sequence[PreferenceRecord], pool: Sequence[PreferenceRecord], pairs: int, *, seed: int
) -> list[list[Pair]]:
    """For each record `pairs` other pairs of its prompt out of `pool`, without replacement, at random by `seed`.

    They have the law of the data where all pairs of a prompt were made alike. DataError, naming the record, where its prompt
    has too few; ConfigError for fewer than 1.
    """
    if pairs < 1:
        raise ConfigError(f"pairs is {pairs}", fix="give at least 1 pair a prompt")
    groups = {prompt: {_unordered(r): r for r in group} for prompt, group in by_prompt(pool).items()}
    chosen = []
    for place, record in enumerate(records):
        others = {key: r for key, r in groups.get(prompt_key(record.prompt), {}).items() if key != _unordered(record)}
        if len(others) < pairs:
            what = f"its prompt has {len(others)} other pairs with votes, and {pairs} are needed"
            where = f"{record.source}, row {record.row}"
            raise DataError(what, where=where, fix="lower pairs, or draw from a sampling policy")
        stream = random.Random(f"{seed} {place} {prompt_key(record.prompt)}")
        chosen.append([(r.chosen, r.rejected) for r in stream.sample(list(others.values()), pairs)])
    return chosen


def _unordered(record: PreferenceRecord) -> tuple[str, ...]:
    return tuple(sorted((prompt_key(record.chosen), prompt_key(record.rejected))))
