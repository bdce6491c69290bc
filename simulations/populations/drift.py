"""Users whose data drifts: each moves from one group (a project, a play) to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from federation.base import BaseModel
from federation.data.population import Batch, Part, Population, as_array
from federation.errors import ConfigError, PopulationError
from federation.streams import Streams, UserIds

_SPLITS = ("train", "new")


class Drifting:
    """A population, as it is, whose users have a sequence of tasks: a `Sequenced`.

    A user's task 0 is its own data. Its task t is the data of a user of the same split whose group stands t strides
    further in the split; strides are as long as can be, so that the tasks of a user are of different groups. What users
    have without a task is task 0.

    Users of one group meet the same groups, so errors clustered by the user's group cover that; that users of different
    groups may meet one in different tasks, they do not. The first task asked for costs O(users of the splits).

    Raises ConfigError for less than two tasks, PopulationError where a split has fewer groups than there are tasks.
    """

    def __init__(self, population: Population, tasks: int) -> None:
        if tasks < 2:
            raise ConfigError(f"users who drift have at least 2 tasks, got {tasks}; leave tasks out for none")
        self.population, self.tasks, self.name = population, tasks, population.name
        for split in _SPLITS:
            ids = as_array(population.users(split))
            groups = len(np.unique(population.groups(ids)))
            if len(ids) and groups < tasks:
                raise PopulationError(
                    f"users drift through {tasks} groups, the {split} users of {self.name!r} are of {groups}; "
                    f"lower tasks to {groups}, or give users of more groups"
                )

    # The protocols Population and Sequenced

    def users(self, split: str) -> range | UserIds:
        return self.population.users(split)

    def batch(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> Batch:
        return self.population.batch(user_ids, part, size, streams)

    def of_task(self, index: int) -> DriftTask:
        if not 0 <= index < self.tasks:
            raise PopulationError(f"users of {self.name!r} have the tasks 0..{self.tasks - 1}, got {index}")
        return DriftTask(self, index)

    def base_model(self) -> BaseModel:
        return self.population.base_model()

    def groups(self, user_ids: UserIds) -> UserIds:
        return self.population.groups(user_ids)

    def chars_per_target(self, user_ids: UserIds, part: Part) -> npt.NDArray[np.float64]:
        return self.population.chars_per_target(user_ids, part)

    def describe(self) -> dict[str, object]:
        return {**self.population.describe(), "tasks": self.tasks}

    def __getattr__(self, name: str) -> Any:
        """What only some populations know, such as a teacher's masks."""
        if name == "population":
            raise AttributeError(name)
        return getattr(self.population, name)

    # How users drift

    def owner(self, user_ids: UserIds, index: int) -> UserIds:
        """Whose data the users have in a task, (U,)."""
        if index == 0:
            return user_ids
        try:
            return np.array([self._next[user_id][index - 1] for user_id in user_ids.tolist()], dtype=np.int64)
        except KeyError as error:
            raise PopulationError(f"no user of {self.name!r} has the id {error}; users() gives their ids") from None

    @cached_property
    def _next(self) -> Mapping[int, tuple[int, ...]]:
        """Whose data every user has in the tasks after its own."""
        found: dict[int, tuple[int, ...]] = {}
        for split in _SPLITS:
            found |= _drift(self.population, as_array(self.population.users(split)), self.tasks)
        return found


@dataclass(frozen=True)
class DriftTask:
    """One task of every user's sequence, with the characters that its targets stand for."""

    drifting: Drifting
    index: int

    def batch(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> Batch:
        """The examples that the data's owner would draw."""
        return self.drifting.population.batch(self.drifting.owner(user_ids, self.index), part, size, streams)

    def chars_per_target(self, user_ids: UserIds, part: Part) -> npt.NDArray[np.float64]:
        """As of a population, in this task."""
        return self.drifting.population.chars_per_target(self.drifting.owner(user_ids, self.index), part)


def _drift(population: Population, ids: UserIds, tasks: int) -> dict[int, tuple[int, ...]]:
    """The owners of the tasks after the first, by user of a split. Within a group, the n-th user meets the n-th of the
    next, counted anew where that has fewer."""
    group_u = population.groups(ids)
    members = [ids[group_u == group].tolist() for group in np.unique(group_u)]
    stride = len(members) // tasks
    return {
        user_id: tuple(_wrapped(members, place + task * stride, number) for task in range(1, tasks))
        for place, users in enumerate(members)
        for number, user_id in enumerate(users)
    }


def _wrapped(members: list[list[int]], place: int, number: int) -> int:
    users = members[place % len(members)]
    return users[number % len(users)]
