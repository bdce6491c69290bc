"""A block of users who meet one task after the other, and what they are worth on every task after each. On workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from client.adapt import Adam, Tuner
from client.continual.course import Course, adapt_to, begin, bytes_of
from client.continual.rules import course_of
from client.personal import ActiveRows, Tuning, active_rows, known_of, learned_tuning, proposed_mask
from client.policies import Known
from federation.base import BaseModel
from federation.config import RunConfig
from federation.data.population import Batch, Examples, Part, Population, Sequenced, side_by_side
from federation.pool.model import PooledModel
from federation.pool.spec import Rows
from federation.qualities import Accuracy
from federation.rules import Stepped
from federation.streams import Streams, UserIds
from federation.update import Values
from simulations.compute.worker import Worker
from simulations.sequence_rules import META, CoursePlan
from simulations.serve import Trained
from simulations.setup import Setup
from simulations.statistics import Floats

STREAM = "sequence"


@dataclass(frozen=True)
class Walk:
    """What U users were worth by a plan, higher is better.

    quality_uti: after each task, or once for a reference, on every task: (U, T, N). before_ui: from the start.
    rise_uis: on each task while it was learned, after `watched_steps` steps. bytes_u: of what is kept beside the rows.
    diverged_u: whose steps on some task diverged, so that they kept what they had.
    """

    quality_uti: Floats
    before_ui: Floats
    rise_uis: Floats
    bytes_u: npt.NDArray[np.int64]
    diverged_u: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Together:
    """Several tasks as one: each draws as many examples, and the users see a random share of these."""

    tasks: Sequence[Examples]

    def batch(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> Batch:
        everything = side_by_side(
            [task.batch(user_ids, part, size, streams.at("of task", at)) for at, task in enumerate(self.tasks)]
        )
        if size is None:
            return everything
        among = everything.weight.shape[1]
        return everything.pick(torch.as_tensor(streams.distinct("together", user_ids, among, size)))


@dataclass(frozen=True)
class Exam:
    """The test parts of U users' N tasks. nats_per_bit_iu: in bits per character; None where accuracy is measured."""

    model: PooledModel
    tests: Sequence[Batch]
    nats_per_bit_iu: Sequence[Floats] | None

    def of(self, rows: Rows, index: int) -> Floats:
        """The users' quality on one task with these rows, (U,)."""
        test = self.tests[index]
        with torch.no_grad(), self.model.bound(rows):
            if self.nats_per_bit_iu is None:
                return _floats(self.model.quality(test, Accuracy()))
            return -_floats(self.model.loss(test)) / self.nats_per_bit_iu[index]

    def of_all(self, rows: Rows) -> Floats:
        """On every task, (U, N)."""
        return np.stack([self.of(rows, index) for index in range(len(self.tests))], 1)


@dataclass(frozen=True)
class Watched:
    """A tuner whose rows are shown, before a step is taken, after each of `steps` steps of a task."""

    tuner: Tuner
    steps: Sequence[int]
    first: int
    show: Callable[[Rows], None]

    def begin(self, start: Rows) -> Stepped:
        return self.tuner.begin(start)

    def step(self, start: Rows, now: Stepped, gradients: Sequence[Tensor], at: int) -> Stepped:
        if at - self.first in self.steps:
            self.show(now.rows)
        return self.tuner.step(start, now, gradients, at)

    def lasting(self, now: Stepped, at: int) -> tuple[Rows, int]:
        return self.tuner.lasting(now, at)


@dataclass(frozen=True)
class Classroom:
    """U users before their first task: by what their policy was told of it, which rows of their pool are theirs."""

    worker: Worker
    trained: Trained
    user_ids: UserIds
    setup: Setup
    values: Values
    known: Known
    active: ActiveRows
    exam: Exam

    @property
    def streams(self) -> Streams:
        return self.setup.streams.at(STREAM)


def walk_block(
    worker: Worker, trained: Trained, user_ids: UserIds, plans: Sequence[CoursePlan], tasks: int
) -> tuple[None, dict[CoursePlan, Walk]]:
    """Every plan's walk through the first `tasks` tasks of these users."""
    rooms = {pool: classroom(worker, trained, user_ids, pool, tasks) for pool in {plan.rule.pool for plan in plans}}
    return None, {plan: _WALKS.get(plan.rule.rule, _in_turn)(rooms[plan.rule.pool], plan) for plan in plans}


def measured_quality(config: RunConfig, base: BaseModel) -> str:
    """What is measured: "accuracy", or minus "bits" per character."""
    return "bits" if base.accuracy is None else config.evaluate.sequence.quality


def watched_steps(steps: int) -> tuple[int, ...]:
    """0, 1, 2, 4, 8, .. and `steps`."""
    return (0, *(2**power for power in range(steps.bit_length()) if 2**power < steps), steps)


def classroom(worker: Worker, trained: Trained, user_ids: UserIds, pool: str, tasks: int) -> Classroom:
    """The users with a federation's pool. Their policy, and f_init, are told of the first task alone."""
    setup, values = worker.setup(trained.configs.get(pool, trained.config)), trained.values[pool]
    gate, windows = setup.config.gate, trained.config.evaluate.gain_examples
    known = known_of(setup, values, worker.of_task(0), user_ids, windows, gate.budget)
    active = active_rows(values, setup.model.spec, proposed_mask(setup, known, user_ids, gate.policy))
    exam = _exam(worker, trained.config, setup, user_ids, tasks)
    return Classroom(worker, trained, user_ids, setup, values, known, active, exam)


def _exam(worker: Worker, config: RunConfig, setup: Setup, user_ids: UserIds, tasks: int) -> Exam:
    tests = [worker.of_task(at).batch(user_ids, "test", None, setup.streams) for at in range(tasks)]
    nats_per_bit_iu = None
    if measured_quality(config, setup.model.base) == "bits":
        nats_per_bit_iu = [math.log(2.0) * _chars_per_target(worker.population, at, user_ids) for at in range(tasks)]
    return Exam(setup.model, tests, nats_per_bit_iu)


def _chars_per_target(population: Population, index: int, user_ids: UserIds) -> Floats:
    """Of the test part of a task, (U,): the task's own where it says so, or the population's."""
    assert isinstance(population, Sequenced), population.name
    told = getattr(population.of_task(index), "chars_per_target", population.chars_per_target)
    return np.asarray(told(user_ids, "test"), dtype=np.float64)


def _course(room: Classroom, plan: CoursePlan, steps: int, tasks: int) -> Course:
    """How the users adapt to each of so many tasks, in so many steps."""
    config, setup = room.trained.config, room.setup
    examples = config.evaluate.sequence.examples
    if plan.rule.rule == META:
        tuning = learned_tuning(setup, room.values, room.known, room.active, steps, examples)
    else:
        tuning = Tuning("rows", Adam(plan.learning_rate, steps), steps, examples)
    return course_of(setup.model, room.active, tuning, plan.continual(setup.config.personal.continual, tasks))


def _in_turn(room: Classroom, plan: CoursePlan) -> Walk:
    """All tasks, one after the other."""
    steps, tasks = room.trained.config.evaluate.sequence.steps, len(room.exam.tests)
    course = _course(room, plan, steps, tasks)
    standing = begin(course)
    before_ui, after_tui, rise_uis, diverged_u = room.exam.of_all(standing.rows), [], [], standing.diverged_u
    for index in range(tasks):
        seen: list[Floats] = []
        shown = partial(_note, seen, room.exam, index)
        watched = Watched(course.tuning.tuner, watched_steps(steps)[:-1], standing.at, shown)
        taught = replace(course, tuning=replace(course.tuning, tuner=watched))
        streams = room.streams.at("task", index)
        standing = adapt_to(taught, standing, room.worker.of_task(index), room.user_ids, streams)
        after_tui.append(room.exam.of_all(standing.rows))
        rise_uis.append(np.stack([*seen, after_tui[-1][:, index]], 1))
        diverged_u = diverged_u | standing.diverged_u
    kept = bytes_of(standing.memory) + bytes_of(standing.tuner)
    return Walk(
        np.stack(after_tui, 1),
        before_ui,
        np.stack(rise_uis, 1),
        np.full(len(room.user_ids), kept),
        diverged_u.numpy(force=True),
    )


def _note(seen: list[Floats], exam: Exam, index: int, rows: Rows) -> None:
    seen.append(exam.of(rows, index))


def _alone(room: Classroom, plan: CoursePlan) -> Walk:
    """Each task by itself, from the start."""
    course = _course(room, plan, room.trained.config.evaluate.sequence.steps, 1)
    first, quality_iu, diverged_iu = begin(course), [], []
    for index in range(len(room.exam.tests)):
        own = room.worker.of_task(index)
        standing = adapt_to(course, first, own, room.user_ids, room.streams.at("task", index))
        quality_iu.append(room.exam.of(standing.rows, index))
        diverged_iu.append(standing.diverged_u)
    return _reference(room, first.rows, np.stack(quality_iu, 1), torch.stack(diverged_iu).any(0))


def _joint(room: Classroom, plan: CoursePlan) -> Walk:
    """All tasks at once, in as many steps as they take in turn."""
    tasks = len(room.exam.tests)
    course = _course(room, plan, tasks * room.trained.config.evaluate.sequence.steps, 1)
    everything = Together([room.worker.of_task(index) for index in range(tasks)])
    first = begin(course)
    standing = adapt_to(course, first, everything, room.user_ids, room.streams.at("joint"))
    return _reference(room, first.rows, room.exam.of_all(standing.rows), standing.diverged_u)


_WALKS: dict[str, Callable[[Classroom, CoursePlan], Walk]] = {"alone": _alone, "joint": _joint}


def _reference(room: Classroom, start: Rows, quality_ui: Floats, diverged_u: Tensor) -> Walk:
    before_ui = room.exam.of_all(start)
    nothing_u = np.zeros(len(room.user_ids), np.int64)
    rise_uis = np.stack([before_ui, quality_ui], 2)
    return Walk(quality_ui[:, None], before_ui, rise_uis, nothing_u, diverged_u.numpy(force=True))


def _floats(values_u: Tensor) -> Floats:
    return np.asarray(values_u.double().numpy(force=True))
