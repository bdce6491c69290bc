"""Federations to be timed: the run loop of `fedquilt simulate`, from the cohort to the checkpoint, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation.config import RunConfig, load_config
from federation.data.registry import make_population
from federation.streams import UserIds
from server.checkpoint import checksum
from simulations.compute.workers import Workers, start_workers
from simulations.federate import RoundReport, federate, last_checkpoint
from simulations.setup import Setup, first_pool, set_up, wrap

_SYNTHETIC = Path(__file__).parents[1] / "experiments" / "synthetic.toml"


def synthetic(registered: int, cohort: int, rounds: int, workers: int) -> RunConfig:
    """The synthetic experiment with rows trained too, everyone once in an epoch, and a checkpoint after every round."""
    return load_config(
        _SYNTHETIC,
        [
            f"population.options.train_users={registered}",
            "local.train=both",
            "local.learning_rate=0.05",
            f"federation.cohort={cohort}",
            f"federation.rounds={rounds}",
            "federation.sampling=epochs",
            "federation.checkpoint_every=1",
            f"compute.workers={workers}",
        ],
    )


def settings(config: RunConfig) -> dict[str, Any]:
    """What a record says of the federation that was timed. Nothing was evaluated."""
    return {"seed": config.seed, "config": config.model_dump(mode="json", exclude={"evaluate"})}


@dataclass(frozen=True)
class Federation:
    """A federation and the workers that wait for it."""

    setup: Setup
    workers: Workers
    train_users: range | UserIds

    def run(self, folder: Path, on_round: Callable[[RoundReport], None]) -> str:
        """All rounds, in an empty folder. Returns the checksum of what it ends with."""
        federate(self.setup, self.workers, self.train_users, folder, False, on_round)
        return checksum(last_checkpoint(folder))


@contextmanager
def started(config: RunConfig) -> Iterator[Federation]:
    """A federation whose workers end with the context."""
    population = make_population(config.population)
    setup = set_up(config, wrap(config, population.base_model()), first_pool(config, population))
    workers = start_workers(config)
    try:
        yield Federation(setup, workers, population.users("train"))
    finally:
        workers.close()


class Laps:
    """An observer of rounds that takes their times, a round's checkpoint included.

    seconds: of each round so far. between: what is done after each round, off the clock.
    """

    def __init__(self, between: Callable[[RoundReport], None] = lambda report: None) -> None:
        self.seconds: list[float] = []
        self._between = between
        self._started = time.perf_counter()

    def __call__(self, report: RoundReport) -> None:
        self.seconds.append(time.perf_counter() - self._started)
        self._between(report)
        self._started = time.perf_counter()
