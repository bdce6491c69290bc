"""Courses of a few users on tiny models, for the tests of continual rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from client.adapt import Adam, Tuner
from client.continual.course import Course, Standing, adapt_to, begin
from client.continual.rules import course_of
from client.personal import ActiveRows, Tuning, active_rows
from federation.base import BaseModel
from federation.continual_config import ContinualConfig
from federation.data.population import Batch
from federation.learner import ActiveUnits
from federation.pool.model import PooledModel
from federation.streams import Streams
from tests import models
from tests.populations import InMemory

SCALE, RANK, STEPS, EXAMPLES = 1.5, 6, 3, 4
IDS = np.array([0, 1, 2])
STREAMS = Streams(11)

RULES = {
    "none": {},
    "ewc": {"strength": 3.0},
    "online_ewc": {"strength": 3.0, "forget": 0.3},
    "lwf": {"strength": 0.7},
    "replay": {"examples": 5},
    "isolation": {"tasks": 3},
}


def pooled(make: Callable[[], BaseModel]) -> PooledModel:
    return PooledModel.around(make(), RANK, SCALE)


def users_rows(model: PooledModel, seed: int = 3) -> ActiveRows:
    """Three users whose masks differ in size, in a pool without a zero."""
    generator = torch.Generator().manual_seed(seed)
    values = {m.section: 0.4 * torch.randn(RANK, m.width, generator=generator) for m in model.spec.modules}
    mask_ug = torch.rand(len(IDS), model.spec.units, generator=generator) < 0.5
    mask_ug[:, 0] = True
    return active_rows(values, model.spec, mask_ug)


def course_with(
    make: Callable[[], BaseModel], rule: str, tuner: Tuner | None = None, max_kib: int = 1024, **settings: object
) -> Course:
    model = pooled(make)
    tuning = Tuning("rows", tuner or Adam(0.05, STEPS), STEPS, EXAMPLES)
    config = ContinualConfig.model_validate({"rule": rule, "max_kib": max_kib, **RULES[rule], **settings})
    return course_of(model, users_rows(model), tuning, config)


def alone(course: Course, user: int) -> Course:
    """The course of one of its users."""
    active = course.active
    units = ActiveUnits(active.units.ids_ujk[user : user + 1], active.units.valid_ujk[user : user + 1])
    rows = {name: row[user : user + 1] for name, row in active.rows.items()}
    return replace(course, active=ActiveRows(active.spec, rows, units))


@dataclass(frozen=True)
class Stream:
    """Tasks of three users: the support part of each."""

    base: BaseModel
    parts: Sequence[Batch]

    @classmethod
    def of(cls, base: BaseModel, tasks: int, examples: int = 7) -> Stream:
        """Users who own different amounts: the last example of the first user is padding."""
        parts = [models.batch_for(base, len(IDS), examples, seed=20 + task) for task in range(tasks)]
        for part in parts:
            part.weight[0, -1] = 0.0
        return cls(base, parts)

    def task(self, index: int) -> InMemory:
        return InMemory(self.base, {"support": self.parts[index]})

    def changed(self, index: int, part: Batch) -> Stream:
        return replace(self, parts=[*self.parts[:index], part, *self.parts[index + 1 :]])


def taken(course: Course, stream: Stream, ids: np.ndarray = IDS, tasks: int | None = None) -> list[Standing]:
    """Where users stand before the first task, and after each."""
    standings = [begin(course)]
    for index in range(len(stream.parts) if tasks is None else tasks):
        standings.append(adapt_to(course, standings[-1], stream.task(index), ids, STREAMS.at("task", index)))
    return standings
