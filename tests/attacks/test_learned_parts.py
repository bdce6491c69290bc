"""Hostile updates of what is learned besides the pool: the round is, bit for bit, the one in which nobody sent them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from federation.codec import RowFormat, encode
from federation.config import RunConfig
from federation.learner import RATES_OF_UNITS, SHARED_RATES, START_SECTION
from federation.state import metric_names
from federation.update import Schema, SectionSpec, UpdateBlock
from server.admission.audit import AuditLog
from server.admission.desk import Desk
from server.admission.intake import Outcome
from server.admission.lifting import InProcessLifter
from server.nodes import Parcel
from server.plan import Seat
from server.round import begin, rules_of
from tests.server.admission.replies import (
    FORMATS,
    SCHEMA,
    SIZES,
    WORK,
    Office,
    bits,
    config_of,
    once,
    parcel,
    plan_of,
    reply,
    sealed,
    served,
    update_of,
)

LEARNED = {
    RATES_OF_UNITS: SectionSpec(rows=10, factors={"rates": 3}, max_rows=6),
    SHARED_RATES: SectionSpec(rows=1, factors={"rates": 4}, max_rows=1),
    START_SECTION: SectionSpec(rows=1, factors={"weights": 9}, max_rows=1),
}
OURS = Schema({**SCHEMA.sections, **LEARNED})
PLAN = plan_of()


def meta_config(*overrides: str) -> RunConfig:
    return config_of("meta={signal='fomaml', rule={name='rates'}, start={name='universal'}}", *overrides)


def learned_update(user: int, schema: Schema = OURS) -> UpdateBlock:
    """What one user sends, with the metrics of its signal."""
    update, names = update_of(user, schema=schema), metric_names(meta_config(), WORK.round_index)
    return replace(update, metrics={name: torch.tensor([float(user + at)]) for at, name in enumerate(sorted(names))})


def written(update: UpdateBlock, schema: Schema = OURS) -> bytes:
    return encode(update, 0, schema, {**FORMATS, **dict.fromkeys(("rates", "start"), RowFormat("fp32"))})


def honest_payload(user: int) -> bytes:
    return written(learned_update(user))


def with_rows(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[int], bytes]:
    def spoil(user: int) -> bytes:
        update = learned_update(user)
        section = replace(update.sections[name], rows_ukw=change(update.sections[name].rows_ukw.clone()))
        return written(replace(update, sections={**update.sections, name: section}))

    return spoil


def with_entry(name: str, number: float) -> Callable[[int], bytes]:
    def spoil(rows_ukw: Tensor) -> Tensor:
        rows_ukw[0, 0, -1] = number
        return rows_ukw

    return with_rows(name, spoil)


def of_schema(schema: Schema) -> Callable[[int], bytes]:
    """An update of another schema, which says so."""
    return lambda user: written(learned_update(user, schema), schema)


def under_our_name(schema: Schema) -> Callable[[int], bytes]:
    """An update of another schema, with the digest of ours."""
    digest = honest_payload(0)[3:7]

    def spoil(user: int) -> bytes:
        body = of_schema(schema)(user)[:-4]
        return sealed(body[:3] + digest + body[7:])

    return spoil


def without(*names: str) -> Schema:
    return Schema({name: spec for name, spec in OURS.sections.items() if name not in names})


def changed(name: str, **fields: object) -> Schema:
    return Schema({**OURS.sections, name: replace(OURS.sections[name], **fields)})  # type: ignore[arg-type]


def all_units(user: int) -> bytes:
    """The digest is the same, since `max_rows` is no layout."""
    wide = changed(RATES_OF_UNITS, max_rows=10)
    update = learned_update(user, wide)
    sections = {n: replace(s, valid_uk=torch.ones_like(s.valid_uk)) for n, s in update.sections.items()}
    return written(replace(update, sections=sections), wide)


def outside_the_pool(user: int) -> bytes:
    """The bit of a row behind the last one: the mask of 23 rows has 24 bits."""
    update = learned_update(user)
    rows = sum(4 * int(section.valid_uk.sum()) * section.rows_ukw.shape[2] for section in update.sections.values())
    body = bytearray(written(update)[:-4])
    body[-rows - 1] |= 0x80
    return sealed(bytes(body))


def of_another_signal(user: int) -> bytes:
    """Without a query loss, as of the signal `delta`."""
    update = learned_update(user)
    return written(replace(update, metrics={n: v for n, v in update.metrics.items() if n != "query_loss"}))


def query_loss_of_nan(user: int) -> bytes:
    update = learned_update(user)
    return written(replace(update, metrics={**update.metrics, "query_loss": torch.tensor([math.nan])}))


Bad = tuple[Callable[[int], bytes], str]
"""An update, and how the reason begins for which it is refused."""

ELSEWHERE = "an update for another pool version or schema"
MALFORMED: dict[str, Bad] = {
    "no rule": (of_schema(without(RATES_OF_UNITS, SHARED_RATES)), ELSEWHERE),
    "no rule, under our name": (under_our_name(without(RATES_OF_UNITS, SHARED_RATES)), ""),
    "no start": (of_schema(without(START_SECTION)), ELSEWHERE),
    "no start, under our name": (under_our_name(without(START_SECTION)), ""),
    "a task that learns nothing": (of_schema(SCHEMA), ELSEWHERE),
    "a rule of more steps": (under_our_name(changed(SHARED_RATES, factors={"rates": 5})), "an end that is not that"),
    "a smaller start": (under_our_name(changed(START_SECTION, factors={"weights": 8})), "an end that is not that"),
    "rates of more units than masks have": (all_units, "section 'rates/units': more than 6 rows"),
    "a row that there is not": (outside_the_pool, "padding bits that are set"),
    "another signal's metrics": (of_another_signal, "other metrics than ['active_share', 'gate_entropy', 'query_loss'"),
}
REFUSED: dict[str, Bad] = {
    "NaN in the start": (with_entry(START_SECTION, math.nan), "section 'start': a number that is not finite"),
    "Inf in a unit's rates": (with_entry(RATES_OF_UNITS, math.inf), "section 'rates/units': a number that is not f"),
    "-Inf in the shared rates": (with_entry(SHARED_RATES, -math.inf), "section 'rates/shared': a number that is not"),
    "absurd rates": (with_rows(SHARED_RATES, lambda r: r.fill_(1e5)), "prefix 'rates': a norm above 1000 times the"),
    "an absurd start": (with_rows(START_SECTION, lambda r: r.fill_(3e38)), "prefix 'start': a norm above 1000 times"),
    "a query loss of NaN": (query_loss_of_nan, "metric 'query_loss' must be finite"),
}
BAD = {**MALFORMED, **REFUSED}


def office(folder: Path) -> Office:
    config = meta_config("limits.rates_norm=2.0", "limits.start_norm=2.0")
    rules, path = rules_of(config, OURS), folder / "audit.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    values = {name: torch.randn(s.rows, s.width, generator=generator) for name, s in OURS.sections.items()}
    return Office(config, rules, begin(rules, values), Desk(config, AuditLog(path)), path, InProcessLifter())


def payloads_of(seat: Seat) -> list[bytes]:
    return [honest_payload(seat.first + n) for n in range(len(seat.positions))]


def honest() -> dict[int, Parcel]:
    return {seat.node: parcel(seat.node, reply(payloads_of(seat))) for seat in PLAN.seats}


def result(place: Office, parcels: dict[int, Parcel]) -> tuple[Outcome, Sequence[bytes]]:
    outcome = served(place.intake(PLAN), once(parcels))
    return outcome, bits(place.closed(outcome))


def test_an_honest_round_moves_all_that_is_learned(tmp_path: Path) -> None:
    place = office(tmp_path)
    outcome, _ = result(place, honest())
    assert (outcome.admitted, outcome.rejected, place.audit) == (sum(SIZES), {}, [])
    assert {"query_loss", "withheld"} < outcome.metric_sums.keys()
    after = place.closed(outcome).values
    assert not [name for name in OURS.sections if torch.equal(after[name], place.state.values[name])]


@pytest.mark.parametrize(("bad", "words"), BAD.values(), ids=BAD)
def test_a_bad_update_is_counted_and_leaves_the_other_users_of_its_node_in(
    tmp_path: Path, bad: Callable[[int], bytes], words: str
) -> None:
    seat = PLAN.seats[2]
    spoilt, cut = payloads_of(seat), payloads_of(seat)
    assert bad(seat.first + 1) != spoilt[1]
    spoilt[1], cut[1] = bad(seat.first + 1), b"cut"
    outcome, state = result(office(tmp_path / "bad"), honest() | {seat.node: parcel(seat.node, reply(spoilt))})
    _, expected = result(office(tmp_path / "cut"), honest() | {seat.node: parcel(seat.node, reply(cut))})
    assert state == expected
    assert outcome.admitted == sum(SIZES) - 1
    ((reason, count),) = outcome.rejected.items()
    assert count == 1
    assert reason.startswith(words), reason


@pytest.mark.parametrize("bad", BAD)
def test_a_node_that_sends_nothing_else_is_left_out(tmp_path: Path, bad: str) -> None:
    place, seat = office(tmp_path / "bad"), PLAN.seats[2]
    sent = parcel(seat.node, reply([BAD[bad][0](seat.first + n) for n in range(len(seat.positions))]))
    _, state = result(place, honest() | {seat.node: sent})
    others = {node: one for node, one in honest().items() if node != seat.node}
    assert state == result(office(tmp_path / "without"), others)[1]
    (line,) = place.audit
    expected = "malformed update" if bad in MALFORMED else "no user admitted"
    assert (line["node"], line["event"], line["reason"]) == (seat.node, "quarantined", expected)
    assert place.desk.quarantined(WORK.round_index + 1) == {seat.node}
