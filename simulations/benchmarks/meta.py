"""What outer signals cost on W1's model and data: users per second and memory, by the number K of inner steps.

| side | what it is |
|---|---|
| delta, reptile, fomaml, maml | `client.meta`'s signals of one block of users, stacked |
| recomputed | exact MAML that holds one step's activations at a time |
| loop | exact MAML in plain PyTorch, one user after the other (`peers/maml.py`) |
| vmap | the same stacked by `torch.func` (`peers/maml.py`) |

All have the same users, masks, rows and examples, and take turns in one process of one thread, in the environment of a
worker; times are seconds of the processor. That exact MAML gives the same directions on all its sides is asserted
before anything is timed.

A peak is the most that PyTorch's allocator held at one time for the signal, by the allocator's own log: activations,
gradients and temporary results, without the model, the rows and the examples that lay there before. So it is the
same in every run, and owes nothing to how the system's allocator keeps memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.profiler import profile, record_function

from client.inner import Inner
from client.meta import SIGNALS, Lesson, maml
from federation.config import LocalConfig, MetaConfig
from federation.learner import ActiveUnits, learner_of
from federation.pool.spec import rows_of_mask
from federation.streams import Streams
from simulations.benchmarks.clock import one_thread
from simulations.benchmarks.gate import in_turns
from simulations.benchmarks.peers.maml import PlainMaml
from simulations.benchmarks.workloads import SEED, classes, task
from simulations.compute.environment import WORKER_ENVIRONMENT
from simulations.setup import wrap

WORKLOAD = "w1"
QUERY = 16
"""Examples of each user's query part."""
STEPS = (1, 5, 10, 20)
OWN = ("delta", "reptile", "fomaml", "maml", "recomputed")
PEERS = ("loop", "vmap")
"""Of the workload's own number of steps only."""

_SAME_USERS = 8
_MARK = "side "
_QUIET_PROFILER = {"KINETO_LOG_LEVEL": "6"}
"""Read when torch is imported: else each profile writes two lines to stderr."""


@dataclass(frozen=True)
class MetaBench:
    """What was measured.

    users: of the block. steps: the workload's own. by_steps: all that were measured. seconds: of each repetition, by
    `side_of`. peaks: bytes, of the sides in `OWN`. difference: see `agreement`.
    """

    users: int
    steps: int
    by_steps: Sequence[int]
    seconds: Mapping[str, Sequence[float]]
    peaks: Mapping[str, int]
    difference: float

    @property
    def line(self) -> dict[str, Any]:
        """What the command prints: the figures of the workload's own K, then by K.

        delta_rounds: the time of a signal in units of plain delta's. gradients: what it would be if each gradient took
        the same, see `gradients`.
        """
        here = {name: self.users_per_second(name, self.steps) for name in (*OWN, *PEERS)}
        outer = OWN[1:]
        return {
            "workload": WORKLOAD,
            "users": self.users,
            "steps": self.steps,
            **{f"{name}_users_per_second": rate for name, rate in here.items()},
            "speedup": round(here["maml"] / here["loop"], 2),
            "over_vmap": round(here["maml"] / here["vmap"], 2),
            "peak_mib": self.peak_mib("maml", self.steps),
            "recomputed_peak_mib": self.peak_mib("recomputed", self.steps),
            "max_relative_difference": self.difference,
            "by_steps": {
                "steps": list(self.by_steps),
                "users_per_second": {name: [self.users_per_second(name, k) for k in self.by_steps] for name in OWN},
                "peak_mib": {name: [self.peak_mib(name, k) for k in self.by_steps] for name in OWN},
                "delta_rounds": {name: [self.delta_rounds(name, k) for k in self.by_steps] for name in outer},
                "gradients": {name: [round(gradients(name, k) / k, 2) for k in self.by_steps] for name in outer},
            },
        }

    @property
    def details(self) -> dict[str, Any]:
        """What else the record holds."""
        config = task(WORKLOAD, self.users).workload.config
        return {
            "seed": SEED,
            "config": config.model_dump(mode="json", include={"pool", "gate", "local"}),
            "query_examples": QUERY,
            "processes": 1,
            "threads": 1,
            "seconds": {side: list(taken) for side, taken in self.seconds.items()},
            "peak_bytes": dict(self.peaks),
        }

    def users_per_second(self, name: str, steps: int) -> float:
        """The median."""
        return round(self.users / median(self.seconds[side_of(name, steps)]), 1)

    def peak_mib(self, name: str, steps: int) -> float:
        """Of the whole block."""
        return round(self.peaks[side_of(name, steps)] / 2**20, 1)

    def delta_rounds(self, name: str, steps: int) -> float:
        """The time of a signal in units of that of plain delta with as many steps; of medians."""
        taken, of_delta = (median(self.seconds[side_of(signal, steps)]) for signal in (name, "delta"))
        return round(taken / of_delta, 2)


def side_of(name: str, steps: int) -> str:
    """What the record calls a side with so many inner steps."""
    return f"{name}, K = {steps}"


def gradients(signal: str, steps: int) -> int:
    """What a signal costs, counted in gradients: one of a gradient counts two, a step that is done again one more."""
    counted = {
        "delta": steps,
        "reptile": steps + 1,
        "fomaml": steps + 1,
        "maml": 3 * steps + 1,
        "recomputed": 4 * steps + 1,
    }
    return counted[signal]


def measure(users: int, repetitions: int, steps: Iterable[int] = STEPS) -> MetaBench:
    """`measured_here` in a process with a worker's environment."""
    call = f"measured_here({users}, {repetitions}, {tuple(steps)})"
    code = (
        "import json; from dataclasses import asdict; from simulations.benchmarks.meta import measured_here; "
        f"print(json.dumps(asdict({call})))"
    )
    environment = {**os.environ, **WORKER_ENVIRONMENT, **_QUIET_PROFILER}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return MetaBench(**json.loads(done.stdout))


def measured_here(users: int, repetitions: int, steps: Iterable[int]) -> MetaBench:
    """Signals of a block of users with so many steps each, and with the workload's own."""
    own = task(WORKLOAD, users).workload.local.steps
    with one_thread():
        difference = agreement(min(users, _SAME_USERS))
        lessons = {k: lesson_of(users, k) for k in sorted({own, *steps})}
        sides = {side_of(name, k): work for k, lesson in lessons.items() for name, work in signals(lesson).items()}
        peaks = peak_bytes(sides)
        sides |= {side_of(name, own): work for name, work in peers(lessons[own]).items()}
        taken = in_turns(sides, repetitions)
    return MetaBench(users, own, list(lessons), taken, peaks, difference)


def lesson_of(users: int, steps: int) -> Lesson:
    """What the first users of the workload's round adapt on, and to what; they start at the pool's rows."""
    given = task(WORKLOAD, users)
    config = given.workload.config
    local = LocalConfig.model_validate({**config.local.model_dump(), "steps": steps, "query_examples": QUERY})
    model = wrap(config, given.workload.base())
    learner = learner_of(MetaConfig(), local, model)
    active = ActiveUnits(*rows_of_mask(given.mask_ug, len(given.spec.modules), config.gate.budget))
    inner = Inner(model, learner, active, model.features(given.data))
    query = classes(np.arange(users), QUERY, Streams(SEED, (WORKLOAD, "query")))
    return Lesson(inner, learner.copies(given.values, active), [given.data], steps, query, (steps,))


def signals(lesson: Lesson) -> dict[str, Callable[[], object]]:
    """The sides in `OWN`."""
    return {
        **{str(name): partial(signal, lesson) for name, signal in SIGNALS.items()},
        "recomputed": partial(maml, replace(lesson, recompute=True)),
    }


def peers(lesson: Lesson) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """The sides in `PEERS`: directions by section."""
    local = task(WORKLOAD, lesson.query.users).workload.local
    plain = PlainMaml.of(lesson.inner.model.spec, local.learning_rate, lesson.steps)
    given = lesson.copies, lesson.batches[0], lesson.query
    return {"loop": partial(plain.loop, *given), "vmap": partial(plain.vmapped, *given)}


def agreement(users: int) -> float:
    """How far directions of exact MAML lie from the loop's: the norm of a section's difference over the section's.

    The largest, of all sections and sides. Raises AssertionError where entries differ by more than rounding.
    """
    lesson = lesson_of(users, task(WORKLOAD, users).workload.local.steps)
    plain = peers(lesson)
    expected = plain["loop"]()
    found = [maml(lesson).directions, maml(replace(lesson, recompute=True)).directions, plain["vmap"]()]
    for directions in found:
        torch.testing.assert_close(dict(directions), dict(expected))
    differences = [(side[name] - loop).norm() / loop.norm() for side in found for name, loop in expected.items()]
    return float(torch.stack(differences).max())


def peak_bytes(sides: Mapping[str, Callable[[], object]]) -> dict[str, int]:
    """The most that PyTorch holds at one time of what each side makes, results included; see the head of this file."""
    with profile(use_cpu=True, profile_memory=True) as log:
        for number, work in enumerate(sides.values()):
            with record_function(f"{_MARK}{number}"):
                work()
    peaks, held = [0] * len(sides), 0
    for event in sorted(log.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name().startswith(_MARK):
            at, held = int(event.name().removeprefix(_MARK)), 0
        elif event.name() == "[memory]":
            held += event.nbytes()
            peaks[at] = max(peaks[at], held)
    return dict(zip(sides, peaks, strict=True))
