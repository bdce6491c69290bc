"""A round's intake against a loop over blocks of updates that never travelled; who is left out; what is held."""

from __future__ import annotations

import math
import random
import tracemalloc
import weakref
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch

from federation.exchange import Measures
from federation.update import Schema, Section, SectionSpec, UpdateBlock
from server.admission.intake import Outcome
from server.admission.lifting import InProcessLifter, Lifted
from server.nodes import Parcel
from server.round import lift, rules_of
from strategies.means import MaskedMean, Sums
from strategies.protocol import State
from tests.server.admission.replies import (
    SCHEMA,
    SIZES,
    Office,
    bits,
    config_of,
    honest,
    office,
    once,
    parcel,
    payload_of,
    payloads_of,
    plan_of,
    reply,
    served,
    update_of,
)

PLAN = plan_of()
NODES = [seat.node for seat in PLAN.seats]
USERS = sum(SIZES)
NAN = torch.tensor([math.nan])


def stacked(users: Sequence[int]) -> UpdateBlock:
    """The users' updates side by side, rows ascending by id and padding last, as a block that was never encoded."""
    made = [update_of(user) for user in users]
    sections = {name: _ordered([one.sections[name] for one in made], spec) for name, spec in SCHEMA.sections.items()}
    metrics = {name: torch.cat([one.metrics[name] for one in made]) for name in made[0].metrics}
    weight_u = torch.cat([one.weight_u for one in made])
    return UpdateBlock(sections, weight_u, metrics, made[0].round_index, made[0].pool_version)


def _ordered(sections: Sequence[Section], spec: SectionSpec) -> Section:
    ids, valid = (torch.cat([getattr(one, name) for one in sections]) for name in ("ids_uk", "valid_uk"))
    order = torch.where(valid, ids, spec.rows).argsort(dim=1, stable=True)
    rows = torch.cat([one.rows_ukw for one in sections]).gather(1, order[..., None].expand(-1, -1, spec.width))
    return Section(ids.gather(1, order), valid.gather(1, order), rows)


def simulated(place: Office, missing: Collection[int] = (), size: int = 4) -> Any:
    """The round as a simulation does it: blocks of places, lifted and merged one after the other."""
    blocks = [
        [u for u in range(first, min(first + size, USERS)) if u not in missing] for first in range(0, USERS, size)
    ]
    lifted = [lift(stacked(users), place.state.strategy, place.rules)[0] for users in blocks if users]
    return reduce(place.rules.strategy.merge, lifted)


# -------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("size", [1, 4, 20])
def test_a_round_has_the_bits_of_a_simulation_with_the_same_blocks(tmp_path: Path, size: int) -> None:
    place = office(tmp_path, config_of(f"compute.block={size}"))
    outcome = served(place.intake(PLAN), once(honest(PLAN)))
    assert bits(outcome.partial) == bits(simulated(place, size=size))
    assert (outcome.admitted, outcome.rejected) == (USERS, {})
    sums = {n: math.fsum(float(update_of(u).metrics[n]) for u in range(USERS)) for n in update_of(0).metrics}
    assert outcome.metric_sums == pytest.approx(sums, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_arrival_decides_no_bit(tmp_path: Path, seed: int) -> None:
    place, parcels = office(tmp_path), once(honest(PLAN))
    shuffled = served(place.intake(PLAN), parcels, random.Random(seed))
    assert bits(shuffled.partial) == bits(simulated(place))


@pytest.mark.parametrize("absent", [[101], [103], [105], [101, 102, 103], [103, 104, 105]])
def test_whoever_is_missing_leaves_the_cut_into_blocks_as_it_is(tmp_path: Path, absent: list[int]) -> None:
    place = office(tmp_path)
    parcels = {node: one for node, one in honest(PLAN).items() if node not in absent}
    outcome = served(place.intake(PLAN), once(parcels), random.Random(0))
    places = [seat.first + n for seat in PLAN.seats if seat.node in absent for n in range(len(seat.positions))]
    assert bits(outcome.partial) == bits(simulated(place, places))
    assert (outcome.admitted, outcome.rejected) == (USERS - len(places), {"gone": len(places)})


def test_a_round_of_nobody_has_no_partial(tmp_path: Path) -> None:
    intake = office(tmp_path).intake(PLAN)
    assert intake.close() == Outcome(None, 0, {"late": USERS}, {})


def test_results_may_come_late_but_in_order(tmp_path: Path) -> None:
    class Slow(InProcessLifter):
        """Gives nothing before it must."""

        def begin(self, terms: Any) -> None:
            super().begin(terms)
            self.kept: list[Lifted] = []

        def submit(self, payloads: Sequence[bytes], scales: Sequence[float]) -> list[Lifted]:
            self.kept += super().submit(payloads, scales)
            return []

        def drain(self) -> list[Lifted]:
            return self.kept

    place = office(tmp_path)
    place.lifter = Slow()
    outcome = served(place.intake(PLAN), once(honest(PLAN) | {102: parcel(102, reply([b"no"]))}))
    assert bits(outcome.partial) == bits(simulated(place, missing=[2]))
    assert place.desk.quarantined(6) == {102}


# -------------------------------------------------------------------------------- the window


def test_a_window_of_seats_is_wanted_and_moves_on_with_the_first_open_one(tmp_path: Path) -> None:
    place, parcels = office(tmp_path), honest(PLAN)
    intake = place.intake(PLAN)
    assert intake.wanted == (101, 102, 103)
    intake.take(parcels[102])
    assert intake.wanted == (101, 103)
    intake.take(parcels[103])
    assert intake.wanted == (101,)
    intake.take(parcels[101])
    assert intake.wanted == (104, 105)
    intake.skip(104, "gone")
    intake.take(parcels[105])
    assert intake.wanted == ()
    assert bits(intake.close().partial) == bits(simulated(place, missing=[6, 7]))


def test_a_refused_reply_settles_its_seat(tmp_path: Path) -> None:
    place, parcels = office(tmp_path), honest(PLAN)
    intake = place.intake(PLAN)
    intake.take(parcel(101, "text"))
    intake.take(parcel(102, Measures(PLAN.work, {}, 1, {"loss": 0.5})))
    assert intake.wanted == (103, 104, 105)
    intake.take(parcels[101])
    for node in (103, 104, 105):
        intake.take(parcels[node])
    outcome = intake.close()
    assert outcome.rejected == {"no contribution": 3}
    assert bits(outcome.partial) == bits(simulated(place, missing=[0, 1, 2]))


def test_a_reply_after_its_seat_was_given_up_changes_nothing(tmp_path: Path) -> None:
    place, parcels = office(tmp_path), honest(PLAN)
    intake = place.intake(PLAN)
    intake.skip(101, "late")
    intake.take(parcels[101])
    intake.take(Parcel("t", 999, parcels[102].answer))
    outcome = served(intake, once(parcels))
    assert bits(outcome.partial) == bits(simulated(place, missing=[0, 1]))
    assert outcome.rejected == {"late": 2}
    assert [(line["node"], line["event"], line["reason"]) for line in place.audit] == [
        (101, "refused", "late"),
        (999, "refused", "late"),
    ]


# -------------------------------------------------------------------------------- bad users of a node


def spoiled(user: int) -> bytes:
    """An update whose weight is not finite."""
    return payload_of(replace(update_of(user), weight_u=NAN))


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize(("bad", "reason"), [(b"no", "a payload of less than"), (spoiled(4), "the weight must be")])
def test_one_bad_user_leaves_its_neighbours_in(tmp_path: Path, position: int, bad: bytes, reason: str) -> None:
    place, payloads = office(tmp_path), payloads_of(PLAN.seats[2])
    payloads[position] = bad
    outcome = served(place.intake(PLAN), once(honest(PLAN) | {103: parcel(103, reply(payloads))}))
    assert bits(outcome.partial) == bits(simulated(place, missing=[3 + position]))
    ((said, count),) = outcome.rejected.items()
    assert said.startswith(reason)
    assert (count, outcome.admitted) == (1, USERS - 1)
    assert place.desk.quarantined(6) == ({103} if bad == b"no" else set())


@pytest.mark.parametrize("node", [101, 103, 105])
def test_a_node_without_an_admitted_user_is_left_out(tmp_path: Path, node: int) -> None:
    place, seat = office(tmp_path), PLAN.seats[node - 101]
    bad = reply([spoiled(seat.first + n) for n in range(len(seat.positions))])
    outcome = served(place.intake(PLAN), once(honest(PLAN) | {node: parcel(node, bad)}))
    assert sum(outcome.rejected.values()) == len(seat.positions)
    assert [(line["node"], line["event"], line["reason"]) for line in place.audit] == [
        (node, "quarantined", "no user admitted")
    ]


def test_a_node_is_judged_once_though_its_users_lie_in_several_blocks(tmp_path: Path) -> None:
    place, seat = office(tmp_path), PLAN.seats[2]
    assert seat.first // 4 < (seat.first + 2) // 4
    served(place.intake(PLAN), once(honest(PLAN) | {103: parcel(103, reply([b"no", b"", b"nor this"]))}))
    assert [(line["node"], line["reason"]) for line in place.audit] == [(103, "malformed update")]


def test_weights_of_a_node_are_capped_together(tmp_path: Path) -> None:
    place = office(tmp_path, config_of("limits.node_weight=1.2"))
    outcome = served(place.intake(PLAN), once(honest(PLAN)))
    wanted = 0.0
    for seat in PLAN.seats:
        of_users = [min(1.0, float(update_of(seat.first + n).weight_u)) for n in range(len(seat.positions))]
        wanted += min(1.2, sum(of_users))
    assert outcome.partial is not None
    assert float(outcome.partial.weight) == pytest.approx(wanted, rel=1e-6)
    assert wanted < sum(min(1.0, float(update_of(user).weight_u)) for user in range(USERS)) - 0.1


# -------------------------------------------------------------------------------- what is held

WIDE = Schema({"pool/a": SectionSpec(rows=4, factors={"down": 8_000, "up": 8_000}, max_rows=2)})
WIDE_CONFIG = config_of("deployment.max_update_mib=1", "deployment.max_reply_mib=4")
PAYLOAD_BYTES = 16_000 * 4  # at least: a row or two


class Watched(MaskedMean):
    """Remembers its partials, without keeping them alive."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "made", [])

    def lift(self, block: UpdateBlock, state: State) -> Sums:
        return self._seen(super().lift(block, state))

    def merge(self, a: Sums, b: Sums) -> Sums:
        return self._seen(super().merge(a, b))

    def _seen(self, partial: Sums) -> Sums:
        self.made.append(weakref.ref(partial))
        return partial

    @property
    def alive(self) -> int:
        return sum(seen() is not None for seen in self.made)


def held(replies: int, folder: Path) -> tuple[int, int]:
    """The most bytes of Python objects, and the most partials between replies, that a round of so many has alive.

    Each reply is made when it is asked for. The first in the window always comes last, so the window is always full.
    """
    payload, strategy, partials = payload_of(update_of(0, schema=WIDE), WIDE), Watched(), 0
    rules = replace(rules_of(WIDE_CONFIG, WIDE), strategy=strategy)
    intake = office(folder, WIDE_CONFIG, rules).intake(plan_of([1] * replies))
    tracemalloc.start()
    while wanted := intake.wanted:
        intake.take(parcel(wanted[-1], reply([payload])))
        partials = max(partials, strategy.alive)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert intake.close().admitted == replies
    assert len(strategy.made) >= replies // 4
    return peak_bytes, partials


def test_memory_does_not_grow_with_the_number_of_replies(tmp_path: Path) -> None:
    few, many = held(20, tmp_path / "few"), held(200, tmp_path / "many")
    assert few[0] > 7 * PAYLOAD_BYTES  # a window of three and a block of four
    assert many[0] - few[0] < 180 * 1_000  # of each reply a digest is kept
    assert few[1] == many[1] == 1
