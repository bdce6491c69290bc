"""Nodes' parts of a cohort against the cohort of the whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.cohorts import draw_cohort
from federation.config import FederationConfig
from federation.exchange import Work
from federation.streams import Streams
from server.plan import Holding, Plan, plan_round

STREAMS = Streams(11)


def work(round_index: int) -> Work:
    return Work("quilt", round_index, 1, "r0-abc")


def holdings(*users: int) -> list[Holding]:
    """Nodes whose ids run against their order."""
    return [Holding(900 - place, place, count) for place, count in enumerate(users)]


def whole_ids(plan: Plan, users: list[int]) -> list[int]:
    """Who is asked, as positions in the row of all users."""
    starts = {900 - place: sum(users[:place]) for place in range(len(users))}
    return [starts[seat.node] + position for seat in plan.seats for position in seat.positions]


@pytest.mark.parametrize("sampling", ["uniform", "epochs"])
@given(
    users=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any),
    cohort=st.integers(1, 40),
    round_index=st.integers(1, 9),
)
def test_the_seats_are_the_cohort_of_the_population_that_the_nodes_make_up(
    sampling: str, users: list[int], cohort: int, round_index: int
) -> None:
    federation = FederationConfig(cohort=min(cohort, sum(users)), sampling=sampling)
    simulated = draw_cohort(range(sum(users)), federation, STREAMS, round_index)
    plan = plan_round(work(round_index), holdings(*users), (), federation, STREAMS)
    assert whole_ids(plan, users) == simulated.tolist()
    assert plan.users == len(simulated)
    assert [seat.first + n for seat in plan.seats for n in range(len(seat.positions))] == list(range(plan.users))
    assert plan.work == work(round_index)


def test_nodes_stand_by_their_order_then_by_their_id_however_they_are_listed() -> None:
    row = [Holding(7, 2, 4), Holding(3, 1, 4), Holding(9, 1, 4)]
    federation = FederationConfig(cohort=12)
    for listed in (row, row[::-1]):
        seats = plan_round(work(1), listed, (), federation, STREAMS).seats
        assert [(seat.node, seat.first) for seat in seats] == [(3, 0), (9, 4), (7, 8)]


def test_a_cohort_larger_than_the_population_is_everyone() -> None:
    plan = plan_round(work(4), holdings(3, 2), (), FederationConfig(cohort=32), STREAMS)
    assert [seat.positions for seat in plan.seats] == [(0, 1, 2), (0, 1)]


@pytest.mark.parametrize("absent", [{900}, {899}, {898}, {900, 898}, {1234}])
def test_whoever_is_in_quarantine_leaves_an_empty_place(absent: set[int]) -> None:
    federation = FederationConfig(cohort=9)
    for round_index in range(1, 6):
        all_seats = plan_round(work(round_index), holdings(10, 20, 5), (), federation, STREAMS).seats
        seats = plan_round(work(round_index), holdings(10, 20, 5), absent, federation, STREAMS).seats
        assert seats == tuple(seat for seat in all_seats if seat.node not in absent)


@pytest.mark.parametrize("absent", [{900}, {899}, {898}, {900, 898}, {1234}, {900, 899, 898}])
def test_in_a_later_try_whoever_is_in_quarantine_does_not_stand_in_the_row(absent: set[int]) -> None:
    federation = FederationConfig(cohort=9)
    for round_index in range(1, 6):
        again = replace(work(round_index), attempt=2)
        others = [holding for holding in holdings(10, 20, 5) if holding.node not in absent]
        expected = plan_round(work(round_index), others, (), federation, STREAMS).seats
        assert plan_round(again, holdings(10, 20, 5), absent, federation, STREAMS) == Plan(again, expected)


def test_without_users_nobody_is_asked() -> None:
    assert plan_round(work(1), [], (), FederationConfig(), STREAMS) == Plan(work(1), ())
    assert plan_round(work(1), holdings(0, 0), (), FederationConfig(), STREAMS).users == 0


def test_large_nodes_cost_what_their_part_of_the_cohort_costs() -> None:
    """Listing this many users would not fit into memory."""
    plan = plan_round(work(1), holdings(2**40, 2**40), (), FederationConfig(cohort=50), STREAMS)
    places = np.concatenate([seat.positions for seat in plan.seats])
    assert len(places) == 50
    assert places.max() > 2**39
