"""What an active unit costs in time: for `gate.reward.cost`, where units are priced by their latency.

A unit of a module adds two thin products to each forward pass. The difference between a pass with k units in that
module alone and one with 2k, in turns, is the cost of k units; the base model's own time cancels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from statistics import median

import numpy as np
import torch
from torch import Tensor

from federation.config import RunConfig
from federation.data.population import Batch
from federation.errors import RunError
from federation.pool.model import PooledModel
from simulations.compute.worker import Worker
from simulations.compute.workers import start_workers

PASSES = 31
"""Pairs of forward passes per module, of whose differences the median counts; odd, so that it is one of them."""

Clock = Callable[[Callable[[], object]], float]
"""Seconds that some work takes."""


def unit_seconds(config: RunConfig) -> dict[str, float]:
    """Seconds of one active unit of each module, by name, in the forward pass of one user's batch, on a worker.

    Raises RunError where a module's units are too fast to be measured.
    """
    workers = start_workers(config.model_copy(update={"compute": config.compute.model_copy(update={"workers": 1})}))
    try:
        ((_, _, found),) = workers.run(unit_seconds_job, [(config,)])
    finally:
        workers.close()
    return as_costs(found)


def unit_seconds_job(worker: Worker, config: RunConfig) -> tuple[None, dict[str, float]]:
    """Measured on a block of users with as many examples as a step sees."""
    setup = worker.setup(config)
    ids = np.asarray(worker.population.users("train")[: config.compute.block], dtype=np.int64)
    batch = worker.batch(ids, "support", config.local.examples, setup.streams.at("latency"))
    return None, measured(setup.model, batch, config.pool.rank, _clock_of(worker.device))


def measured(model: PooledModel, batch: Batch, units: int, clock: Clock) -> dict[str, float]:
    """Seconds of one unit for one user's examples, by module: from passes with `units` and with twice as many."""
    costs = {}
    for module in model.spec.modules:
        few, many = (_rows(model, batch.users, module.name, count) for count in (units, 2 * units))
        work = [_forward(model, rows, batch) for rows in (few, many)]
        for once in work:
            once()
        differences = [-clock(work[0]) + clock(work[1]) for _ in range(PASSES)]
        costs[module.name] = median(differences) / (units * batch.users)
    return costs


def as_costs(seconds: Mapping[str, float]) -> dict[str, float]:
    """The same, if they can be costs: above zero. Raises RunError."""
    if lost := [name for name, taken in seconds.items() if not taken > 0]:
        raise RunError(
            f"a unit's cost is the difference of two times, and must be above 0, that of {', '.join(lost)} is lost in "
            "their noise; let nothing else run, or set a larger compute.block or local.examples"
        )
    return dict(seconds)


def cost_setting(seconds: Mapping[str, float]) -> str:
    """A setting in TOML, for the [gate] section of an experiment.

    >>> cost_setting({"h.0.attn.c_attn": 1.2e-6})
    'reward.cost = { "h.0.attn.c_attn" = 1.2e-06 }'
    """
    each = ", ".join(f"{json.dumps(name)} = {taken:.3g}" for name, taken in seconds.items())
    return f"reward.cost = {{ {each} }}"


def _rows(model: PooledModel, users: int, module: str, units: int) -> dict[str, Tensor]:
    """Rows of so many units of one module, and of none of the others; what they hold does not matter."""
    return {m.section: torch.zeros(users, units if m.name == module else 0, m.width) for m in model.spec.modules}


def _clock_of(device: torch.device) -> Clock:
    """Seconds of the processor where that is what works: a worker has one thread, and others may run beside it."""
    now = time.process_time if device.type == "cpu" else time.perf_counter

    def clock(work: Callable[[], object]) -> float:
        started = now()
        work()
        return now() - started

    return clock


def _forward(model: PooledModel, rows: Mapping[str, Tensor], batch: Batch) -> Callable[[], object]:
    def work() -> list[float]:
        with torch.no_grad(), model.bound(rows):
            waited_for: list[float] = model.loss(batch).tolist()
        return waited_for

    return work
