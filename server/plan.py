"""Who works in a round: the nodes' users laid end to end, and the cohort drawn from that row."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from federation.cohorts import draw_cohort
from federation.config import FederationConfig
from federation.exchange import Work
from federation.streams import Streams


@dataclass(frozen=True)
class Holding:
    """All that a server knows of a node's users: how many. order: the node's place in the row (its partition)."""

    node: int
    order: int
    users: int


@dataclass(frozen=True)
class Seat:
    """One node's part of a cohort. positions: which of its users, ascending.

    first: the first one's place in the cohort; the others follow it.
    """

    node: int
    positions: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Plan:
    """A round's work, and who is asked for it, in the order of the cohort. Places without a seat stay empty."""

    work: Work
    seats: tuple[Seat, ...]

    @property
    def users(self) -> int:
        """How many users are asked."""
        return sum(len(seat.positions) for seat in self.seats)


def plan_round(
    work: Work, holdings: Iterable[Holding], absent: Collection[int], federation: FederationConfig, streams: Streams
) -> Plan:
    """The cohort of a round: `federation.cohort` users, or all where there are fewer.

    The nodes stand in a row by their order, then their id. So nodes that hold a population cut into contiguous parts
    train the cohort of a simulation of the whole. `streams` is the run's.

    absent: nodes that are left out. In a round's first try they are drawn from like the others and their places stay
    empty: who is drawn of the others, and where in the cohort, is as if they were there. If that was not enough, they
    do not stand in the row: a later try draws its cohort from the others alone.
    """
    standing = [holding for holding in holdings if work.attempt == 1 or holding.node not in absent]
    row = sorted(standing, key=lambda holding: (holding.order, holding.node))
    starts = np.cumsum([0, *(holding.users for holding in row)])
    users = int(starts[-1])
    if not users:
        return Plan(work, ())
    fitting = federation.model_copy(update={"cohort": min(federation.cohort, users)})
    cohort = draw_cohort(range(users), fitting, streams, work.round_index)
    cuts = np.searchsorted(cohort, starts)
    seats = (
        Seat(holding.node, tuple((cohort[first:last] - start).tolist()), int(first))
        for holding, start, first, last in zip(row, starts, cuts, cuts[1:])
    )
    return Plan(work, tuple(seat for seat in seats if seat.positions and seat.node not in absent))
