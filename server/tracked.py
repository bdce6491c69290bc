"""What the gate's sections besides its parameters become: the units' load, a running mean; and the steered price."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from federation.config import RunConfig
from federation.state import LOAD_SECTION, PRICE_SECTION
from federation.update import Schema, UpdateBlock, Values
from strategies.means import FedAvg, Sums
from strategies.optimizers import Sgd
from strategies.protocol import Optimizer, State, Step, StepSection, Strategy, Tensors

TRACKED = (LOAD_SECTION, PRICE_SECTION)
LOAD_RATE = 0.1
"""Of the units' load: it is the mean over some ten rounds, so one cohort's taste does not make a unit look unused."""


@dataclass(frozen=True)
class RunningShare(Sgd):
    """The running mean of what users have switched on, within [0, 1] whatever they send: clients take its logarithm."""

    def step(self, values: Values, step: Step, state: Tensors) -> tuple[dict[str, Tensor], Tensors]:
        moved, state = super().step(values, step, state)
        return {name: share.clamp(0.0, 1.0) for name, share in moved.items()}, state


@dataclass(frozen=True)
class SteeredPrice(Sgd):
    """log lambda += rate * d / max(share, target), where d = share - target and share is the cohort's mean.

    So no round moves log lambda by more than the rate, and a mean share on target does not move it, however far users
    are from one another. (Were each user's d divided first, those below the target would outweigh those above.)
    """

    target: float = field(kw_only=True)

    def step(self, values: Values, step: Step, state: Tensors) -> tuple[dict[str, Tensor], Tensors]:
        relative = {name: replace(own, mean=self._relative(own.mean)) for name, own in step.sections.items()}
        return super().step(values, replace(step, sections=relative), state)

    def _relative(self, off: Tensor) -> Tensor:
        """Within [-1, 1], also if users say that fewer than no units are active."""
        return (off / (off + self.target).clamp_min(self.target)).clamp(-1.0, 1.0)


@dataclass(frozen=True)
class TrackedByMean:
    """A strategy for all sections but load and price, which are plain means (`FedAvg`) whatever the strategy is.

    By the sign of what users send, or its median, a unit that fewer than half of them use would have no load at all.
    A partial is the strategy's and that of the means.
    """

    strategy: Strategy[Any]

    @property
    def linear_memory(self) -> bool:
        return self.strategy.linear_memory

    def init(self, schema: Schema) -> State:
        return replace(self.strategy.init(_others(schema)), schema=schema)

    def lift(self, block: UpdateBlock, state: State) -> tuple[Any, Sums]:
        tracked = State(_tracked(state.schema))
        return (
            self.strategy.lift(_only(block, _others(state.schema)), replace(state, schema=_others(state.schema))),
            FedAvg().lift(_only(block, tracked.schema), tracked),
        )

    def merge(self, a: tuple[Any, Sums], b: tuple[Any, Sums]) -> tuple[Any, Sums]:
        return self.strategy.merge(a[0], b[0]), FedAvg().merge(a[1], b[1])

    def finish(self, partial: tuple[Any, Sums], state: State) -> tuple[Step, State]:
        step, new_state = self.strategy.finish(partial[0], replace(state, schema=_others(state.schema)))
        tracked, _ = FedAvg().finish(partial[1], State(_tracked(state.schema)))
        sections: Mapping[str, StepSection] = {**step.sections, **tracked.sections}
        return replace(step, sections=sections), replace(new_state, schema=state.schema)


def tracking_optimizers(config: RunConfig, schema: Schema) -> dict[str, Optimizer]:
    """How the tracked sections that the schema has move."""
    found: dict[str, Optimizer] = {}
    reward = config.gate.reward
    if LOAD_SECTION in schema.sections:
        found[LOAD_SECTION] = RunningShare(LOAD_RATE)
    if PRICE_SECTION in schema.sections:
        assert reward.target is not None, "a schema has a price where it has a target"
        found[PRICE_SECTION] = SteeredPrice(reward.price_rate, target=reward.target)
    return found


def largest_norms(schema: Schema) -> dict[str, float]:
    """Norms that no honest user exceeds: a mask minus shares is within 1 in each of G units, and a share of active
    units is off its target by at most 1."""
    largest = {}
    if LOAD_SECTION in schema.sections:
        largest[LOAD_SECTION] = math.sqrt(schema.sections[LOAD_SECTION].width)
    if PRICE_SECTION in schema.sections:
        largest[PRICE_SECTION] = 1.0
    return largest


def _tracked(schema: Schema) -> Schema:
    return Schema({name: spec for name, spec in schema.sections.items() if name in TRACKED})


def _others(schema: Schema) -> Schema:
    return Schema({name: spec for name, spec in schema.sections.items() if name not in TRACKED})


def _only(block: UpdateBlock, schema: Schema) -> UpdateBlock:
    return replace(block, sections={name: block.sections[name] for name in schema.sections})
