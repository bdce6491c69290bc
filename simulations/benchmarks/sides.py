"""The sides that run on the product's own workers: the engine in its precisions, and the plain loop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from client.round import RoundState
from federation.config import RunConfig
from federation.data.registry import make_population
from server.round import ServerState, begin, close
from simulations.benchmarks.peers.naive import add, naive_job
from simulations.benchmarks.workloads import PROCESSES, ROUND, Task
from simulations.compute.worker import Broadcast, Worker, train_users
from simulations.compute.workers import Workers
from simulations.setup import Setup, set_up, wrap

Means = Mapping[str, Tensor]
"""Mean difference of each row over the users that train it, (R, d_in + d_out) by section."""


class Side(Protocol):
    """Something that can do the round of a task, for the first `users` of its users."""

    @property
    def users(self) -> int: ...

    def warm_up(self) -> Means:
        """The first round, which is not counted: what it aggregated."""
        ...

    def round(self) -> float:
        """The round again, in seconds."""
        ...


@dataclass(frozen=True)
class Engine:
    """The product's round without the user store: share, `train_users` on each worker, fold, close."""

    workers: Workers
    config: RunConfig
    given: Task

    @property
    def users(self) -> int:
        return self.given.users

    def warm_up(self) -> Means:
        setup, state = self._begin()
        step, _ = setup.rules.strategy.finish(self._partial(setup, state), state.strategy)
        return {name: section.mean for name, section in step.sections.items()}

    def round(self) -> float:
        setup, state = self._begin()
        started = time.perf_counter()
        close(state, self._partial(setup, state), setup.rules)
        return time.perf_counter() - started

    def _begin(self) -> tuple[Setup, ServerState]:
        setup = setup_of(self.config.model_dump_json())
        return setup, begin(setup.rules, dict(self.given.values))

    def _partial(self, setup: Setup, state: ServerState) -> Any:
        broadcast = Broadcast(RoundState(state.values, ROUND, "benchmark"), state.strategy)
        shared, config = self.workers.share(broadcast), self.config.model_dump_json()
        jobs = [(shared, config, part) for part in shares(self.given.users)]
        finished = {position: partial for position, partial, _ in self.workers.run(engine_job, jobs)}
        return self.workers.fold([finished[position] for position in range(len(jobs))], setup.rules.strategy.merge)


def engine_job(worker: Worker, broadcast: Broadcast, config_json: str, part: range) -> tuple[Any, None]:
    """A worker's share of an engine's round: what `run_chunk` does between reading users and writing them."""
    setup = setup_of(config_json)
    users = setup.record_layout.fresh(np.arange(part.start, part.stop))
    partial, _, _ = train_users(worker, setup, broadcast, users)
    return partial, None


@dataclass(frozen=True)
class Naive:
    """The plain loop of `simulations/benchmarks/peers/naive.py`."""

    workers: Workers
    given: Task

    @property
    def users(self) -> int:
        return self.given.users

    def warm_up(self) -> Means:
        return self._means()

    def round(self) -> float:
        started = time.perf_counter()
        self._means()
        return time.perf_counter() - started

    def _means(self) -> Means:
        jobs = [(self.given.workload.name, self.given.users, part) for part in shares(self.given.users)]
        return self.given.row_means(self.workers.fold([sums for _, sums, _ in self.workers.run(naive_job, jobs)], add))


def shares(users: int) -> list[range]:
    """The users by process."""
    return [range(users * p // PROCESSES, users * (p + 1) // PROCESSES) for p in range(PROCESSES)]


@cache
def setup_of(config_json: str) -> Setup:
    """The fixed parts of a configuration, with a model of its own: a precision changes the base, see `in_precision`."""
    config = RunConfig.model_validate_json(config_json)
    return set_up(config, wrap(config, make_population(config.population).base_model()))
