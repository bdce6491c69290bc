"""What follows from a task and a base model: the same on a device, on a worker and on the server."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from client.round import LocalRule
from client.state import RecordLayout
from federation.base import BaseModel
from federation.config import CodecConfig, PoolConfig, Precision, TaskConfig
from federation.formats import RowFormat
from federation.gate import GateSpec
from federation.learner import LEARNED_PREFIXES, Learner, learner_of
from federation.learning import learning_of
from federation.pool.model import PooledModel
from federation.precision import in_precision
from federation.state import GATE_SECTION, LOAD_SECTION, PRICE_SECTION, gate_spec, schema_of
from federation.streams import Streams
from federation.update import Schema


@dataclass(frozen=True)
class Task:
    """A task's fixed parts."""

    config: TaskConfig
    model: PooledModel

    @cached_property
    def gate(self) -> GateSpec:
        return gate_spec(self.model, self.config.gate)

    @cached_property
    def schema(self) -> Schema:
        return schema_of(self.learner, self.gate, self.config.gate)

    @cached_property
    def learner(self) -> Learner:
        return learner_of(self.config.meta, self.config.local, self.model)

    @cached_property
    def local(self) -> LocalRule:
        """Raises as `learning_of` does."""
        gate, learning = self.config.gate, learning_of(self.config.gate, self.model.base, self.model.spec)
        return LocalRule(gate, self.config.local, self.config.meta, learning, self.learner)

    @property
    def streams(self) -> Streams:
        return Streams(self.config.seed)

    @property
    def record_layout(self) -> RecordLayout:
        return RecordLayout(self.config.gate.embedding, -(-self.model.spec.units // 8))

    @property
    def update_formats(self) -> dict[str, RowFormat]:
        """How each part of an update is written: all but the pool's rows as fp32."""
        dense = dict.fromkeys((GATE_SECTION, LOAD_SECTION, PRICE_SECTION, *LEARNED_PREFIXES), RowFormat("fp32"))
        return {"pool": row_format(self.config.codec), **dense}


def wrap(base: BaseModel, pool: PoolConfig, precision: Precision) -> PooledModel:
    """The base model, in place, with the pool that a configuration describes around it."""
    return PooledModel.around(in_precision(base, precision), pool.rank, pool.scale, pool.target_modules)


def row_format(config: CodecConfig) -> RowFormat:
    """The codec's format for a configuration."""
    return RowFormat(config.rows, config.top)
