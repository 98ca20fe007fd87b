"""Accuracies as agreement with labels; intervals by how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from polyref.errors import ConfigError, DataError
from polyref.objectives.metrics import mean_interval, preference_accuracy


def test_accuracy_counts_wins_and_gives_ties_a_half():
    h = torch.tensor([2.0, -0.1, 0.0, math.nan, math.inf])
    assert preference_accuracy(h).tolist() == pytest.approx([1.0, 0.0, 0.5, math.nan, 1.0], nan_ok=True)


def test_accuracy_under_soft_labels_is_agreement_with_a_drawn_label():
    generator = torch.Generator().manual_seed(0)
    h, p = torch.randn(6, generator=generator), torch.rand(6, generator=generator)
    labels = torch.rand(20000, 6, generator=generator) < p
    agreement = ((h > 0) == labels).float().mean(0)
    torch.testing.assert_close(preference_accuracy(h, chosen_probability=p), agreement, rtol=0, atol=0.02)
    assert (preference_accuracy(h, chosen_probability=p) <= torch.maximum(p, 1 - p)).all()


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    intervals = [mean_interval(generator.normal(size=60), level=0.9, seed=trial, resamples=400) for trial in range(400)]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in intervals])
    assert 0.84 < covered < 0.94


def test_clusters_widen_the_interval_to_what_shared_prompts_cost():
    """Pairs of one prompt share most of their value: pair by pair the interval is wrong, cluster by cluster it holds."""
    generator = np.random.default_rng(1)
    prompts = np.repeat(np.arange(50), 6)
    together, apart = [], []
    for trial in range(300):
        values = np.repeat(generator.normal(size=50), 6) + 0.3 * generator.normal(size=300)
        for clusters, covered in ((prompts, together), (None, apart)):
            interval = mean_interval(values, clusters, seed=trial, resamples=300)
            covered.append(interval.low <= 0 <= interval.high)
    assert np.mean(together) > 0.89
    assert np.mean(apart) < 0.75


def test_one_value_a_cluster_is_no_clustering_and_names_are_only_names():
    values = np.random.default_rng(2).normal(size=30)
    plain = mean_interval(values, seed=5)
    assert mean_interval(values, range(30), seed=5) == plain
    assert mean_interval(torch.from_numpy(values), [f"prompt {i}" for i in range(30)], seed=5) == plain
    assert mean_interval(values, [(i // 2,) for i in range(30)], seed=5) == mean_interval(values, np.arange(30) // 2, seed=5)


def test_unequal_clusters_keep_the_mean_over_values():
    """Forty prompts of one won pair and forty of nine lost ones: the mean over pairs is 1/10, over prompts 1/2."""
    values, clusters = [1.0] * 40 + [0.0] * 360, list(range(40)) + list(range(40, 80)) * 9
    interval = mean_interval(values, clusters, seed=0)
    assert 0.05 < interval.low < interval.mean == 0.1 < interval.high < 0.2


def test_the_seed_decides_and_memory_chunks_do_not(monkeypatch):
    values = np.random.default_rng(3).normal(size=40)
    interval = mean_interval(values, seed=1)
    assert interval == mean_interval(values, seed=1) != mean_interval(values, seed=2)
    assert interval.low < interval.mean < interval.high
    monkeypatch.setattr("polyref.objectives.metrics._DRAWS_AT_ONCE", 100)
    assert mean_interval(values, seed=1) == interval


def test_the_interval_follows_scale_shift_and_level():
    values = np.random.default_rng(4).normal(size=40)
    narrow, wide = mean_interval(values, level=0.5, seed=0), mean_interval(values, level=0.99, seed=0)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert mean_interval(3 * values + 7, seed=0) == pytest.approx([3 * x + 7 for x in mean_interval(values, seed=0)])


def test_one_cluster_has_no_interval():
    interval = mean_interval([1.0, 0.0], ["same", "same"], seed=0)
    assert interval.mean == 0.5 and math.isnan(interval.low) and math.isnan(interval.high)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf], [[1.0]], 1.0])
def test_values_without_a_mean_are_refused(values):
    with pytest.raises(DataError, match="mean_interval"):
        mean_interval(values, seed=0)


def test_mismatched_clusters_and_levels_are_refused():
    with pytest.raises(DataError, match="1 cluster names for 2 values"):
        mean_interval([0.0, 1.0], ["a"], seed=0)
    with pytest.raises(ConfigError, match="level"):
        mean_interval([0.0, 1.0], level=95, seed=0)
