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
from federation.data.population import Batch, Population
from federation.errors import ConfigError
from federation.pool.model import PooledModel
from federation.pool.spec import SECTION_PREFIX
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

    def type_of(self, user_ids: UserIds) -> UserIds:
        """(U,) int64: the latent type of each user."""
        ...

    def best_mask(self, user_ids: UserIds) -> Tensor:
        """(U, G) bool: the best mask of each user."""
        ...

    def state_best_mask(self, user_ids: UserIds) -> Tensor:
        """(U, G) bool: the best guess from what a user's type says."""
        ...

    def informed_mask(self, user_ids: UserIds, examples: Batch) -> Tensor:
        """(U, G) bool: the best guess from what a user's type says, and these examples of its own.

        Raises PopulationError where it is not known.
        """
        ...

    def expected_loss(self, user_ids: UserIds, mask_ug: Tensor) -> Tensor:
        """(U,): the loss to expect of each user's examples with a mask (U, G) over the teacher's rows."""
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
        values = initial_values(self.learner, self.gate, self.schema, self.config.gate, self.streams.at("initial"))
        return begin(self.rules, {**values, **self.first_pool})


def wrap(config: RunConfig, base: BaseModel) -> PooledModel:
    """The base model with the pool that a configuration describes around it."""
    return task.wrap(base, config.pool, config.compute.precision)


def set_up(config: RunConfig, model: PooledModel, first_pool: Values | None = None) -> Setup:
    """The fixed parts of a federation. One wrapped model serves federations with pools of several ranks."""
    return Setup(config, model.of_rank(config.pool.rank), first_pool or {})


def first_pool(config: RunConfig, population: Population, trained: Values | None = None) -> Values:
    """The rows that `pool.start` asks for, none for fresh ones. trained: the values of the run's main federation.

    Raises ConfigError where there is no teacher, or no trained pool, to take from.
    """
    if config.pool.start == "fresh":
        return {}
    if config.pool.start == "trained":
        if trained is None:
            raise ConfigError("pool.start = 'trained' is for variants of a run, which has a trained pool; set 'fresh'")
        return {name: rows for name, rows in trained.items() if name.startswith(SECTION_PREFIX)}
    if not isinstance(population, Teacher):
        raise ConfigError(
            f"pool.start = 'teacher' needs a population with known best rows, {population.name!r} has none; drop it"
        )
    return population.teacher_values()
