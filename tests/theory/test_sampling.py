"""Draws against their law by chi-square, order variants against counts, and replicates that no thread count changes."""

from __future__ import annotations

import threading

import pytest
import torch
from scipy import stats
from torch import Tensor

from polyref.errors import ConfigError
from polyref.theory.preferences import MISSPECIFICATIONS, bradley_terry, pair_law
from polyref.theory.replicates import map_replicates
from polyref.theory.sampling import count_wins, draw_pairs, draw_wins


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def world(contexts: int = 3, actions: int = 4) -> tuple[Tensor, Tensor]:
    """A lopsided law, action 1 of context 0 never drawn, and an intransitive crowd."""
    logits = 2 * torch.randn(contexts, actions, generator=generator(7), dtype=torch.float64)
    logits[0, 1] = -torch.inf
    rewards = torch.rand(contexts, actions, generator=generator(8), dtype=torch.float64)
    rho = torch.arange(1, contexts + 1, dtype=torch.float64) / sum(range(contexts + 1))
    return pair_law(rho, logits.log_softmax(-1)), MISSPECIFICATIONS["intransitive"](rewards, generator(9))


def chi_square(counts: Tensor, law: Tensor) -> float:
    """The p-value of counts against a law; a count where there is no mass gives 0."""
    counts, expected = counts.flatten(), law.flatten() * counts.sum()
    if (counts[expected == 0] > 0).any():
        return 0.0
    kept = expected > 0
    return float(stats.chisquare(counts[kept].numpy(), expected[kept].numpy()).pvalue)


def test_wins_follow_their_law() -> None:
    law, preference = world()
    wins = draw_wins(law, preference, 500, 400, generator())
    assert wins.shape == (400, 3, 4, 4)
    assert (wins.sum((1, 2, 3)) == 500).all()
    outcomes = (law + law.mT) * preference
    assert chi_square(wins.sum(0), outcomes) > 1e-3
    # Replicates are independent multinomials: the variance between them is n p (1 - p), which a shared draw would not give.
    z = (wins.var(0) / (500 * outcomes * (1 - outcomes)))[outcomes > 1e-3]
    assert (z - 1).abs().max() < 5 * (2 / 399) ** 0.5


def test_ordered_pairs_follow_the_law_of_the_pairs_and_of_the_labels_and_count_like_the_wins() -> None:
    law, preference = world()
    pairs = draw_pairs(law, preference, 500, 400, generator())
    cells = (pairs.contexts * 16 + pairs.first * 4 + pairs.second) * 2 + pairs.z.long()
    expected = torch.stack([law * (1 - preference), law * preference], -1)
    assert chi_square(torch.bincount(cells.flatten(), minlength=96).double(), expected) > 1e-3
    wins = count_wins(pairs, 3, 4)
    assert (wins.sum((1, 2, 3)) == 500).all()
    assert chi_square(wins.sum(0), (law + law.mT) * preference) > 1e-3


def test_each_replicate_may_have_its_own_law_and_crowd() -> None:
    law, preference = world()
    laws = torch.stack([law, law.flip(0), law.flip(1)])
    crowds = torch.stack([preference, 1 - preference, bradley_terry(torch.zeros(3, 4))])
    wins = draw_wins(laws, crowds, 50_000, 3, generator())
    counted = count_wins(draw_pairs(laws, crowds, 50_000, 3, generator(1)), 3, 4)
    for r in range(3):
        expected = (laws[r] + laws[r].mT) * crowds[r]
        assert chi_square(wins[r], expected) > 1e-3
        assert chi_square(counted[r], expected) > 1e-3


def test_a_seed_repeats_and_another_does_not() -> None:
    law, preference = world()
    assert torch.equal(draw_wins(law, preference, 9, 5, generator()), draw_wins(law, preference, 9, 5, generator()))
    assert not torch.equal(draw_wins(law, preference, 9, 5, generator()), draw_wins(law, preference, 9, 5, generator(1)))


def test_bad_laws_are_refused_in_one_line() -> None:
    law, preference = world()
    with pytest.raises(ConfigError, match=r"law \(3, 4, 4\): is not a probability law"):
        draw_wins(2 * law, preference, 5, 2, generator())
    with pytest.raises(ConfigError, match=r"preference \(3, 4, 4\): does not satisfy"):
        draw_pairs(law, preference * 0.9, 5, 2, generator())
    with pytest.raises(ConfigError, match="has 3 rows for 2 replicates"):
        draw_wins(law.expand(3, 3, 4, 4), preference, 5, 2, generator())
    with pytest.raises(ConfigError, match="is not"):
        draw_wins(law[0], preference, 5, 2, generator())
    with pytest.raises(ConfigError, match="at least 1"):
        draw_wins(law, preference, 0, 2, generator())


def uniforms(source: torch.Generator, size: int) -> dict[str, Tensor]:
    return {"u": torch.rand(size, 2, generator=source, dtype=torch.float64)}


def test_replicates_depend_on_neither_threads_nor_progress_and_use_a_stream_a_chunk() -> None:
    seen: list[tuple[int, int]] = []
    before = torch.get_num_threads()
    alone = map_replicates(uniforms, 1000, 3, chunk=64, threads=1)["u"]
    shared = map_replicates(uniforms, 1000, 3, chunk=64, threads=4, progress=lambda *at: seen.append(at))["u"]
    assert torch.equal(alone, shared)
    assert torch.get_num_threads() == before
    assert alone.shape == (1000, 2)
    assert len(alone.unique()) == 2000
    assert seen[-1] == (1000, 1000)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert torch.equal(map_replicates(uniforms, 128, 3, chunk=64)["u"], alone[:128])
    assert not torch.equal(map_replicates(uniforms, 1000, 4, chunk=64)["u"], alone)


def test_an_error_in_a_chunk_is_raised_and_sizes_are_checked() -> None:
    def fail(source: torch.Generator, size: int) -> dict[str, Tensor]:
        raise RuntimeError("chunk broke")

    with pytest.raises(RuntimeError, match="chunk broke"):
        map_replicates(fail, 100, 0, chunk=10)
    with pytest.raises(ConfigError, match="does not hold 5 replicates"):
        map_replicates(lambda source, size: {"u": torch.zeros(size + 1)}, 5, 0)
    with pytest.raises(ConfigError, match="at least 1"):
        map_replicates(uniforms, 0, 0)


def test_an_interrupt_does_not_wait_for_the_chunk_that_runs() -> None:
    begun, left, ended = threading.Event(), threading.Event(), threading.Event()

    def the_last_is_slow(source: torch.Generator, size: int) -> dict[str, Tensor]:
        if size == 5:
            begun.set()
            left.wait(30)
            ended.set()
        begun.wait(30)
        return {"u": torch.zeros(size)}

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        map_replicates(the_last_is_slow, 15, 0, chunk=10, progress=interrupted)
    waited = ended.is_set()
    left.set()
    assert not waited and ended.wait(30)
