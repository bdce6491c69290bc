"""A federation that takes a second, and the checksum of what it ends with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from federation.config import RunConfig, load_config
from federation.data.registry import make_population
from server.checkpoint import checksum
from simulations.compute.workers import start_workers
from simulations.federate import RoundReport, federate, last_checkpoint
from simulations.setup import Setup, set_up, wrap

TINY = (
    "population.name=synthetic",
    "population.options={train_users=60, new_users=20, widths=[8, 12, 4], rank=8, budget=2, types=3, examples=16}",
    "pool={rank=8, scale=1.0}",
    "gate={budget=2, warmup=1, hidden=6, factors=4, embedding=3, samples=3}",
    "local={steps=2, examples=4, gain_examples=8, query_examples=4, learning_rate=0.05}",
    "federation={rounds=6, cohort=12, shards=3}",
    "compute={workers=0, block=4}",
    "evaluate={users=8, tuning_users=5, block=3, examples=4, gain_examples=8}",
    "evaluate.steps=[2, 4]",
    "evaluate.learning_rates=[0.01, 0.05]",
)


def tiny_config(*overrides: str) -> RunConfig:
    """A synthetic population of 60 training users, 6 rounds in this process; changed by overrides."""
    return load_config(overrides=[*TINY, *overrides])


def tiny_setup(config: RunConfig) -> Setup:
    """The fixed parts of a federation."""
    return set_up(config, wrap(config, make_population(config.population).base_model()))


def simulate(
    config: RunConfig,
    folder: Path,
    resume: bool = False,
    on_round: Callable[[RoundReport], None] = lambda report: None,
) -> str:
    """Runs a federation to its end, and returns the checksum of its last checkpoint."""
    users = make_population(config.population).users("train")
    workers = start_workers(config)
    try:
        federate(tiny_setup(config), workers, users, folder, resume, on_round)
    finally:
        workers.close()
    return checksum(last_checkpoint(folder))


class Interrupt(Exception):
    """What a test raises in the middle of a run."""


def interrupt_at(round_index: int) -> Callable[[RoundReport], None]:
    """An observer that raises `Interrupt` when a round has ended."""

    def observe(report: RoundReport) -> None:
        if report.round_index == round_index:
            raise Interrupt

    return observe
