"""What follows from a configuration and a base model: the same on the driver and on every worker."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from client.round import LocalRule
from client.state import RecordLayout
from federation.base import BaseModel
from federation.config import CodecConfig, RunConfig
from federation.formats import RowFormat
from federation.gate import GateSpec
from federation.pool.model import PooledModel
from federation.state import gate_spec, initial_values, schema_of
from federation.streams import Streams
from federation.update import Schema
from server.round import Rules, ServerState, begin, rules_of


@dataclass(frozen=True)
class Setup:
    """A federation's fixed parts."""

    config: RunConfig
    model: PooledModel

    @cached_property
    def gate(self) -> GateSpec:
        return gate_spec(self.model, self.config.gate)

    @cached_property
    def schema(self) -> Schema:
        return schema_of(self.model.spec, self.gate, self.config.gate)

    @cached_property
    def rules(self) -> Rules:
        return rules_of(self.config, self.schema)

    @property
    def local(self) -> LocalRule:
        return LocalRule(self.config.gate, self.config.local)

    @property
    def streams(self) -> Streams:
        return Streams(self.config.seed)

    @property
    def record_layout(self) -> RecordLayout:
        return RecordLayout(self.config.gate.embedding, -(-self.model.spec.units // 8))

    @property
    def update_formats(self) -> dict[str, RowFormat]:
        """How each part of an update is written: the gate's gradient always as fp32."""
        return {"pool": row_format(self.config.codec), "gate": RowFormat("fp32")}

    def begin(self) -> ServerState:
        """The state before the first round."""
        values = initial_values(self.model.spec, self.gate, self.schema, self.streams.at("initial"))
        return begin(self.rules, values)


def wrap(config: RunConfig, base: BaseModel) -> PooledModel:
    """The base model with the pool that a configuration describes around it."""
    return PooledModel.around(base, config.pool.rank, config.pool.scale, config.pool.target_modules)


def set_up(config: RunConfig, model: PooledModel) -> Setup:
    """The fixed parts of a federation. One wrapped model serves federations with pools of several ranks."""
    return Setup(config, model.of_rank(config.pool.rank))


def row_format(config: CodecConfig) -> RowFormat:
    """The codec's format for a configuration."""
    return RowFormat(config.rows, config.top)
