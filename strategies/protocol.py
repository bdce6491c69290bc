"""The two contracts of aggregation: how updates combine (Strategy), how the result is applied (Optimizer).

    UpdateBlock --lift--> Partial --merge, in any tree--> Partial --finish--> Step --Optimizer.step--> Values

A strategy is a commutative monoid between `lift` and `finish`, so the reduction tree knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from federation.errors import PoolError
from federation.update import Schema, UpdateBlock, Values

Partial = TypeVar("Partial")
Tensors = Mapping[str, Tensor]
"""State as the checkpoint writes it: tensors by name."""


@dataclass(frozen=True)
class State:
    """What a strategy carries from round to round: the schema, and tensors of its own (most have none).

    A checkpoint saves `tensors` only; `replace(strategy.init(schema), tensors=saved)` restores it.
    """

    schema: Schema
    tensors: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class StepSection:
    """One section's result of a round.

    mean: (rows, width) float32, a direction of improvement: it is added, not subtracted.
    contributors: (rows,) float32, the weight of the users behind a row; 0 means that nobody trained it.
    factor: (rows,) float32 in [0, 1], how far the row may be trusted. It is kept apart from the mean because
    Adam forgets any constant scale of its input: there the factor multiplies the output.
    """

    mean: Tensor
    contributors: Tensor
    factor: Tensor


@dataclass(frozen=True)
class Step:
    """One round's result, by section. frozen: (width,) bool per section, True for columns not trained."""

    sections: Mapping[str, StepSection]
    frozen: Tensors = field(default_factory=dict)

    def moved(self, name: str) -> Tensor:
        """(rows, width) bool: the entries that were trained. Optimizers leave all others as they are.

        A zero direction is not the same: momentum would go on moving a row that nobody trained.
        """
        section = self.sections[name]
        rows = (section.contributors > 0)[:, None].expand_as(section.mean)
        return rows & ~self.frozen[name] if name in self.frozen else rows

    def freeze(self, schema: Schema, factors: Collection[str]) -> Step:
        """The step of a round that did not train these factors, for example `("down",)`.

        Sections without such a factor (the gate) are as they were.
        Raises PoolError for a factor that no section has.
        """
        known = {factor for spec in schema.sections.values() for factor in spec.factors}
        if unknown := set(factors) - known:
            raise PoolError(f"factors to freeze must be in the schema, got {sorted(unknown)}; it has {sorted(known)}")
        frozen = {}
        for name, spec in schema.sections.items():
            columns = torch.zeros(spec.width, dtype=torch.bool)
            for factor in spec.factors:
                columns[spec.columns(factor)] = factor in factors
            frozen[name] = columns
        return replace(self, frozen=frozen)


class Strategy(Protocol[Partial]):
    """How updates combine. All methods are pure: state in, new state out, no argument changed.

    A partial is plain data of tensors that pickles. `strategies.conformance.check` holds these laws:
    merge commutes and associates; lift of a block is the merge of its users' lifts; padding is ignored;
    a lift of nobody is neutral.
    """

    @property
    def linear_memory(self) -> bool:
        """Whether a partial grows with the number of users (a median's does, a mean's does not)."""
        ...

    def init(self, schema: Schema) -> State:
        """The state before the first round."""
        ...

    def lift(self, block: UpdateBlock, state: State) -> Partial:
        """The part of U admitted users, U >= 0. Runs on workers, so its cost is the round's cost."""
        ...

    def merge(self, a: Partial, b: Partial) -> Partial:
        """Two disjoint groups of users as one."""
        ...

    def finish(self, partial: Partial, state: State) -> tuple[Step, State]:
        """The round's step, for every section of the schema, and the state of the next round."""
        ...


class Optimizer(Protocol):
    """How a step changes the values. What lies outside `step.moved(name)` keeps every bit."""

    def init(self, values: Values) -> Tensors:
        """The state before the first round. Shapes: values (rows, width) per section."""
        ...

    def step(self, values: Values, step: Step, state: Tensors) -> tuple[dict[str, Tensor], Tensors]:
        """New values and new state. Shapes as in `init`."""
        ...
