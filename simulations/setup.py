"""What follows from a configuration and a base model: the same on the driver and on every worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

from torch import Tensor

from client import task
from client.task import Task
from federation.base import BaseModel
from federation.config import RunConfig
from federation.data.population import Population
from federation.errors import ConfigError
from federation.pool.model import PooledModel
from federation.state import initial_values
from federation.streams import UserIds
from federation.update import Values
from server.round import Rules, ServerState, begin, rules_of


@runtime_checkable
class Teacher(Protocol):
    """A population whose best rows and masks are known."""

    def teacher_values(self) -> dict[str, Tensor]:
        """The rows of a pool that every user's best mask picks from."""
        ...

    def best_mask(self, user_ids: UserIds) -> Tensor:
        """(U, G) bool: the best mask of each user."""
        ...

    def state_best_mask(self, user_ids: UserIds) -> Tensor:
        """(U, G) bool: the best guess from what a user's type says."""
        ...


@dataclass(frozen=True)
class Setup(Task):
    """A federation's fixed parts. first_pool: rows to start from, instead of fresh ones."""

    config: RunConfig
    first_pool: Values = field(default_factory=dict)

    @cached_property
    def rules(self) -> Rules:
        return rules_of(self.config, self.schema)

    def begin(self) -> ServerState:
        """The state before the first round."""
        values = initial_values(self.model.spec, self.gate, self.schema, self.config.gate, self.streams.at("initial"))
        return begin(self.rules, {**values, **self.first_pool})


def wrap(config: RunConfig, base: BaseModel) -> PooledModel:
    """The base model with the pool that a configuration describes around it."""
    return task.wrap(base, config.pool, config.compute.precision)


def set_up(config: RunConfig, model: PooledModel, first_pool: Values | None = None) -> Setup:
    """The fixed parts of a federation. One wrapped model serves federations with pools of several ranks."""
    return Setup(config, model.of_rank(config.pool.rank), first_pool or {})


def first_pool(config: RunConfig, population: Population) -> Values:
    """The rows that `pool.start` asks for, none for fresh ones. Raises ConfigError without a teacher to take from."""
    if config.pool.start == "fresh":
        return {}
    if not isinstance(population, Teacher):
        raise ConfigError(
            f"pool.start = 'teacher' needs a population with known best rows, {population.name!r} has none; drop it"
        )
    return population.teacher_values()
