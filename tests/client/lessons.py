"""Lessons of a few made-up users: masks of different sizes, padded examples, and values as if they had been trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from client.inner import Inner
from client.meta import Lesson
from client.task import Task
from federation.base import BaseModel
from federation.config import LocalConfig, TaskConfig
from federation.data.population import Batch, Part
from federation.errors import PopulationError
from federation.learner import ActiveUnits
from federation.pool.model import PooledModel
from federation.rules import Stepped
from federation.settings import parse
from federation.state import initial_values
from federation.streams import Streams, UserIds
from tests import models
from tests.populations import InMemory

MakeBase = Callable[[], BaseModel]
USERS, RANK, ROWS, STEPS, SCALE = 3, 4, 2, 3, 1.5


RANDOM: Mapping[str, Any] = {"policy": "random"}


def task_of(make: MakeBase, meta: Mapping[str, Any], gate: Mapping[str, Any] = RANDOM, **local: Any) -> Task:
    """A task with settings of `meta`, `gate` and `local`."""
    sizes = {"steps": STEPS, "learning_rate": 0.3, "examples": 3, "gain_examples": 4, "query_examples": 4}
    pool, gate = {"rank": RANK, "scale": SCALE}, {"budget": ROWS, **gate}
    config = parse(TaskConfig, {"pool": pool, "gate": gate, "local": {**sizes, **local}, "meta": meta})
    return Task(config, PooledModel.around(make(), RANK, SCALE))


def trained_values(task: Task, spread: float = 0.3) -> dict[str, Tensor]:
    """First values, and noise that puts everything to work."""
    generator = torch.Generator().manual_seed(2)
    first = initial_values(task.learner, task.gate, task.schema, task.config.gate, Streams(1))
    return {name: rows + spread * torch.randn(rows.shape, generator=generator) for name, rows in first.items()}


def active_units(modules: int) -> ActiveUnits:
    """Two units of each module, ascending; but user 1 has one of module 0, and user 2 none of module 1."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randperm(RANK, generator=generator)[:ROWS].sort().values for _ in range(USERS * modules)]
    ids_ujk = torch.stack(drawn).view(USERS, modules, ROWS)
    valid_ujk = torch.ones_like(ids_ujk, dtype=torch.bool)
    valid_ujk[1, 0, 1] = False
    valid_ujk[2, min(1, modules - 1)] = False
    return ActiveUnits(ids_ujk.masked_fill(~valid_ujk, 0), valid_ujk)


def lesson_of(make: MakeBase, meta: Mapping[str, Any], train: str = "both", **local: Any) -> Lesson:
    """A lesson of three users; of the first, one example of each step and one of the query part are padding.

    train: which factors step, as `LocalConfig` names them. Any of meta's query_steps will do.
    """
    settings_of_meta = dict(meta)
    query_steps = tuple(settings_of_meta.pop("query_steps", ()))
    task = task_of(make, settings_of_meta, **local)
    model, settings = task.model, task.config.local
    active = active_units(len(model.spec.modules))
    size = settings.examples
    support = models.batch_for(model.base, USERS, size * settings.different_batches, 1)
    query = models.batch_for(model.base, USERS, settings.query_examples, 2)
    support.weight[0, size - 1 :: size] = 0.0
    query.weight[0, 1] = 0.0
    return Lesson(
        Inner(model, task.learner, active, model.features(support), LocalConfig(train=train).factors(1)),
        task.learner.copies(trained_values(task), active),
        [support.window(i * size, (i + 1) * size) for i in range(settings.different_batches)],
        settings.steps,
        query,
        query_steps or (settings.steps,),
        task.config.meta.recompute,
    )


def steps_of(inner: Inner, copies: Mapping[str, Tensor], batches: Iterable[Batch]) -> Iterator[tuple[Stepped, Tensor]]:
    """The rows after each batch's step, of first order, and the loss before it."""
    start, parameters = inner.start(copies), inner.parameters(copies)
    now = inner.learner.rule.begin(start)
    for at, batch in enumerate(batches):
        now, loss_u = inner.first_order(parameters, start, now, batch, at)
        yield now, loss_u


def query_loss(lesson: Lesson, copies: Mapping[str, Tensor]) -> Tensor:
    """The query loss of users who start from these copies, mean over the steps that count: (U,). No graph."""
    inner = lesson.inner
    with torch.no_grad():
        start, parameters = inner.start(copies), inner.parameters(copies)
        trail = [inner.learner.rule.begin(start)]
        for at in range(lesson.steps):
            trail.append(inner.first_order(parameters, start, trail[-1], lesson.batch(at), at)[0])
        losses = []
        for at in lesson.query_steps:
            with inner.model.bound(trail[at].rows):
                losses.append(inner.model.loss(lesson.query))
    return torch.stack(losses).mean(0)


def only(batch: Batch, u: int) -> Batch:
    """User u's examples that are no padding: (1, n, ...)."""
    kept = batch.weight[u] > 0
    return Batch(batch.inputs[u][kept][None], batch.targets[u][kept][None], batch.weight[u][kept][None])


@dataclass(frozen=True)
class TaskByTask:
    """Users who meet a sequence of tasks, each in memory; drawn from as a whole, they have the first."""

    sequence: Sequence[InMemory]

    @property
    def tasks(self) -> int:
        return len(self.sequence)

    def batch(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> Batch:
        return self.sequence[0].batch(user_ids, part, size, streams)

    def of_task(self, index: int) -> InMemory:
        if index >= self.tasks:
            raise PopulationError(f"there are {self.tasks} tasks, got {index}")
        return self.sequence[index]
