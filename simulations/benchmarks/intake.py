"""The server's side alone: how much memory replies take, and how many are admitted per second. Nodes are made up."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from federation import frames
from federation.codec import decode_all, encode
from federation.config import RunConfig
from federation.exchange import Contribution, Work
from federation.formats import Kind, RowFormat
from federation.update import Limits, Schema, Section, SectionSpec, UpdateBlock, admit
from server.admission.audit import AuditLog
from server.admission.desk import Desk
from server.admission.intake import Intake
from server.admission.lifting import InProcessLifter
from server.nodes import Parcel
from server.plan import Plan, Seat
from server.round import Rules
from simulations.benchmarks.aggregation import POOL
from simulations.benchmarks.clock import in_turns, one_thread
from simulations.compute.environment import WORKER_ENVIRONMENT
from simulations.compute.memory import private_memory, total
from strategies.means import MaskedMean

LIMITS = Limits({"pool": 1e6, "gate": 1e6})
REPLIES, BLOCK = 512, 32
KINDS: tuple[Kind, ...] = ("fp32", "int8")
"""The same rows: 8 units of 8 modules and a gate, 128 KiB as fp32, 39 KiB as int8."""

_MODULES, _RANK, _BUDGET, _WIDTH, _GATE = 8, 32, 8, 480, 2000
_CONFIG = RunConfig.model_validate({"gate": {"policy": "all"}, "compute": {"block": 8}})


def admission(repetitions: int) -> dict[str, tuple[float, ...]]:
    """Seconds for `REPLIES` replies by the kind of their rows, on one thread, in a process that keeps freed memory.

    For each: its digest taken, its frames split, then in blocks decoded, checked and clipped; what is left is lifting.
    """
    taken: dict[str, list[float]] = _in_a_process(f"admit_in_turns({repetitions})", WORKER_ENVIRONMENT)
    return {kind: tuple(seconds) for kind, seconds in taken.items()}


def admit_in_turns(repetitions: int) -> None:
    """Prints the seconds of each kind and repetition."""
    payloads = {kind: _update(_schema(), kind, ("support_loss",), seed=0) for kind in KINDS}
    sides = {kind: partial(_admit_all, _schema(), payloads[kind]) for kind in KINDS}
    with one_thread():
        print(json.dumps(in_turns(sides, repetitions)))


def memory(replies: int) -> float | None:
    """The most private memory, in MiB, of a process that takes in so many replies of 0.9 MB each."""
    most: float | None = _in_a_process(f"take_in({replies})", {})
    return most


def _in_a_process(call: str, environment: Mapping[str, str]) -> Any:
    """What a call of one of these functions prints."""
    code = f"from simulations.benchmarks import intake; intake.{call}"
    return json.loads(
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=True,
            timeout=600,
        ).stdout
    )


def take_in(replies: int) -> None:
    """Prints the most memory that this process holds while it takes in replies, one user each."""
    torch.set_num_threads(1)
    schema = Schema(POOL.sections(max_rows=_BUDGET))
    work = Work("benchmark", 1, 1, "r0")
    plan = Plan(work, tuple(Seat(node, (0,), node) for node in range(replies)))
    rules = Rules(schema, MaskedMean(), {}, LIMITS)
    most = 0.0
    with tempfile.TemporaryDirectory() as folder:
        desk = Desk(_CONFIG, AuditLog(Path(folder) / "audit.jsonl"))
        intake = Intake(plan, rules, rules.strategy.init(schema), InProcessLifter(), desk, _CONFIG)
        while wanted := intake.wanted:
            for node in wanted:
                payload = frames.join([_update(schema, "fp32", ("support_loss", "active_share"), seed=node)])
                intake.take(Parcel(str(node), node, Contribution(work, {}, payload), len(payload)))
                most = max(most, total(private_memory()) or 0.0)
        assert intake.close().admitted == replies
    print(json.dumps(most or None))


def _schema() -> Schema:
    row = {"down": _WIDTH // 2, "up": _WIDTH // 2}
    modules = {f"pool/{j}": SectionSpec(_RANK, row, _BUDGET) for j in range(_MODULES)}
    return Schema({**modules, "gate": SectionSpec(1, {"phi": _GATE}, 1)})


def _update(schema: Schema, kind: Kind, metrics: Sequence[str], seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    sections = {
        name: Section(
            torch.arange(spec.max_rows, dtype=torch.int32)[None],
            torch.ones(1, spec.max_rows, dtype=torch.bool),
            torch.randn(1, spec.max_rows, spec.width, generator=generator),
        )
        for name, spec in schema.sections.items()
    }
    block = UpdateBlock(sections, torch.ones(1), {name: torch.ones(1) for name in metrics}, 1, "r0")
    return encode(block, 0, schema, {"pool": RowFormat(kind), "gate": RowFormat("fp32")})


def _admit_all(schema: Schema, payload: bytes) -> None:
    reply = frames.join([payload])
    for start in range(0, REPLIES, BLOCK):
        arrived = []
        for _ in range(start, start + BLOCK):
            hashlib.sha256(reply).digest()
            arrived += frames.split(reply, 1, 2**24)
        block, faults = decode_all(arrived, schema, "r0", ("support_loss",), round_index=1)
        _, rejections = admit(block, schema, LIMITS)
        assert not faults
        assert not rejections
