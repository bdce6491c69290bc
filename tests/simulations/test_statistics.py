"""Clustered errors against their definition and known limits, and intervals against how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.statistics import bootstrap, clustered_error

values = st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 4)), min_size=2, max_size=30)


def by_definition(values_u: list[float], groups_u: list[int]) -> float:
    """The sandwich estimate of Liang and Zeger (1986) for a mean, with C / (C - 1), in plain loops."""
    users, groups = len(values_u), set(groups_u)
    mean = math.fsum(values_u) / users
    total = 0.0
    for i in range(users):
        for j in range(users):
            if groups_u[i] == groups_u[j]:
                total += (values_u[i] - mean) * (values_u[j] - mean)
    return math.sqrt(max(total, 0.0) * len(groups) / (len(groups) - 1)) / users


@given(values)
def test_the_clustered_error_is_the_sum_over_pairs_of_one_group(pairs: list[tuple[float, int]]) -> None:
    values_u, groups_u = [v for v, _ in pairs], [g for _, g in pairs]
    found = clustered_error(np.array(values_u), np.array(groups_u))
    if len(set(groups_u)) < 2:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(by_definition(values_u, groups_u), rel=1e-6, abs=1e-5)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_with_one_user_per_group_it_is_the_usual_error(values_u: list[float]) -> None:
    names = np.random.default_rng(0).permutation(1000)[: len(values_u)]
    usual = np.std(values_u, ddof=1) / math.sqrt(len(values_u))
    assert clustered_error(np.array(values_u), names) == pytest.approx(usual, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("copies", [2, 7])
def test_copies_of_users_in_their_groups_add_no_certainty(copies: int) -> None:
    generator = np.random.default_rng(1)
    values_u, groups_u = generator.normal(size=40), generator.integers(0, 12, 40)
    once = clustered_error(values_u, groups_u)
    assert clustered_error(np.tile(values_u, copies), np.tile(groups_u, copies)) == pytest.approx(once)
    assert clustered_error(np.tile(values_u, copies), np.arange(40 * copies)) < 0.8 * once


def test_the_clustered_error_is_the_deviation_of_the_mean_over_repetitions() -> None:
    """Groups of 5 share half of their variance, so the mean of 30 groups has variance (1 + 4 * 0.5) / 150."""
    generator = np.random.default_rng(2)
    groups_u = np.repeat(np.arange(30), 5)
    errors = []
    for _ in range(400):
        common, own = generator.normal(size=30), generator.normal(size=150)
        errors.append(clustered_error(math.sqrt(0.5) * (common[groups_u] + own), groups_u))
    assert np.mean(np.square(errors)) == pytest.approx(3.0 / 150, rel=0.05)


# -------------------------------------------------------------------------------- bootstrap


def test_the_interval_holds_the_true_mean_in_about_95_of_100_experiments() -> None:
    """Percentile intervals of 40 groups hold it in some 94%; ignoring the groups, it would be about 75%."""
    generator = np.random.default_rng(3)
    groups_u = np.repeat(np.arange(40), 4)
    held = ignoring = 0
    for seed in range(300):
        values_u = 1.0 + generator.normal(size=40)[groups_u] + 0.5 * generator.normal(size=160)
        interval, naive = bootstrap(values_u, groups_u, seed), bootstrap(values_u, np.arange(160), seed)
        assert interval.mean == pytest.approx(values_u.mean())
        held += interval.low <= 1.0 <= interval.high
        ignoring += naive.low <= 1.0 <= naive.high
    # The standard error of a share of 0.94 in 300 experiments is 0.014.
    assert 0.90 <= held / 300 <= 0.98
    assert ignoring / 300 < 0.85


def test_the_interval_agrees_with_the_clustered_error() -> None:
    generator = np.random.default_rng(4)
    groups_u = generator.integers(0, 200, 1000)
    values_u = 3.0 + generator.normal(size=200)[groups_u] + generator.normal(size=1000)
    interval, error = bootstrap(values_u, groups_u), clustered_error(values_u, groups_u)
    assert (interval.high - interval.low) / (2 * 1.96 * error) == pytest.approx(1.0, abs=0.08)
    assert bootstrap(values_u, groups_u) == interval
    assert bootstrap(values_u, groups_u, seed=1) != interval


def test_an_interval_of_equal_values_is_a_point() -> None:
    interval = bootstrap(np.full(12, 0.25), np.arange(12) // 3)
    assert (interval.low, interval.mean, interval.high) == (0.25, 0.25, 0.25)
