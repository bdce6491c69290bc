"""Continual adaptation: U users adapt to one task after the other, and a rule says what they keep of those before.

    standing = begin(course)
    for index in range(tasks):
        standing = adapt_to(course, standing, of_task(index), user_ids, streams.at("task", index))

A rule acts on a task's steps in three ways, and may use all: it adds examples, adds to the loss, and holds rows fast.
Users do not see one another: a block of users has what each would have alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from client.personal import ActiveRows, Tuning
from federation.continual_config import ContinualName
from federation.data.population import Batch, Examples
from federation.errors import ConfigError
from federation.pool.model import PooledModel
from federation.pool.spec import Rows
from federation.rules import Stepped
from federation.streams import Streams, UserIds

Memory = Mapping[str, Tensor]
"""What a rule remembers of U users, all with the leading axis U; nothing before the first task."""


@dataclass(frozen=True)
class Course:
    """How U users adapt, task after task.

    active: the pool's rows of their masks, which stay. tuning: of "rows", its steps are those of one task.
    most_bytes: largest memory of a user.
    """

    model: PooledModel
    active: ActiveRows
    tuning: Tuning
    rule: ContinualRule
    most_bytes: int


@dataclass(frozen=True)
class Standing:
    """Where U users stand between two tasks.

    tasks: that they came through. at: steps that the tuner counts. rows: as they serve now, (U, k, d_in + d_out).
    tuner: what it remembers beyond a task. memory: of the rule. diverged_u: (U,) bool, whose last task diverged: they
    have all that they had before it, as have users without support examples.
    """

    tasks: int
    at: int
    rows: Rows
    tuner: Rows
    memory: Memory
    diverged_u: Tensor


@dataclass(frozen=True)
class NextTask:
    """One task of U users. before: what they knew when it began. support: all their examples of it."""

    course: Course
    before: Standing
    support: Batch
    user_ids: UserIds
    streams: Streams


class ContinualRule(Protocol):
    """name: as in the configuration. version: of what it remembers; a memory of another version is not read."""

    @property
    def name(self) -> ContinualName: ...

    @property
    def version(self) -> int: ...

    def bytes_after(self, lesson: NextTask) -> int:
        """Bytes of a user's memory when this task has ended."""
        ...

    def batch(self, lesson: NextTask, batch: Batch) -> Batch:
        """What a step sees that was to see these examples of the task."""
        ...

    def penalty(self, lesson: NextTask, rows: Rows, batch: Batch) -> Tensor:
        """What is added to each user's loss: (U,). `rows` are bound to the model meanwhile."""
        ...

    def held(self, lesson: NextTask) -> Mapping[str, Tensor]:
        """Which rows stay as they are: {section: (U, k, 1) bool}; all sections, or nothing."""
        ...

    def after(self, lesson: NextTask, rows: Rows) -> Memory:
        """The memory when the task has ended with these rows."""
        ...


def begin(course: Course) -> Standing:
    """Before the first task."""
    assert course.tuning.kept == "rows", "a course is of rows"
    start = course.tuning.start or course.active.rows
    nobody_u = torch.zeros(len(course.active.units.ids_ujk), dtype=torch.bool)
    return Standing(0, 0, {name: row.detach() for name, row in start.items()}, {}, {}, nobody_u)


def adapt_to(course: Course, now: Standing, examples: Examples, user_ids: UserIds, streams: Streams) -> Standing:
    """One task: the tuning's steps on the users' support part, after which the rule takes note.

    Tasks of one course need streams of their own. A user without support examples, or whose rows or memory do not
    stay finite, keeps what it had.

    Raises ConfigError, before the first step, when the rule would need more than `most_bytes`.
    """
    support = examples.batch(user_ids, "support", None, streams)
    lesson = NextTask(course, now, support, user_ids, streams)
    _check_bytes(lesson)
    stepped, at = _steps(lesson, examples)
    finite_u = _finite(stepped.rows)
    present_u = support.weight.sum(1) > 0
    tuner, at = course.tuning.tuner.lasting(stepped, at)
    memory = course.rule.after(lesson, stepped.rows) if (present_u & finite_u).any() else now.memory
    if memory:
        finite_u = finite_u & _finite(memory)
    taught_u = present_u & finite_u
    return Standing(
        tasks=now.tasks + 1,
        at=at,
        rows=_where(taught_u, stepped.rows, now.rows),
        tuner=_where(taught_u, tuner, now.tuner),
        memory=_where(taught_u, memory, now.memory),
        diverged_u=present_u & ~finite_u,
    )


def bytes_of(memory: Memory) -> int:
    """Bytes that each user's tensors take: the same for all users of a block."""
    return sum(tensor[0].numel() * tensor.element_size() for tensor in memory.values())


def _steps(lesson: NextTask, examples: Examples) -> tuple[Stepped, int]:
    """The rows after the task's steps, and how many steps the tuner counts."""
    course, before, tuning = lesson.course, lesson.before, lesson.course.tuning
    start, held = tuning.start or course.active.rows, course.rule.held(lesson)
    now = tuning.tuner.begin(before.rows)
    now = Stepped(now.rows, {**now.memory, **before.tuner})
    for step in range(tuning.steps):
        batch = examples.batch(lesson.user_ids, "support", tuning.examples, lesson.streams.at("tune", step))
        now = tuning.tuner.step(start, now, _gradients(lesson, now.rows, batch), before.at + step)
        if held:
            rows = {name: torch.where(held[name], before.rows[name], row) for name, row in now.rows.items()}
            now = Stepped(rows, now.memory)
    return now, before.at + tuning.steps


def _gradients(lesson: NextTask, rows: Rows, batch: Batch) -> list[Tensor]:
    model, rule = lesson.course.model, lesson.course.rule
    leaves = {name: row.detach().requires_grad_() for name, row in rows.items()}
    with torch.enable_grad(), model.bound(leaves):
        loss_u = model.loss(rule.batch(lesson, batch)) + rule.penalty(lesson, leaves, batch)
    return list(torch.autograd.grad(loss_u.sum(), list(leaves.values())))


def _check_bytes(lesson: NextTask) -> None:
    rule, most = lesson.course.rule, lesson.course.most_bytes
    needed = rule.bytes_after(lesson)
    if needed > most:
        raise ConfigError(
            f"a user's memory is at most personal.continual.max_kib ({most / 1024:g} KiB), the rule {rule.name!r} "
            f"needs {needed} bytes after task {lesson.before.tasks + 1}; raise it, or take another rule, fewer active "
            "units or fewer examples, where the federation is set up; on a device, have the user begin anew with "
            "`fedquilt ask begin-anew`. What users had is as it was"
        )


def _finite(tensors: Mapping[str, Tensor]) -> Tensor:
    """Users all of whose numbers are, (U,) bool."""
    return torch.stack([t.isfinite().reshape(len(t), -1).all(1) for t in tensors.values()]).all(0)


def _where(new_u: Tensor, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The new tensors of some users, the old ones of the others: zero where there was none."""
    return {
        name: torch.where(new_u.view(-1, *[1] * (tensor.dim() - 1)), tensor, old.get(name, torch.zeros_like(tensor)))
        for name, tensor in new.items()
    }
