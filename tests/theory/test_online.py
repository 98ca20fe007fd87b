"""Rounds: labels are counted, gaps fall, strategies differ as they should, and a run repeats from its seed."""

from __future__ import annotations

import math

import pytest
import torch

from polyref.errors import ConfigError
from polyref.theory import gshf
from polyref.theory.bandit import FiniteBandit, random_bandit
from polyref.theory.online import (
    Curves,
    Round,
    Strategy,
    anchored,
    enhancing,
    fixed,
    greedy,
    random_pair,
    run_hybrid,
    run_rounds,
)

REPLICATES = 60
STRATEGIES = {"enhancer": enhancing(3.0), "greedy": greedy, "anchor": anchored, "random pair": random_pair}


def bandit() -> FiniteBandit:
    return random_bandit(
        torch.Generator().manual_seed(4),
        replicates=(REPLICATES,),
        contexts=3,
        actions=5,
        references=2,
        beta=0.2,
        features=3,
        reward_range=2.0,
    )


def run(strategy: Strategy, seed: int = 0, rounds: int = 8, batch_size: int = 40, **options: object) -> Curves:
    generator = torch.Generator().manual_seed(seed)
    return run_rounds(
        bandit(),
        strategy,
        generator,
        rounds=rounds,
        batch_size=batch_size,
        replicates=REPLICATES,
        radius=4.0,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_the_gap_falls_with_the_rounds_and_regret_adds_it_up(name: str) -> None:
    curves = run(STRATEGIES[name], rounds=16)
    mean = curves.gap.mean(0)
    assert mean[16] < mean[4] / 2 < mean[0] / 2
    assert (curves.gap >= 0).all()
    torch.testing.assert_close(curves.labels, 40.0 * torch.arange(17, dtype=torch.float64))
    torch.testing.assert_close(curves.regret.diff(dim=-1), 40 * curves.gap[:, :-1])
    assert (curves.wins.sum((1, 2, 3)) == 640).all()
    if name == "greedy":
        torch.testing.assert_close(curves.played, curves.regret)


def test_the_first_main_agent_is_the_anchor_whose_gap_is_known() -> None:
    own = bandit()
    curves = run(greedy, rounds=1)
    torch.testing.assert_close(
        curves.gap[:, 0], own.beta * own.mean((own.rewards / own.beta + own.geometric).logsumexp(-1)) - _mean(own)
    )


def _mean(own: FiniteBandit) -> torch.Tensor:
    return own.mean((own.geometric.exp() * own.rewards).sum(-1))


def test_a_run_repeats_from_its_seed_and_differs_with_another() -> None:
    first, again, other = (run(enhancing(1.0), seed=seed, rounds=3) for seed in (1, 1, 2))
    assert torch.equal(first.gap, again.gap)
    assert not torch.equal(first.gap, other.gap)


def test_smaller_batches_learn_no_worse_from_equal_labels() -> None:
    small = run(anchored, rounds=16, batch_size=10)
    large = run(anchored, rounds=1, batch_size=160)
    assert float(small.labels[-1]) == float(large.labels[-1])
    assert small.gap[:, -1].mean() < 1.3 * large.gap[:, -1].mean()


def test_strategies_see_the_main_agent_and_return_policies() -> None:
    own = bandit()
    main, matrix = own.geometric, torch.eye(3, dtype=torch.float64).expand(REPLICATES, 3, 3)
    for strategy in STRATEGIES.values():
        for policy in strategy(Round(own, main, matrix)):
            assert policy.shape == main.shape
            torch.testing.assert_close(policy.logsumexp(-1), torch.zeros(REPLICATES, 3, dtype=torch.float64))


def test_uniform_pairs_leave_unsupported_actions_alone() -> None:
    own = bandit()
    logps = own.logps.clone()
    logps[:, 0, 1] = -math.inf
    narrow = FiniteBandit.linear(own.features, own.theta, logps.log_softmax(-2), own.weights, beta=0.2)  # type: ignore[arg-type]
    for name in ("random pair", "enhancer"):
        generator = torch.Generator().manual_seed(0)
        wins = run_rounds(narrow, STRATEGIES[name], generator, rounds=2, batch_size=50, replicates=REPLICATES).wins
        assert float(wins[:, 0, 1].sum() + wins[:, 0, :, 1].sum()) == 0


def test_hybrid_starts_from_its_offline_labels() -> None:
    own = bandit()
    generator = torch.Generator().manual_seed(0)
    curves = run_hybrid(
        own, fixed(own.mixture), generator, offline_labels=100, rounds=3, batch_size=20, replicates=REPLICATES, radius=4.0
    )
    assert curves.labels.tolist() == [100, 120, 140, 160]
    assert (curves.wins.sum((1, 2, 3)) == 160).all()
    assert curves.gap[:, 0].mean() < run(fixed(own.mixture), rounds=1).gap[:, 0].mean()


def test_a_pessimist_may_learn() -> None:
    def learner(theta: torch.Tensor, matrix: torch.Tensor, own: FiniteBandit) -> torch.Tensor:
        return gshf.offline_policy_level(theta, matrix, own, scale=0.5)

    curves = run(fixed(bandit().mixture), rounds=2, learner=learner)
    assert curves.gap[:, 2].mean() < curves.gap[:, 0].mean()


def test_bad_input_is_one_line() -> None:
    with pytest.raises(ConfigError, match="rounds 0"):
        run(greedy, rounds=0)
    with pytest.raises(ConfigError, match="scale of the enhancer is -1"):
        enhancing(-1)
