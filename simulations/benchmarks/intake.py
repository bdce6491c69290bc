"""The server's side alone: the memory that replies take, and how many are taken in per second. Nodes are made up.

What is timed is a round's `Intake`, over replies of one user each, on one thread, by the kind of their rows:

| side     | strategy     | what it takes |
|----------|--------------|---------------|
| admitted | does nothing | each reply's digest, frames and ledger entry; its update decoded, checked and clipped |
| taken_in | `MaskedMean` | the same, and lift and merge |
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from federation import frames
from federation.codec import encode
from federation.config import RunConfig
from federation.exchange import Contribution, Work
from federation.formats import Kind, RowFormat
from federation.state import metric_names
from federation.update import Limits, Schema, Section, SectionSpec, UpdateBlock
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
from strategies.means import MaskedMean
from strategies.protocol import State, Step, Strategy

LIMITS = Limits({"pool": 1e6, "gate": 1e6})
REPLIES = 512
KINDS: tuple[Kind, ...] = ("fp32", "int8")
"""The same rows: 8 units of 8 modules and a gate, 128 KiB as fp32, 38 KiB as int8."""

_MODULES, _RANK, _BUDGET, _WIDTH, _GATE = 8, 32, 8, 480, 2000
_WORK = Work("benchmark", 1, 1, "r0")
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")

Seconds = Mapping[str, Mapping[str, tuple[float, ...]]]
"""By side and kind of rows: for `REPLIES` replies, in each repetition."""


class Nothing:
    """A strategy that does nothing: what is left of an intake is admission."""

    linear_memory = False

    def init(self, schema: Schema) -> State:
        return State(schema)

    def lift(self, block: UpdateBlock, state: State) -> None:
        """Makes nothing of updates."""

    def merge(self, a: None, b: None) -> None:
        """Has nothing to merge."""

    def finish(self, partial: None, state: State) -> tuple[Step, State]:
        return Step({}), state


def speeds(repetitions: int) -> Seconds:
    """Measured in turns, in a process that keeps freed memory, as workers do."""
    taken: Seconds = _in_a_process(f"in_turns_here({repetitions}, {REPLIES})", WORKER_ENVIRONMENT)
    return {side: {kind: tuple(seconds) for kind, seconds in of.items()} for side, of in taken.items()}


def in_turns_here(repetitions: int, replies: int) -> Seconds:
    """Of so many replies, in this process."""
    schema, config = _schema(), _config(block=32)
    strategies: dict[str, Strategy[Any]] = {"admitted": Nothing(), "taken_in": MaskedMean()}
    sent = {kind: _always(_reply(schema, kind, seed=0)) for kind in KINDS}
    work = {
        (side, kind): partial(_serve, replies, reply_of, Rules(schema, strategy, {}, LIMITS), config)
        for kind, reply_of in sent.items()
        for side, strategy in strategies.items()
    }
    with one_thread():
        taken = in_turns(work, repetitions)
    return {side: {kind: taken[side, kind] for kind in KINDS} for side in strategies}


def memory(replies: int) -> float | None:
    """`take_in` in a process of its own."""
    mib: float | None = _in_a_process(f"take_in({replies})", {})
    return mib


def take_in(replies: int) -> float | None:
    """The most private memory, in MiB, of this process while it takes in so many replies of 0.9 MB, one user each.

    None where the system does not tell.
    """
    rules = Rules(Schema(POOL.sections(max_rows=_BUDGET)), MaskedMean(), {}, LIMITS)
    with one_thread():
        return _peak_mib(partial(_serve, replies, partial(_reply, rules.schema, "fp32"), rules, _config(block=8)))


def _peak_mib(work: Callable[[], object]) -> float | None:
    """By the kernel's own mark, which misses no moment; without pages of files, as in `simulations/compute/memory.py`.

    None where there is no such mark.
    """
    try:
        _CLEAR_REFS.write_text("5")  # the mark starts anew
    except OSError:
        return None
    work()
    status = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    mib = {field: int(status[field].split()[0]) / 1024 for field in ("VmHWM", "RssFile", "RssShmem")}
    return round(mib["VmHWM"] - mib["RssFile"] - mib["RssShmem"], 1)


def _in_a_process(call: str, environment: Mapping[str, str]) -> Any:
    """What a call of one of these functions returns, as JSON."""
    code = f"import json; from simulations.benchmarks import intake; print(json.dumps(intake.{call}))"
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


def _serve(replies: int, reply_of: Callable[[int], bytes], rules: Rules, config: RunConfig) -> None:
    """A round's intake of one reply from each node."""
    plan = Plan(_WORK, tuple(Seat(node, (0,), node) for node in range(replies)))
    with tempfile.TemporaryDirectory() as folder:
        desk = Desk(config, AuditLog(Path(folder) / "audit.jsonl"))
        intake = Intake(plan, rules, rules.strategy.init(rules.schema), InProcessLifter(), desk, config)
        while wanted := intake.wanted:
            for node in wanted:
                payload = reply_of(node)
                intake.take(Parcel(str(node), node, Contribution(_WORK, {}, payload), len(payload)))
        assert intake.close().admitted == replies


def _config(block: int) -> RunConfig:
    return RunConfig.model_validate({"gate": {"policy": "all"}, "compute": {"block": block}})


def _schema() -> Schema:
    row = {"down": _WIDTH // 2, "up": _WIDTH // 2}
    modules = {f"pool/{j}": SectionSpec(_RANK, row, _BUDGET) for j in range(_MODULES)}
    return Schema({**modules, "gate": SectionSpec(1, {"phi": _GATE}, 1)})


def _always(reply: bytes) -> Callable[[int], bytes]:
    """The same reply of every node."""
    return lambda node: reply


def _reply(schema: Schema, kind: Kind, seed: int) -> bytes:
    """A node's reply for one user, who sends as many rows as it may."""
    generator = torch.Generator().manual_seed(seed)
    sections = {
        name: Section(
            torch.arange(spec.max_rows, dtype=torch.int32)[None],
            torch.ones(1, spec.max_rows, dtype=torch.bool),
            torch.randn(1, spec.max_rows, spec.width, generator=generator),
        )
        for name, spec in schema.sections.items()
    }
    metrics = {name: torch.ones(1) for name in metric_names(_config(block=1), _WORK.round_index)}
    block = UpdateBlock(sections, torch.ones(1), metrics, _WORK.round_index, _WORK.version)
    return frames.join([encode(block, 0, schema, {"pool": RowFormat(kind), "gate": RowFormat("fp32")})])
