"""Continual rules that add to the loss: what mattered to earlier tasks should not move, or not be said differently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from client.continual.course import Memory, NextTask, bytes_of
from client.continual.fisher import fisher
from client.continual.kept import ANCHOR
from federation.base import BaseModel
from federation.continual_config import ContinualName
from federation.data.population import Batch
from federation.pool.model import PooledModel
from federation.pool.spec import Rows


@dataclass(frozen=True)
class Nothing:
    """Fine-tuning, one task after the other; and the base of rules that do one thing alone."""

    name: ClassVar[ContinualName] = "none"
    version: ClassVar[int] = 1

    def bytes_after(self, lesson: NextTask) -> int:
        return 0

    def batch(self, lesson: NextTask, batch: Batch) -> Batch:
        return batch

    def penalty(self, lesson: NextTask, rows: Rows, batch: Batch) -> Tensor:
        return torch.zeros(batch.users)

    def held(self, lesson: NextTask) -> Mapping[str, Tensor]:
        return {}

    def after(self, lesson: NextTask, rows: Rows) -> Memory:
        return {}


@dataclass(frozen=True)
class Ewc(Nothing):
    """Elastic weight consolidation (Kirkpatrick et al., 2017, eq. 3): for each earlier task t

        strength / 2 * sum_i fisher_ti (row_i - anchor_ti)^2

    with the Fisher and the rows that the task ended with. The memory grows with every task.
    """

    name: ClassVar[ContinualName] = "ewc"
    strength: float = 1.0

    def bytes_after(self, lesson: NextTask) -> int:
        return bytes_of(lesson.before.memory) + 2 * bytes_of(lesson.before.rows)

    def penalty(self, lesson: NextTask, rows: Rows, batch: Batch) -> Tensor:
        memory = lesson.before.memory
        tasks = range(_tasks(memory, rows))
        return sum(
            (_pull(self.strength, rows, *_remembered(memory, rows, f" {task}")) for task in tasks),
            start=torch.zeros(batch.users),
        )

    def after(self, lesson: NextTask, rows: Rows) -> Memory:
        memory = lesson.before.memory
        return {**memory, **_importance(lesson, rows, f" {_tasks(memory, rows)}")}


@dataclass(frozen=True)
class OnlineEwc(Nothing):
    """Online EWC (Schwarz et al., 2018, eq. 8 and 9): one Fisher, fisher + (1 - forget) * the one before, and the
    rows that the latest task ended with."""

    name: ClassVar[ContinualName] = "online_ewc"
    strength: float = 1.0
    forget: float = 0.1

    def bytes_after(self, lesson: NextTask) -> int:
        return 2 * bytes_of(lesson.before.rows)

    def penalty(self, lesson: NextTask, rows: Rows, batch: Batch) -> Tensor:
        if not lesson.before.memory:
            return torch.zeros(batch.users)
        return _pull(self.strength, rows, *_remembered(lesson.before.memory, rows))

    def after(self, lesson: NextTask, rows: Rows) -> Memory:
        memory, found = lesson.before.memory, _importance(lesson, rows)
        earlier = {name: (1 - self.forget) * memory[name] for name in memory if not name.startswith(ANCHOR)}
        return {name: value + earlier[name] if name in earlier else value for name, value in found.items()}


TEMPERATURE = 2.0
"""Of soft targets, as Li & Hoiem choose it."""


@dataclass(frozen=True)
class Lwf(Nothing):
    """Learning without forgetting (Li & Hoiem, 2017, eq. 2): strength times the cross-entropy, on the examples of this
    task, to the soft targets of the model as it was before this task. Only that there were tasks is remembered."""

    name: ClassVar[ContinualName] = "lwf"
    strength: float = 1.0

    def bytes_after(self, lesson: NextTask) -> int:
        return 1

    def penalty(self, lesson: NextTask, rows: Rows, batch: Batch) -> Tensor:
        if not lesson.before.memory:
            return torch.zeros(batch.users)
        model = lesson.course.model
        likeness_u = model.quality(batch, LikeBefore(model, lesson.before.rows))
        return -self.strength * likeness_u * lesson.before.memory["learned"]

    def after(self, lesson: NextTask, rows: Rows) -> Memory:
        return {"learned": torch.ones(len(lesson.user_ids), dtype=torch.bool)}


@dataclass(frozen=True)
class LikeBefore:
    """The quality of what is bound: minus the cross-entropy to the soft targets of other rows, mean over targets."""

    model: PooledModel
    teacher: Rows

    differentiable = True

    def measure(self, base: BaseModel, inputs: Tensor, targets: Tensor) -> Tensor:
        assert base.log_probs is not None, f"{base.name!r} does not classify: see continual_rule_of"
        with torch.no_grad(), self.model.bound(self.teacher):
            soft = (base.log_probs(base.module, inputs) / TEMPERATURE).softmax(-1)
        likeness = soft * (base.log_probs(base.module, inputs) / TEMPERATURE).log_softmax(-1)
        return likeness.sum(-1).flatten(1).mean(1) if likeness.dim() > 2 else likeness.sum(-1)


def _importance(lesson: NextTask, rows: Rows, task: str = "") -> dict[str, Tensor]:
    """The Fisher and the anchor of a task that has ended."""
    found = fisher(lesson.course.model, lesson.course.active, rows, lesson.support)
    fishers = {f"fisher{task} {name}": value for name, value in found.items()}
    return {**fishers, **{f"{ANCHOR}{task} {name}": row.detach() for name, row in rows.items()}}


def _remembered(memory: Memory, rows: Rows, task: str = "") -> tuple[Rows, Rows]:
    """The Fisher and the anchor, by section."""
    fishers = {name: memory[f"fisher{task} {name}"] for name in rows}
    return fishers, {name: memory[f"{ANCHOR}{task} {name}"] for name in rows}


def _pull(strength: float, rows: Rows, fishers: Rows, anchors: Rows) -> Tensor:
    """strength / 2 * sum of fisher * (row - anchor)^2: (U,)."""
    parts = [(fishers[name] * (row - anchors[name]).square()).flatten(1).sum(1) for name, row in rows.items()]
    return 0.5 * strength * torch.stack(parts).sum(0)


def _tasks(memory: Memory, rows: Rows) -> int:
    """How many tasks EWC remembers."""
    return len(memory) // (2 * len(rows))
