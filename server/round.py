"""The server's round as pure functions: blocks become partials, partials become one, one changes the state."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from federation.config import OptimizerConfig, RunConfig
from federation.state import version_of
from federation.update import Limits, Rejections, Schema, UpdateBlock, Values, admit
from server.checkpoint import Checkpoint
from strategies.optimizers import Constant, Cosine, PerPrefix, Schedule
from strategies.protocol import Optimizer, State, Strategy, Tensors
from strategies.registry import make_optimizer, make_strategy


@dataclass(frozen=True)
class Rules:
    """How a federation aggregates."""

    schema: Schema
    strategy: Strategy[Any]
    optimizer: Optimizer
    limits: Limits


@dataclass(frozen=True)
class ServerState:
    """The server's state of record after `round_index` rounds."""

    round_index: int
    values: Values
    optimizer: Tensors
    strategy: State

    @property
    def version(self) -> str:
        """The name of these values."""
        return version_of(self.values, self.round_index)


def rules_of(config: RunConfig, schema: Schema) -> Rules:
    """The rules that a configuration names."""
    optimizer = PerPrefix(
        {
            prefix: _optimizer(wanted, config.federation.rounds)
            for prefix, wanted in (("pool", config.pool_optimizer), ("gate", config.gate_optimizer))
        }
    )
    limits = Limits({"pool": config.limits.pool_norm, "gate": config.limits.gate_norm}, config.limits.weight)
    return Rules(schema, make_strategy(config.strategy.name, **config.strategy.options), optimizer, limits)


def begin(rules: Rules, values: Values) -> ServerState:
    """The state before the first round."""
    return ServerState(0, values, rules.optimizer.init(values), rules.strategy.init(rules.schema))


def lift(block: UpdateBlock, strategy_state: State, rules: Rules) -> tuple[Any, Rejections]:
    """The admitted part of a block as a partial, and who was refused."""
    admitted, rejections = admit(block, rules.schema, rules.limits)
    return rules.strategy.lift(admitted, strategy_state), rejections


def close(state: ServerState, partial: Any, rules: Rules, frozen_factors: Collection[str] = ()) -> ServerState:
    """The state after a round, from the partial of all its users. Factors not trained in it stay as they are."""
    step, strategy_state = rules.strategy.finish(partial, state.strategy)
    if frozen_factors:
        step = step.freeze(rules.schema, frozen_factors)
    values, optimizer = rules.optimizer.step(state.values, step, state.optimizer)
    return ServerState(state.round_index + 1, values, optimizer, strategy_state)


def to_parts(state: ServerState) -> dict[str, Tensors]:
    """The state as the tensors of a checkpoint, by part."""
    return {"values": state.values, "optimizer": state.optimizer, "strategy": state.strategy.tensors}


def from_checkpoint(checkpoint: Checkpoint, rules: Rules) -> ServerState:
    """The state that a checkpoint holds."""
    parts = checkpoint.tensors
    return ServerState(
        round_index=checkpoint.round_index,
        values={name: parts["values"][name] for name in rules.schema.sections},
        optimizer=parts["optimizer"],
        strategy=replace(rules.strategy.init(rules.schema), tensors=parts["strategy"]),
    )


def _optimizer(wanted: OptimizerConfig, rounds: int) -> Optimizer:
    schedule: Schedule = Constant(wanted.rate) if wanted.schedule == "constant" else Cosine(wanted.rate, max(rounds, 1))
    return make_optimizer(wanted.name, rate=schedule, **wanted.options)
