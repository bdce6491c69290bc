"""A population that is held in memory: a base model, and the same number of examples of each part for every user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from federation.base import BaseModel
from federation.data.population import Batch, Part
from federation.streams import Streams, UserIds


@dataclass(frozen=True)
class InMemory:
    """User u is row u of every part. The first half of the users train, the others are new."""

    base: BaseModel
    parts: Mapping[str, Batch]

    name = "in-memory"

    @property
    def count(self) -> int:
        return self.parts["support"].users

    def users(self, split: str) -> range:
        half = self.count // 2
        return {"train": range(half), "new": range(half, self.count)}[split]

    def batch(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> Batch:
        whole = self.parts[part].take(torch.from_numpy(user_ids))
        if size is None:
            return whole
        return whole.pick(torch.from_numpy(streams.integers("examples", user_ids, whole.weight.shape[1], size)))

    def base_model(self) -> BaseModel:
        return self.base

    def groups(self, user_ids: UserIds) -> UserIds:
        return user_ids

    def chars_per_target(self, user_ids: UserIds, part: Part) -> npt.NDArray[np.float64]:
        return np.ones(len(user_ids))

    def describe(self) -> dict[str, object]:
        return {"users": self.count}
