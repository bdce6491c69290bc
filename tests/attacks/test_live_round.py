"""Hostile replies to a live round: it is bit for bit the round in which the node is absent, and the audit log says why.

Of every kind, from the first, a middle and the last node, in a plan where a node's users lie in two blocks and the last
user is alone in one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from federation.exchange import Answer, Contribution, Description, Measures
from federation.update import Schema, SectionSpec, UpdateBlock
from server.nodes import Parcel
from server.plan import Seat
from tests.server.admission.replies import (
    SCHEMA,
    SIZES,
    WORK,
    Office,
    bits,
    config_of,
    honest,
    honest_payload,
    office,
    once,
    parcel,
    payload_of,
    payloads_of,
    plan_of,
    reply,
    sealed,
    served,
    update_of,
)

Hostile = Callable[[Seat], Answer | str]
"""Makes a node's answer."""
Bits = tuple[list[bytes], list[bytes]]
"""Of a round's partial, and of the state that it is closed to."""

PLAN = plan_of()
SPECS = SCHEMA.sections
OPTIONS = ("limits.absurd=50", "limits.node_weight=1.5")
LAST_ROUND = replace(WORK, round_index=4, attempt=1, version="r3-fff")

# Where things are in a payload: head 7, round 4, weight 4, number of metrics 1, metrics, kinds 2, mask 2, rows.
METRICS_AT = 16
KINDS_AT = METRICS_AT + sum(1 + len(name.encode()) + 4 for name in update_of(0).metrics)
MASK_AT = KINDS_AT + 2
ROWS_AT = MASK_AT + 2


def edited(payload: bytes, at: int, new: bytes, cut: int | None = None) -> bytes:
    """A payload with bytes replaced (`cut` of them, as many as are new by default) and the checksum made to fit."""
    body = payload[:-4]
    return sealed(body[:at] + new + body[at + (len(new) if cut is None else cut) :])


def with_rows(update: UpdateBlock, change: Callable[[torch.Tensor], torch.Tensor]) -> UpdateBlock:
    """Every row changed."""
    changed = {n: replace(section, rows_ukw=change(section.rows_ukw.clone())) for n, section in update.sections.items()}
    return replace(update, sections=changed)


def with_one_number(number: float, name: str) -> Callable[[int], bytes]:
    def spoil(user: int) -> bytes:
        update = update_of(user)
        rows = update.sections[name].rows_ukw.clone()
        rows[0, 0, -1] = number
        section = replace(update.sections[name], rows_ukw=rows)
        return payload_of(replace(update, sections={**update.sections, name: section}))

    return spoil


def with_weight(weight: float) -> Callable[[int], bytes]:
    return lambda user: payload_of(replace(update_of(user), weight_u=torch.tensor([weight])))


def with_metrics(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[int], bytes]:
    def spoil(user: int) -> bytes:
        update = update_of(user)
        return payload_of(replace(update, metrics=change(dict(update.metrics))))

    return spoil


def with_schema(**changed: SectionSpec) -> Callable[[int], bytes]:
    """An update of another schema, with the digest of ours."""
    schema = Schema({name: changed.get(name.replace("/", "_"), spec) for name, spec in SPECS.items()})

    def spoil(user: int) -> bytes:
        digest = payload_of(update_of(user))[3:7]
        return edited(payload_of(update_of(user, schema=schema), schema), 3, digest)

    return spoil


def honest_schema(schema: Schema) -> Callable[[int], bytes]:
    """An update of another schema, which says so."""
    return lambda user: payload_of(update_of(user, schema=schema), schema)


def more_units(user: int) -> bytes:
    """All units of a module: the digest is the same, since `max_rows` is no layout."""
    wider = Schema({name: replace(spec, max_rows=spec.rows) for name, spec in SPECS.items()})
    update = update_of(user, schema=wider)
    sections = {n: replace(s, valid_uk=torch.ones_like(s.valid_uk)) for n, s in update.sections.items()}
    return payload_of(replace(update, sections=sections), wider)


BAD_UPDATES: dict[str, Callable[[int], bytes]] = {
    "nothing": lambda user: b"",
    "other bytes": lambda user: b"\x80\x04\x95" + bytes(200),
    "cut short": lambda user: honest_payload(user)[:-9],
    "cut short with a checksum that fits": lambda user: sealed(honest_payload(user)[:-9]),
    "a bit flipped": lambda user: (
        honest_payload(user)[:40] + bytes([honest_payload(user)[40] ^ 4]) + honest_payload(user)[41:]
    ),
    "trailing bytes": lambda user: sealed(honest_payload(user)[:-4] + b"\0\0"),
    "personal values": lambda user: edited(honest_payload(user), 0, b"fp"),
    "another version of the codec": lambda user: edited(honest_payload(user), 2, b"\2"),
    "another pool's version": lambda user: payload_of(replace(update_of(user), pool_version="r4-abd")),
    "another round's": lambda user: payload_of(replace(update_of(user), round_index=4)),
    "an earlier update in this round's echo": lambda user: payload_of(update_of(user, LAST_ROUND)),
    "a wider row": with_schema(pool_a=replace(SPECS["pool/a"], factors={"down": 2, "up": 4})),
    "a narrower row": with_schema(pool_b=replace(SPECS["pool/b"], factors={"down": 3})),
    "more units than there are": with_schema(pool_a=replace(SPECS["pool/a"], rows=40)),
    "an unknown section": honest_schema(Schema({**SPECS, "pool/c": SPECS["pool/a"]})),
    "a missing section": honest_schema(Schema({name: SPECS[name] for name in ("pool/a", "gate")})),
    "a unit outside the pool": lambda user: edited(
        honest_payload(user), MASK_AT + 1, bytes([honest_payload(user)[MASK_AT + 1] | 0x80])
    ),
    "a unit's row sent twice": lambda user: edited(
        honest_payload(user), ROWS_AT, honest_payload(user)[ROWS_AT:][:20] * 2, cut=20
    ),
    "more units than the budget": more_units,
    "rows of another type": lambda user: edited(honest_payload(user), KINDS_AT, b"\1"),
    "rows of an unknown type": lambda user: edited(honest_payload(user), KINDS_AT, b"\x09"),
    "no metrics": with_metrics(lambda metrics: {}),
    "a metric too many": with_metrics(lambda metrics: {**metrics, "zeal": torch.ones(1)}),
    "a metric of another name": with_metrics(lambda m: {f"{name}s": value for name, value in m.items()}),
    "metrics not of text": lambda user: edited(honest_payload(user), METRICS_AT + 1, b"\xff"),
}
REFUSED_UPDATES: dict[str, Callable[[int], bytes]] = {
    "NaN in a module": with_one_number(math.nan, "pool/b"),
    "Inf in a module": with_one_number(math.inf, "pool/a"),
    "-Inf in the gate": with_one_number(-math.inf, "gate"),
    "an absurd norm": lambda user: payload_of(with_rows(update_of(user), lambda rows: rows.fill_(1e4))),
    "a norm beyond float32": lambda user: payload_of(with_rows(update_of(user), lambda rows: rows.fill_(3e38))),
    "a negative weight": with_weight(-1.0),
    "a weight that is NaN": with_weight(math.nan),
    "a weight that is Inf": with_weight(math.inf),
    "a metric that is NaN": with_metrics(lambda metrics: {name: value * math.nan for name, value in metrics.items()}),
}


def of_all(bad: Callable[[int], bytes]) -> Callable[[Seat], Contribution]:
    """A reply in which each user's update is bad."""
    return lambda seat: reply([bad(seat.first + n) for n in range(len(seat.positions))])


def whole(seat: Seat) -> Contribution:
    return reply(payloads_of(seat))


def echoing(**changed: object) -> Callable[[Seat], Contribution]:
    return lambda seat: replace(whole(seat), work=replace(WORK, **changed))  # type: ignore[arg-type]


def reframed(change: Callable[[bytes], bytes]) -> Callable[[Seat], Contribution]:
    return lambda seat: replace(whole(seat), payload=change(whole(seat).payload))


BAD_REPLIES: dict[str, tuple[Hostile, str]] = {
    "text": (lambda seat: "an answer is one of contribution, ...", "no contribution"),
    "sums of an evaluation": (lambda seat: Measures(WORK, {}, 3, {"loss": 0.0}), "no contribution"),
    "a description": (lambda seat: Description({"train": 3}), "no contribution"),
    "nothing": (reframed(lambda payload: b""), "malformed frames"),
    "a reply cut short": (reframed(lambda payload: payload[:-1]), "malformed frames"),
    "a byte too many": (reframed(lambda payload: payload + b"\0"), "malformed frames"),
    "lengths that lie": (reframed(lambda payload: b"\xff" * len(payload)), "malformed frames"),
    "a user too many": (lambda seat: reply([*payloads_of(seat), honest_payload(0)]), "malformed frames"),
    "a user too few": (lambda seat: reply(payloads_of(seat)[1:]), "malformed frames"),
    "an oversized update": (of_all(lambda user: sealed(honest_payload(user) + bytes(1_100))), "malformed frames"),
    "an oversized reply": (reframed(lambda payload: payload + bytes(11_000)), "oversized reply"),
    "a replay of the last round": (lambda seat: reply(payloads_of(seat, LAST_ROUND), LAST_ROUND), "stale"),
    "of the attempt before": (echoing(attempt=1), "stale"),
    "of a round to come": (echoing(round_index=6), "foreign work"),
    "of another version": (echoing(version="r4-abd"), "foreign work"),
    "of another federation": (echoing(federation="quilts"), "foreign work"),
}
ATTACKS = {
    **{f"update: {name}": (of_all(bad), "malformed update") for name, bad in BAD_UPDATES.items()},
    **{f"update: {name}": (of_all(bad), "no user admitted") for name, bad in REFUSED_UPDATES.items()},
    **{f"reply: {name}": attack for name, attack in BAD_REPLIES.items()},
}
PLACES = {"first": 0, "middle": 2, "last": len(SIZES) - 1}


def fresh(folder: Path) -> Office:
    return office(folder, config_of(*OPTIONS))


def result(place: Office, parcels: dict[int, list[Parcel]], seed: int = 0) -> Bits:
    """What a round comes to; the nodes answer in any order."""
    outcome = served(place.intake(PLAN), parcels, random.Random(seed))
    return bits(outcome.partial), bits(place.closed(outcome))


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Bits]:
    """The result of the round in which a node is absent, by node."""
    rounds = {}
    for seat in PLAN.seats:
        others = once({node: one for node, one in honest(PLAN).items() if node != seat.node})
        rounds[seat.node] = result(fresh(tmp_path_factory.mktemp("without")), others, seed=1)
    return rounds


@pytest.mark.parametrize("position", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize(("hostile", "reason"), ATTACKS.values(), ids=ATTACKS)
def test_a_bad_reply_changes_nothing(
    tmp_path: Path, hostile: Hostile, reason: str, position: int, without: dict[int, Bits]
) -> None:
    place, seat = fresh(tmp_path), PLAN.seats[position]
    parcels = once(honest(PLAN) | {seat.node: parcel(seat.node, hostile(seat))})
    assert result(place, parcels) == without[seat.node]
    (line,) = place.audit
    assert (line["node"], line["round"], line["reason"]) == (seat.node, WORK.round_index, reason)
    assert place.desk.quarantined(WORK.round_index + 1) == (set() if reason == "stale" else {seat.node})


@pytest.mark.parametrize("position", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("again", [1, 2])
def test_the_same_reply_again_changes_nothing(tmp_path: Path, position: int, again: int) -> None:
    place, seat = fresh(tmp_path), PLAN.seats[position]
    parcels = once(honest(PLAN))
    parcels[seat.node] *= 1 + again
    assert result(place, parcels) == result(fresh(tmp_path / "once"), once(honest(PLAN)))
    assert [(line["node"], line["event"]) for line in place.audit] == [(seat.node, "repeated")] * again
    assert (place.desk.repeats, place.desk.quarantined(6)) == (again, set())


@pytest.mark.parametrize("position", PLACES.values(), ids=PLACES)
def test_other_content_for_the_same_work_changes_nothing(tmp_path: Path, position: int) -> None:
    place, seat = fresh(tmp_path), PLAN.seats[position]
    other = reply([payload_of(update_of(50 + n)) for n in range(len(seat.positions))])
    parcels = once(honest(PLAN))
    parcels[seat.node] += [parcel(seat.node, other)]
    assert result(place, parcels) == result(fresh(tmp_path / "once"), once(honest(PLAN)))
    (line,) = place.audit
    assert (line["node"], line["event"], line["reason"]) == (seat.node, "quarantined", "other content")


def test_a_reply_that_was_applied_is_not_applied_in_the_next_round(tmp_path: Path) -> None:
    place, seat = fresh(tmp_path), PLAN.seats[0]
    served(place.intake(PLAN), once(honest(PLAN)))
    place.desk.apply()
    following = plan_of(work=replace(WORK, round_index=6, attempt=1, version="r5-aaa"))
    parcels = honest(following)
    absent = {node: one for node, one in parcels.items() if node != seat.node}
    again = served(place.intake(following), once(parcels | {seat.node: honest(PLAN)[seat.node]}))
    assert bits(again.partial) == bits(served(fresh(tmp_path / "without").intake(following), once(absent)).partial)
    assert [(line["node"], line["event"]) for line in place.audit] == [(seat.node, "repeated")]


@pytest.mark.parametrize(
    "bad", [*BAD_UPDATES.values(), *REFUSED_UPDATES.values()], ids=[*BAD_UPDATES, *REFUSED_UPDATES]
)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_one_bad_update_leaves_the_other_users_of_its_node_in(
    tmp_path: Path, bad: Callable[[int], bytes], position: int
) -> None:
    """Without a cap on the node's weight, which counts what the bad user claims too."""
    seat = PLAN.seats[2]
    one_bad, one_cut = payloads_of(seat), payloads_of(seat)
    one_bad[position], one_cut[position] = bad(seat.first + position), b"cut"
    rounds = []
    for name, payloads in (("bad", one_bad), ("cut", one_cut)):
        place = office(tmp_path / name, config_of("limits.absurd=50"))
        outcome = served(place.intake(PLAN), once(honest(PLAN) | {seat.node: parcel(seat.node, reply(payloads))}))
        assert outcome.admitted == sum(SIZES) - 1
        rounds.append((bits(outcome.partial), bits(place.closed(outcome))))
    assert rounds[0] == rounds[1]


def test_many_hostile_nodes_leave_the_round_of_the_others(tmp_path: Path) -> None:
    chosen: Sequence[Hostile] = [hostile for hostile, _ in ATTACKS.values()]
    plan = plan_of([1 + number % 3 for number in range(2 * len(chosen))])
    parcels = honest(plan)
    bad = {seat.node: parcel(seat.node, hostile(seat)) for seat, hostile in zip(plan.seats[::2], chosen, strict=True)}
    place, other = fresh(tmp_path), fresh(tmp_path / "without")
    attacked = served(place.intake(plan), once(parcels | bad), random.Random(2))
    alone = served(other.intake(plan), once({node: one for node, one in parcels.items() if node not in bad}))
    assert bits(attacked.partial) == bits(alone.partial)
    assert attacked.metric_sums == alone.metric_sums
    assert sorted(line["node"] for line in place.audit) == sorted(bad)


@pytest.mark.parametrize("seed", range(60))
def test_random_damage_to_an_honest_reply_never_raises(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    seat = PLAN.seats[2]
    payloads = payloads_of(seat)
    which = draw.randrange(3)
    body = bytearray(payloads[which][:-4])
    for _ in range(draw.randint(1, 4)):
        body[draw.randrange(len(body))] = draw.randrange(256)
    payloads[which] = sealed(bytes(body))
    place = fresh(tmp_path)
    outcome = served(place.intake(PLAN), once(honest(PLAN) | {seat.node: parcel(seat.node, reply(payloads))}))
    assert outcome.admitted >= sum(SIZES) - 1
    assert all(tensor.isfinite().all() for tensor in (outcome.partial.rows | outcome.partial.weights).values())


def test_the_table_is_of_attacks(tmp_path: Path) -> None:
    """Each is a change to a reply that is admitted as it is."""
    assert len(ATTACKS) >= 20
    place = fresh(tmp_path)
    assert served(place.intake(PLAN), once(honest(PLAN))).rejected == {}
    assert place.audit == []
    for hostile, _ in ATTACKS.values():
        assert all(hostile(seat) != whole(seat) for seat in PLAN.seats)
