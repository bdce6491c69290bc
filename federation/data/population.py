"""The protocol that every source of users fulfils, and the batch that users' data travels in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from federation.base import BaseModel
from federation.streams import Streams, UserIds

Part = Literal["support", "query", "test"]
"""A user's data for adapting, for outer signals and reward, and for reporting."""


@dataclass(frozen=True)
class Batch:
    """Examples of U users, stacked.

    inputs (U, N, ...), targets (U, N, ...), weight (U, N) float32: 0 is padding, so users may own different amounts.
    """

    inputs: Tensor
    targets: Tensor
    weight: Tensor

    @property
    def users(self) -> int:
        return self.weight.shape[0]

    def flat(self) -> tuple[Tensor, Tensor]:
        """inputs and targets with users and examples in one leading axis: (U * N, ...)."""
        return self.inputs.flatten(0, 1), self.targets.flatten(0, 1)

    def window(self, start: int, stop: int) -> Batch:
        """Examples start..stop of every user."""
        return Batch(self.inputs[:, start:stop], self.targets[:, start:stop], self.weight[:, start:stop])

    def pick(self, index_un: Tensor) -> Batch:
        """Some examples of each user, (U, n) int64."""
        users_u1 = torch.arange(self.users)[:, None]
        return Batch(self.inputs[users_u1, index_un], self.targets[users_u1, index_un], self.weight[users_u1, index_un])

    def take(self, users: slice | Tensor) -> Batch:
        """Some of the users."""
        return Batch(self.inputs[users], self.targets[users], self.weight[users])


def side_by_side(batches: Sequence[Batch]) -> Batch:
    """The examples of several batches of the same users, one batch after the other."""
    return Batch(
        torch.cat([batch.inputs for batch in batches], 1),
        torch.cat([batch.targets for batch in batches], 1),
        torch.cat([batch.weight for batch in batches], 1),
    )


class Examples(Protocol):
    """Something that draws users' examples."""

    def batch(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> Batch:
        """`size` examples of each user, drawn from the streams (with replacement where a user owns fewer);
        with size None the whole part, in order, padded with weight 0."""
        ...


@runtime_checkable
class Sequenced(Protocol):
    """Where users meet their data as a sequence of tasks, one after the other. tasks: how many."""

    @property
    def tasks(self) -> int: ...

    def of_task(self, index: int) -> Examples:
        """What users have of one task, counted from 0: `batch` gives that task's examples alone.

        Raises PopulationError for a task that is not there.
        """
        ...


class Population(Examples, Protocol):
    """Users and their data. Cost is O(users asked for), never O(all users)."""

    name: str

    def users(self, split: str) -> range | UserIds:
        """The ids of a split ("train" or "new"): a range, or an int64 array."""
        ...

    def base_model(self) -> BaseModel:
        """The frozen model that this population's users share."""
        ...

    def groups(self, user_ids: UserIds) -> UserIds:
        """(U,) int64: users of one group are not independent (projects, plays); errors are clustered by it."""
        ...

    def chars_per_target(self, user_ids: UserIds, part: Part) -> npt.NDArray[np.float64]:
        """(U,) characters that one target of the whole part stands for, since figures are bits per character.
        1 where targets are not pieces of text."""
        ...

    def describe(self) -> dict[str, object]:
        """What a record needs to know: sizes, what was left out and why, fingerprint of the data."""
        ...


def as_array(ids: range | UserIds) -> UserIds:
    """The ids as an int64 array."""
    return np.asarray(ids, dtype=np.int64)
