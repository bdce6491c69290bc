"""Cohorts: of different users, drawn fairly or dealt out completely, known from the seed and the round alone."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from federation.cohorts import draw_cohort, rounds_per_epoch
from federation.config import FederationConfig
from federation.errors import ConfigError, PopulationError
from federation.permutation import permuted
from federation.settings import parse
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


# -------------------------------------------------------------------------------- users who join


def cohort_of(users: range | UserIds, round_index: int, seed: int = 0, **federation: object) -> UserIds:
    return draw_cohort(users, FederationConfig.model_validate(federation), Streams(seed), round_index)


def test_a_round_draws_from_those_who_have_joined_by_then_and_from_all_of_them() -> None:
    """Of 200 users 50 are there at first, and 150 join in the 30 rounds after the first one: 5 a round."""
    settings = {"cohort": 20, "rounds": 31, "present": 0.25}
    ids = np.arange(200)[::-1] * 3 + 7  # they join in the order of the list, not of their ids
    for round_index in (1, 2, 3, 16, 30, 31):
        there = 50 + 5 * (round_index - 1)
        drawn_ids = [cohort_of(ids, round_index, seed, **settings) for seed in range(120)]
        assert set(np.concatenate(drawn_ids).tolist()) == set(ids[:there].tolist())
        positions = [cohort_of(range(200), round_index, seed, **settings) for seed in range(120)]
        assert set(np.concatenate(positions).tolist()) == set(range(there))
        assert all(len(set(cohort.tolist())) == 20 for cohort in positions)


def test_those_who_have_joined_are_drawn_equally_often() -> None:
    settings = {"cohort": 5, "rounds": 3, "present": 0.1}
    for round_index, there in ((1, 10), (2, 55), (3, 100)):
        draws = [cohort_of(range(100), round_index, seed, **settings) for seed in range(2000)]
        counts = np.bincount(np.concatenate(draws), minlength=100)
        share = 5 / there
        deviation = math.sqrt(2000 * share * (1 - share))
        assert np.abs(counts[:there] - 2000 * share).max() < 4.5 * deviation
        assert counts[there:].sum() == 0


@pytest.mark.parametrize("present", [1e-9, 0.1, 0.3, 1 / 3, 0.7, 0.999])
@pytest.mark.parametrize("users", [12, 97, 10**6, 10**15])
def test_nobody_leaves_and_all_are_there_in_the_last_round(present: float, users: int) -> None:
    federation = FederationConfig(cohort=12, rounds=140, present=present)
    joined = [federation.joined(users, round_index) for round_index in range(1, 141)]
    assert joined == sorted(joined)
    assert joined[0] == 12 or abs(joined[0] - present * users) < 1
    assert joined[-1] == users


@pytest.mark.parametrize("rounds", [0, 1, 40])
def test_where_everyone_is_there_cohorts_are_what_they_were(rounds: int) -> None:
    """With a fixed set of users the cohort is a permutation's first places, whatever the round."""
    ids = np.arange(500) * 7
    for round_index in (1, 17, 40):
        order = permuted(np.arange(30), 500, Streams(4).at("round", round_index, "cohort"))
        for settings in ({}, {"present": 1.0}):
            cohort = cohort_of(ids, round_index, 4, cohort=30, rounds=rounds, **settings)
            assert cohort.tolist() == np.sort(ids[order]).tolist()


def test_users_cannot_join_epochs() -> None:
    with pytest.raises(ConfigError, match=r"an epoch deals out everyone, .*set sampling = 'uniform', or present = 1"):
        parse(FederationConfig, {"sampling": "epochs", "present": 0.5})
    assert parse(FederationConfig, {"sampling": "epochs", "present": 1}).present == 1
