"""Cohorts: of different users, drawn fairly or dealt out completely, known from the seed and the round alone."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from federation.cohorts import draw_cohort, rounds_per_epoch
from federation.config import FederationConfig
from federation.errors import PopulationError
from federation.streams import Streams, UserIds


def drawn(
    users: range | UserIds, cohort: int, sampling: str = "uniform", round_index: int = 1, seed: int = 0
) -> UserIds:
    federation = FederationConfig.model_validate({"cohort": cohort, "sampling": sampling})
    return draw_cohort(users, federation, Streams(seed), round_index)


@pytest.mark.parametrize("sampling", ["uniform", "epochs"])
def test_a_cohort_is_of_different_users_of_the_population_in_order(sampling: str) -> None:
    ids = np.array([5, 900, 7, 10**15, 3], dtype=np.int64)
    for round_index in range(1, 21):
        cohort = drawn(range(100, 140), 20, sampling, round_index)
        assert cohort.dtype == np.int64
        assert cohort.tolist() == sorted(set(cohort.tolist()))
        assert set(cohort.tolist()) <= set(range(100, 140))
        assert set(drawn(range(7, 70, 3), 5, sampling, round_index).tolist()) <= set(range(7, 70, 3))
        listed = drawn(ids, 3, sampling, round_index).tolist()
        assert listed == sorted(set(listed))
        assert set(listed) <= set(ids.tolist())
    assert drawn(ids, 5, sampling).tolist() == sorted(ids.tolist())


def test_every_user_is_drawn_equally_often() -> None:
    draws = [drawn(range(20), 5, round_index=r, seed=3) for r in range(1, 2001)]
    counts = np.bincount(np.concatenate(draws), minlength=20)
    # Each count has mean 500 and deviation sqrt(2000 * 1/4 * 3/4) = 19.4.
    assert np.abs(counts - 500).max() < 4 * 19.4
    assert len({tuple(d.tolist()) for d in draws}) > 1500
    together = np.zeros((20, 20))
    for draw in draws:
        together[np.ix_(draw, draw)] += 1
    # Each pair has mean 2000 * 5/20 * 4/19 = 105.3 and deviation sqrt(105.3 * (1 - 1/19)) = 10.
    assert np.abs(together[np.triu_indices(20, 1)] - 105.3).max() < 5 * 10


@pytest.mark.parametrize(("users", "cohort"), [(60, 12), (61, 12), (71, 12), (12, 12), (7, 1), (1, 1)])
@pytest.mark.parametrize("as_list", [False, True])
def test_in_an_epoch_everyone_takes_part_once(users: int, cohort: int, as_list: bool) -> None:
    population = np.arange(users)[::-1] * 7 if as_list else range(0, 7 * users, 7)
    rounds = rounds_per_epoch(users, cohort)
    orders = []
    for epoch in range(3):
        cohorts = [drawn(population, cohort, "epochs", epoch * rounds + turn) for turn in range(1, rounds + 1)]
        assert sorted(np.concatenate(cohorts).tolist()) == list(range(0, 7 * users, 7))
        assert [len(c) for c in cohorts[:-1]] == [cohort] * (rounds - 1)
        assert len(cohorts[-1]) == users - cohort * (rounds - 1) > 0
        orders.append(np.concatenate(cohorts).tolist())
    if rounds > 2:
        assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_run_seed_and_the_round_alone_decide() -> None:
    for sampling in ("uniform", "epochs"):
        late = drawn(range(1000), 30, sampling, 17, seed=5).tolist()
        assert drawn(range(1000), 30, sampling, 17, seed=5).tolist() == late
        assert drawn(np.arange(1000), 30, sampling, 17, seed=5).tolist() == late
        assert drawn(range(1000), 30, sampling, 17, seed=6).tolist() != late
        assert drawn(range(1000), 30, sampling, 18, seed=5).tolist() != late


@pytest.mark.parametrize("sampling", ["uniform", "epochs"])
def test_a_cohort_costs_what_it_holds_whatever_the_population(sampling: str) -> None:
    listed = np.arange(10**6)
    tracemalloc.start()
    for users in (range(10**15), listed):
        assert len(drawn(users, 500, sampling, round_index=3)) == 500
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 500 * 8 * 50


@pytest.mark.parametrize("sampling", ["uniform", "epochs"])
def test_too_few_users_are_refused_with_what_to_change(sampling: str) -> None:
    with pytest.raises(PopulationError, match=r"cohort of 30 .* the population has 29; lower federation.cohort"):
        drawn(range(29), 30, sampling)
