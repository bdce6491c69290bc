"""What registered users cost: rounds of one cohort size over 10^4, 10^5 and 10^6 of them, and memory over many rounds.

Each population has a process of its own that does a federation's whole work: a synthetic one with gate, trained rows,
user store and a checkpoint after each round. Nobody comes twice, so all stores do the same. They take turns, round by
round, so that a busy machine slows all alike.

Memory is what a process holds for itself, see `simulations.compute.memory`.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from federation.config import RunConfig
from federation.errors import ConfigError, RunError
from simulations.benchmarks.federations import Laps, settings, started, synthetic
from simulations.compute.memory import private_memory
from simulations.compute.worker import Worker

WARMUP = 2
"""Rounds that are not counted, of each population."""


@dataclass(frozen=True)
class PopulationCost:
    """Rounds over populations of several sizes.

    round_seconds, driver_mib: of each counted round, by registered users. The driver is the only process there.
    memory: over a longer federation with one Ray worker, of the largest population and cohorts of `memory_cohort`: MiB
    after each round, of "driver" and "worker".
    """

    config: RunConfig
    round_seconds: dict[int, list[float]]
    driver_mib: dict[int, list[float]]
    memory_cohort: int
    memory: dict[str, list[float]]

    @property
    def line(self) -> dict[str, Any]:
        """What the command prints: medians of seconds, memory after the last round."""
        return {
            "registered": list(self.round_seconds),
            "round_seconds": [round(median(seconds), 4) for seconds in self.round_seconds.values()],
            "driver_mib": [round(mib[-1], 1) for mib in self.driver_mib.values()],
            "mib_per_100_rounds": {who: round(100 * slope(mib), 2) for who, mib in self.memory.items()},
        }

    @property
    def details(self) -> dict[str, Any]:
        """What else the record holds."""
        return {
            **settings(self.config),
            "cohort": self.config.federation.cohort,
            "rounds": len(next(iter(self.round_seconds.values()))),
            "memory_cohort": self.memory_cohort,
            "memory_rounds": len(self.memory["driver"]),
            "all_round_seconds": list(self.round_seconds.values()),
            "all_driver_mib": list(self.driver_mib.values()),
            "memory": self.memory,
        }


def measure(registered: Sequence[int], cohort: int, rounds: int, memory_rounds: int) -> PopulationCost:
    """`rounds` counted rounds over each population, then `memory_rounds` of half the cohort.

    Raises ConfigError when users of the smallest would have to come twice: their store would do other work.
    """
    taking_part = cohort * (WARMUP + rounds)
    if taking_part > min(registered):
        raise ConfigError(
            f"nobody may come twice, so that all populations cost the same; {WARMUP + rounds} rounds of {cohort} users "
            f"need {taking_part:,}, the smallest has {min(registered):,}; lower --cohort or --rounds"
        )
    configs = {users: synthetic(users, cohort, WARMUP + rounds, workers=0) for users in registered}
    seconds: dict[int, list[float]] = {users: [] for users in registered}
    driver_mib: dict[int, list[float]] = {users: [] for users in registered}
    with _processes(configs) as connections:
        for index in range(WARMUP + rounds):
            for users, connection in connections.items():
                lap, mib = _next_round(connection, users)
                if index >= WARMUP:
                    seconds[users].append(lap)
                    driver_mib[users].append(mib)
    watched = synthetic(max(registered), max(cohort // 2, 1), memory_rounds, workers=1)
    return PopulationCost(configs[max(registered)], seconds, driver_mib, watched.federation.cohort, memory_of(watched))


def memory_of(config: RunConfig) -> dict[str, list[float]]:
    """MiB of this process and of the only worker after each round of a federation."""
    memory: dict[str, list[float]] = {"driver": [], "worker": []}
    with tempfile.TemporaryDirectory() as folder, started(config) as federation:

        def note(_: object) -> None:
            ((_, _, of_worker),) = federation.workers.run(_memory_of_worker, [()])
            memory["worker"].append(of_worker)
            memory["driver"].append(private_mib())

        federation.run(Path(folder), note)
    return memory


def slope(values: Sequence[float]) -> float:
    """By how much a value rises with each step, by least squares over the second half; the first half warms up."""
    settled = values[len(values) // 2 :]
    return float(np.polyfit(np.arange(len(settled)), settled, 1)[0])


def private_mib() -> float:
    """Private memory of this process in MiB. Raises RunError where the system does not tell it."""
    memory = private_memory()
    if not memory:
        raise RunError("private memory is read from /proc/self/statm, which is not there; measure it on Linux")
    return sum(memory.values())


def _memory_of_worker(worker: Worker) -> tuple[None, float]:
    return None, private_mib()


@contextmanager
def _processes(configs: dict[int, RunConfig]) -> Iterator[dict[int, Connection]]:
    """A process for each federation, which does its rounds one by one, when told."""
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    try:
        for users, config in configs.items():
            connections[users], theirs = context.Pipe()
            process = context.Process(target=_rounds_when_told, args=(theirs, config))
            process.start()
            processes.append(process)
            theirs.close()  # so that reading from a process that died ends
        yield connections
    finally:
        for connection in connections.values():
            connection.close()
        for process in processes:
            process.join()


def _rounds_when_told(connection: Connection, config: RunConfig) -> None:
    """Does a federation, each round when told; sends its seconds and the MiB after it. Ends when no one listens."""
    with tempfile.TemporaryDirectory() as folder, started(config) as federation:

        def tell(_: object) -> None:
            connection.send((laps.seconds[-1], private_mib()))
            connection.recv()

        laps = Laps(tell)
        try:
            connection.recv()
            federation.run(Path(folder), laps)
        except (EOFError, ConnectionError):
            return


def _next_round(connection: Connection, users: int) -> tuple[float, float]:
    try:
        connection.send("next round")
        lap, mib = connection.recv()
    except (EOFError, OSError) as error:
        raise RunError(f"the federation of {users} registered users ended early; its process said why above") from error
    return lap, mib
