"""A user's course on its device: a task at every personalisation, bytes in between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from client.continual.course import adapt_to, begin
from client.continual.kept import KeptCourse, course_from
from client.continual.rules import course_of
from client.personal import STREAM, ActiveRows, active_rows, task_mask, tuning_of
from client.policies import Known
from client.task import Task
from federation.config import TaskConfig
from federation.data.population import Examples
from federation.pool.spec import PoolSpec
from federation.streams import UserIds
from federation.update import Section, Values


def goes_on(config: TaskConfig) -> bool:
    """Whether personalising a user again is the next task of its course, not a beginning: there is a continual rule,
    or an update rule that was meta-trained over sequences of tasks."""
    return config.personal.continual.rule != "none" or (config.meta.learns and config.meta.tasks > 1)


def tuner_name(config: TaskConfig) -> str:
    """What users' rows step by, as `tuning_of` has it: "adam", or the update rule's name."""
    return config.meta.rule.name if config.meta.adapts else "adam"


def next_task(
    task: Task,
    values: Values,
    known: Known,
    kept: Mapping[str, Section],
    memory: bytes,
    examples: Examples,
    ids: UserIds,
    version: str,
) -> tuple[ActiveRows, KeptCourse]:
    """One user's rows in the pool of a version, and its course after the next task.

    kept, memory: what the user keeps and remembers of earlier tasks. Without a memory this is the first, by the mask
    that is proposed now; a course stays with its mask and its start. Where its steps were by another tuner, the task's
    counts anew.

    Raises StoreError when what is remembered is of another rule, pool or format, and as `course_of` and `adapt_to`.
    """
    spec = task.model.spec
    active = kept_active(values, spec, kept) if memory else active_rows(values, spec, task_mask(task, known, ids))
    tuning = tuning_of(task, values, known, active)
    earlier = course_from(memory, list(active.rows)) if memory else None
    start = tuning.start if earlier is None else earlier.start
    course = course_of(task.model, active, replace(tuning, start=start), task.config.personal.continual)
    tuner = tuner_name(task.config)
    now = begin(course) if earlier is None else earlier.of(course.rule, version).by(tuner).standing
    standing = adapt_to(course, now, examples, ids, task.streams.at(STREAM, "task", now.tasks))
    return active, KeptCourse(standing, start, course.rule.name, course.rule.version, version, tuner)


def kept_active(values: Values, spec: PoolSpec, kept: Mapping[str, Section]) -> ActiveRows:
    """A pool's rows of the units that one user keeps."""
    mask_jr = torch.zeros(len(spec.modules), spec.rank, dtype=torch.bool)
    for j, m in enumerate(spec.modules):
        mask_jr[j, kept[m.section].ids_uk[0].long()] = True
    return active_rows(values, spec, mask_jr.view(1, -1))


def course_on(
    memory: bytes, spec: PoolSpec, kept: Mapping[str, Section], values: Values, newer: Values, version: str
) -> bytes:
    """A user's course, moved from its pool to a newer one of the same shape. Raises StoreError as `course_from`."""
    if not memory:
        return b""
    before, after = (kept_active(pool, spec, kept).rows for pool in (values, newer))
    difference = {name: row - before[name] for name, row in after.items()}
    return course_from(memory, list(before)).moved(difference, version).to_bytes()
