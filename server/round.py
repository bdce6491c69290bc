"""The server's round as pure functions: blocks become partials, partials become one, one changes the state."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from federation.config import OptimizerConfig, RunConfig
from federation.errors import CheckpointError
from federation.state import version_of
from federation.update import Limits, Rejections, Schema, UpdateBlock, Values, admit
from server.checkpoint import Checkpoint
from server.tracked import TrackedByMean, largest_norms, tracking_optimizers
from strategies.protocol import Optimizer, State, Strategy, Tensors
from strategies.registry import make_optimizer, make_strategy

T = TypeVar("T")


@dataclass(frozen=True)
class Rules:
    """How a federation aggregates. `optimizers` are named by the prefix of the sections that they move."""

    schema: Schema
    strategy: Strategy[Any]
    optimizers: Mapping[str, Optimizer]
    limits: Limits


@dataclass(frozen=True)
class ServerState:
    """The server's state of record after `round_index` rounds."""

    round_index: int
    values: Values
    optimizers: Mapping[str, Tensors]
    strategy: State

    @property
    def version(self) -> str:
        """The name of these values."""
        return version_of(self.values, self.round_index)


def rules_of(config: RunConfig, schema: Schema) -> Rules:
    """The rules that a configuration names."""
    limits, wanted = config.limits, {"pool": config.pool_optimizer, "gate": config.gate_optimizer}
    max_norm = {"pool": limits.pool_norm, "gate": limits.gate_norm, **largest_norms(schema)}
    if _under("rates", schema.sections):
        wanted["rates"], max_norm["rates"] = config.rates_optimizer, limits.rates_norm
    if _under("start", schema.sections):
        wanted["start"], max_norm["start"] = config.start_optimizer, limits.start_norm
    optimizers = {prefix: _optimizer(own, config.federation.rounds) for prefix, own in wanted.items()}
    tracked = tracking_optimizers(config, schema)
    strategy = make_strategy(config.strategy.name, **config.strategy.options)
    return Rules(
        schema=schema,
        strategy=TrackedByMean(strategy) if tracked else strategy,
        optimizers={**optimizers, **tracked},
        limits=Limits(max_norm, config.limits.weight, config.limits.absurd),
    )


def frozen_factors(config: RunConfig, round_index: int) -> set[str]:
    """The pool's factors that a round (counted from 1) leaves as they are: all of them where the pool rests."""
    trained = () if config.gate.rests(round_index) else config.local.factors(round_index)
    return {"down", "up"} - set(trained)


def begin(rules: Rules, values: Values) -> ServerState:
    """The state before the first round."""
    optimizers = {prefix: o.init(_under(prefix, values)) for prefix, o in rules.optimizers.items()}
    return ServerState(0, values, optimizers, rules.strategy.init(rules.schema))


def lift(block: UpdateBlock, strategy_state: State, rules: Rules) -> tuple[Any, Rejections]:
    """The admitted part of a block as a partial, and who was refused."""
    admitted, rejections = admit(block, rules.schema, rules.limits)
    return rules.strategy.lift(admitted, strategy_state), rejections


def close(state: ServerState, partial: Any, rules: Rules, frozen_factors: Collection[str] = ()) -> ServerState:
    """The state after a round, from the partial of all its users. Factors not trained in it stay as they are."""
    step, strategy_state = rules.strategy.finish(partial, state.strategy)
    if frozen_factors:
        step = step.freeze(rules.schema, frozen_factors)
    values, optimizers = dict(state.values), {}
    for prefix, optimizer in rules.optimizers.items():
        own = replace(step, sections=_under(prefix, step.sections))
        moved, optimizers[prefix] = optimizer.step(_under(prefix, state.values), own, state.optimizers[prefix])
        values.update(moved)
    return ServerState(state.round_index + 1, values, optimizers, strategy_state)


def to_parts(state: ServerState) -> dict[str, Tensors]:
    """The state as the tensors of a checkpoint, by part."""
    parts: dict[str, Tensors] = {"values": state.values, "strategy": state.strategy.tensors}
    return parts | {f"optimizer-{prefix}": tensors for prefix, tensors in state.optimizers.items()}


def from_checkpoint(checkpoint: Checkpoint, rules: Rules) -> ServerState:
    """The state that a checkpoint holds.

    Raises CheckpointError when its values, optimizers or strategy are not those of the rules: of an older version.
    """
    parts = checkpoint.tensors
    if odd := _odd_parts(parts, rules):
        raise CheckpointError(
            f"a checkpoint holds what this version trains, that of round {checkpoint.round_index} lacks "
            f"{', '.join(odd)}, or has it in another shape or beyond that; it is of an older version or another "
            "configuration: "
            "begin a new run, or go on with the version that wrote it"
        )
    return ServerState(
        round_index=checkpoint.round_index,
        values={name: parts["values"][name] for name in rules.schema.sections},
        optimizers={prefix: parts[f"optimizer-{prefix}"] for prefix in rules.optimizers},
        strategy=replace(rules.strategy.init(rules.schema), tensors=parts["strategy"]),
    )


def _odd_parts(parts: Mapping[str, Tensors], rules: Rules) -> list[str]:
    """What is not there, of another shape than the schema's, or not in the schema."""
    values = parts.get("values", {})
    wanted = {name: (spec.rows, spec.width) for name, spec in rules.schema.sections.items()}
    odd = [f"values/{name}" for name, shape in wanted.items() if name not in values or values[name].shape != shape]
    odd += [f"values/{name}" for name in values if name not in wanted]
    needed = ("strategy", *(f"optimizer-{prefix}" for prefix in rules.optimizers))
    return odd + [part for part in needed if part not in parts]


def _optimizer(wanted: OptimizerConfig, rounds: int) -> Optimizer:
    decay_rounds = rounds if wanted.schedule == "cosine" and rounds else None
    return make_optimizer(wanted.name, learning_rate=wanted.learning_rate, decay_rounds=decay_rounds, **wanted.options)


def _under(prefix: str, by_section: Mapping[str, T]) -> dict[str, T]:
    return {name: value for name, value in by_section.items() if name.split("/")[0] == prefix}
