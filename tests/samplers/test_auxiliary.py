"""Auxiliary pairs: their law, their independence of each other, and what there is no pair of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import xxhash
from scipy.stats import chisquare

from polyref.errors import ConfigError, DataError, ModelError
from polyref.samplers.auxiliary import Policy, as_completions, draw_pairs, other_pairs
from polyref.samplers.engine import Completion, SamplingParameters
from polyref.types import PreferenceRecord, Text

PARAMETERS = SamplingParameters(4)


@dataclass
class Urn:
    """An engine whose completions are letters of one law, whatever the prompt."""

    law: dict[str, float]
    name: str = "urn"
    calls: list[tuple[int, int]] = field(default_factory=list)

    def __call__(self, prompts: Sequence[Text], n: int, parameters: SamplingParameters, *, seed: int) -> list[list[Completion]]:
        self.calls.append((len(prompts), n))
        places: Counter[Text] = Counter()
        rows = []
        for prompt in prompts:
            stream = np.random.default_rng(xxhash.xxh3_64_intdigest(f"{seed} {places[prompt]} {prompt}".encode()))
            places[prompt] += 1
            texts = stream.choice(list(self.law), p=list(self.law.values()), size=n)
            rows.append([Completion((1, 2), str(text), 0.0, 0.0, text != "a") for text in texts])
        return rows


def drawn_from(policy: Policy, prompts: Sequence[str] = tuple(map(str, range(500))), *, pairs: int = 4, seed: int = 0) -> Any:
    return draw_pairs(prompts, policy, pairs, PARAMETERS, seed=seed, redraws=60)


def check_law(found: Any, law: dict[tuple[str, str], float]) -> None:
    counts = Counter(pair for pairs in found.pairs for pair in pairs)
    assert counts.keys() <= law.keys()
    total = sum(law.values())
    expected = [counts.total() * share / total for share in law.values()]
    assert chisquare([counts[pair] for pair in law], expected).pvalue > 0.01


def different(first: dict[str, float], second: dict[str, float]) -> dict[tuple[str, str], float]:
    return {(a, b): p * q for a, p in first.items() for b, q in second.items() if a != b}


def test_pairs_have_the_law_of_two_draws_given_that_they_differ() -> None:
    law = {"a": 0.6, "b": 0.3, "c": 0.1}
    found = drawn_from(Policy([Urn(law)], [1.0]))
    assert all(len(pairs) == 4 for pairs in found.pairs)
    check_law(found, different(law, law))
    equal = 0.36 + 0.09 + 0.01
    assert found.equal == pytest.approx(2000 * equal / (1 - equal), rel=0.1)
    assert found.completions == 2 * (2000 + found.equal) and found.tokens == 2 * found.completions
    assert 0.3 < found.ended / found.completions < 0.5


@pytest.mark.parametrize("per_pair", [False, True])
def test_a_mixture_draws_a_member_for_each_completion_or_for_each_pair(per_pair: bool) -> None:
    one, other, weights = {"a": 0.5, "b": 0.5}, {"c": 0.5, "d": 0.5}, (0.75, 0.25)
    found = drawn_from(Policy([Urn(one), Urn(other)], weights, per_pair))
    mixture = {text: weight * p for weight, law in zip(weights, (one, other), strict=True) for text, p in law.items()}
    law = different(mixture, mixture)
    if per_pair:
        within = [{pair: w * p for pair, p in different(a, a).items()} for w, a in zip(weights, (one, other), strict=True)]
        law = within[0] | within[1]
    check_law(found, law)


def test_what_is_drawn_for_a_prompt_depends_on_it_alone_and_equal_prompts_have_pairs_of_their_own() -> None:
    policy = Policy([Urn({"a": 0.4, "b": 0.3, "c": 0.3}), Urn({"d": 1.0})], (0.5, 0.5))
    together = drawn_from(policy, ["x", "y", "x", "z"] * 5, pairs=6)
    alone = drawn_from(policy, ["x"] * 10, pairs=6)
    assert together.pairs[::2] == alone.pairs
    assert len({tuple(pairs) for pairs in alone.pairs}) == 10
    assert drawn_from(policy, ["x"], seed=1).pairs != drawn_from(policy, ["x"], seed=2).pairs


def test_one_policy_is_called_once_for_all_pairs_and_then_for_those_that_lack() -> None:
    urn = Urn({"a": 0.5, "b": 0.5})
    drawn_from(Policy([urn], [1.0]), ["x", "y", "z"])
    assert urn.calls[0] == (3, 8) and all(prompts <= 3 and n <= 8 for prompts, n in urn.calls[1:])


def test_what_cannot_be_drawn_is_said() -> None:
    always = Policy([Urn({"b": 1.0})], [1.0])
    with pytest.raises(ModelError, match="2 of 2 prompts still lack a pair of different completions after 3 redraws"):
        draw_pairs(["x", "y"], always, 1, PARAMETERS, seed=0, redraws=3)
    for pairs, redraws in ((0, 1), (1, -1)):
        with pytest.raises(ConfigError, match=f"pairs is {pairs} and redraws {redraws}"):
            draw_pairs(["x"], always, pairs, PARAMETERS, seed=0, redraws=redraws)


def test_texts_become_what_completions_of_the_prompt_are() -> None:
    assert as_completions("x", [["a", "b"]]) == [("a", "b")]
    (pair,) = as_completions(({"role": "user", "content": "x"},), [["a", "b"]])
    assert pair == (({"role": "assistant", "content": "a"},), ({"role": "assistant", "content": "b"},))


def test_other_pairs_of_the_prompt_are_picked_without_its_own_and_without_replacement() -> None:
    pool = [PreferenceRecord("x", one, other) for one, other in ("ab", "ba", "ac", "bc", "cd", "ad")]
    pool += [PreferenceRecord("y", "a", "b")]
    (pairs,) = other_pairs([PreferenceRecord("x", "b", "a")], pool, 4, seed=0)
    assert sorted(pairs) == [("a", "c"), ("a", "d"), ("b", "c"), ("c", "d")]
    picked = {tuple(other_pairs([PreferenceRecord("x", "b", "a")], pool, 2, seed=seed)[0]) for seed in range(30)}
    assert len(picked) > 6
    with pytest.raises(DataError, match="memory, row 0: its prompt has 0 other pairs with votes, and 1 are needed"):
        other_pairs([PreferenceRecord("y", "b", "a")], pool, 1, seed=0)
    with pytest.raises(ConfigError, match="pairs is 0"):
        other_pairs(pool, pool, 0, seed=0)
