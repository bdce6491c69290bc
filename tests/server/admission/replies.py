"""Replies of synthetic users, whose number is their place in the cohort, and rounds made of such replies."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from federation.codec import RowFormat, encode
from federation.config import RunConfig, load_config
from federation.exchange import Contribution, Work
from federation.frames import join
from federation.state import metric_names
from federation.update import Schema, Section, SectionSpec, UpdateBlock
from server.admission.audit import AuditLog
from server.admission.desk import Desk
from server.admission.intake import Intake, Outcome
from server.admission.lifting import InProcessLifter, Lifter
from server.nodes import Parcel
from server.plan import Plan, Seat
from server.round import Rules, ServerState, begin, close, rules_of

SCHEMA = Schema(
    {
        "pool/a": SectionSpec(rows=6, factors={"down": 2, "up": 3}, max_rows=3),
        "pool/b": SectionSpec(rows=4, factors={"down": 3, "up": 1}, max_rows=3),
        "gate": SectionSpec(rows=1, factors={"phi": 7}, max_rows=1),
    }
)
FORMATS = {"pool": RowFormat("fp32"), "gate": RowFormat("fp32")}
WORK = Work("quilt", 5, 2, "r4-abc")
SIZES = (2, 1, 3, 2, 1)
"""Users of the nodes of a plan: with blocks of 4, one node's users lie in two, and the last user is alone in one."""


def config_of(*overrides: str) -> RunConfig:
    small = ("compute.block=4", "deployment.replies=3", "limits.pool_norm=3.0", "limits.gate_norm=1.5")
    sizes = ("deployment.max_update_mib=0.001", "deployment.max_reply_mib=0.01", "deployment.quarantine_rounds=6")
    return load_config(overrides=["gate.warmup=0", "gate.every=1", *small, *sizes, *overrides])


def plan_of(sizes: Sequence[int] = SIZES, work: Work = WORK) -> Plan:
    """Seats of nodes 101, 102, ... with so many users each."""
    firsts = [sum(sizes[:number]) for number in range(len(sizes))]
    seats = [Seat(101 + n, tuple(range(3, 3 + size)), firsts[n]) for n, size in enumerate(sizes)]
    return Plan(work, tuple(seats))


def update_of(user: int, work: Work = WORK, schema: Schema = SCHEMA) -> UpdateBlock:
    """What one user sends (U = 1): one row of each section at least, in no order."""
    generator = torch.Generator().manual_seed(1000 * work.round_index + user)
    sections = {}
    for name, spec in schema.sections.items():
        ids = torch.randperm(spec.rows, generator=generator)[: spec.max_rows][None].int()
        valid = torch.rand(ids.shape, generator=generator) < 0.7
        valid[:, 0] = True
        sections[name] = Section(ids, valid, torch.randn(*ids.shape, spec.width, generator=generator))
    names = metric_names(config_of(), work.round_index)
    metrics = {name: torch.randn(1, generator=generator) for name in names}
    weight = torch.rand(1, generator=generator) + 0.5
    return UpdateBlock(sections, weight, metrics, work.round_index, work.version)


def payload_of(update: UpdateBlock, schema: Schema = SCHEMA) -> bytes:
    return encode(update, 0, schema, FORMATS)


def sealed(body: bytes) -> bytes:
    """A payload with the checksum that fits its body."""
    return body + struct.pack("<I", zlib.crc32(body))


@cache
def honest_payload(user: int, work: Work = WORK) -> bytes:
    return payload_of(update_of(user, work))


def payloads_of(seat: Seat, work: Work = WORK) -> list[bytes]:
    return [honest_payload(seat.first + n, work) for n in range(len(seat.positions))]


def reply(payloads: Sequence[bytes], work: Work = WORK) -> Contribution:
    return Contribution(work, {"train": 9}, join(payloads))


def parcel(node: int, answer: Any) -> Parcel:
    size_bytes = len(answer.payload) if isinstance(answer, Contribution) else 0
    return Parcel(f"ticket-{node}", node, answer, size_bytes)


def honest(plan: Plan) -> dict[int, Parcel]:
    """The parcel of every node."""
    return {seat.node: parcel(seat.node, reply(payloads_of(seat, plan.work), plan.work)) for seat in plan.seats}


@dataclass
class Office:
    """A server's parts that a round needs, with a desk of its own."""

    config: RunConfig
    rules: Rules
    state: ServerState
    desk: Desk
    audit_path: Path
    lifter: Lifter

    def intake(self, plan: Plan) -> Intake:
        return Intake(plan, self.rules, self.state.strategy, self.lifter, self.desk, self.config)

    def closed(self, outcome: Outcome) -> ServerState:
        return close(self.state, outcome.partial, self.rules)

    @property
    def audit(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.audit_path.read_text().splitlines()]


def office(folder: Path, config: RunConfig | None = None, rules: Rules | None = None) -> Office:
    config = config or config_of()
    rules = rules or rules_of(config, SCHEMA)
    generator = torch.Generator().manual_seed(1)
    values = {name: torch.randn(s.rows, s.width, generator=generator) for name, s in SCHEMA.sections.items()}
    path = folder / "audit.jsonl"
    return Office(config, rules, begin(rules, values), Desk(config, AuditLog(path)), path, InProcessLifter())


def served(intake: Intake, parcels: Mapping[int, Sequence[Parcel]], order: random.Random | None = None) -> Outcome:
    """A whole round: the nodes in the window answer in order, or in any; those without parcels are skipped."""
    while wanted := intake.wanted:
        node = order.choice(wanted) if order else wanted[0]
        for one in parcels.get(node, ()):
            intake.take(one)
        intake.skip(node, "gone")
    return intake.close()


def once(parcels: Mapping[int, Parcel]) -> dict[int, list[Parcel]]:
    return {node: [one] for node, one in parcels.items()}


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of nested plain data."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for name in sorted(value):
            yield from tensors_in(value[name])
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name))


def bits(value: Any) -> list[bytes]:
    """Every bit of the tensors in nested plain data: unlike equality, it tells -0.0 from 0.0."""
    return [tensor.numpy().tobytes() for tensor in tensors_in(value)]
