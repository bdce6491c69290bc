"""How many users to train in one stacked computation: more share the overhead, until they leave the processor's cache.

The block size decides in which order sums are taken, so it is configuration, and choosing it is a step of its own: the
sizes 1, 2, 4, .. are timed on a worker as a run has them, with its one thread, its device and its allocator.
"""

from __future__ import annotations

import re
import time
import tomllib
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from statistics import median

from client.round import RoundState
from federation.config import RunConfig
from federation.data.population import as_array
from federation.errors import ConfigError, RunError
from simulations.compute.worker import Broadcast, Worker, out_of_memory, train_block
from simulations.compute.workers import start_workers
from simulations.setup import first_pool, set_up

MIN_SECONDS, MIN_REPETITIONS = 1.0, 3
GIVE_UP_AFTER = 2
"""Doublings without a better rate, after which no larger block is tried."""


@dataclass(frozen=True)
class Rate:
    """How fast blocks of one size are trained."""

    block: int
    users_per_second: float


def calibrate(config: RunConfig, on_rate: Callable[[Rate], None]) -> Rate:
    """The fastest block size for this configuration on this machine; blocks need not be larger than a shard's part of a
    cohort. Every size's rate is reported as it is found.

    Raises RunError when not even one user fits into memory.
    """
    largest = max(1, config.federation.cohort // config.federation.shards)
    rates: list[Rate] = []
    with closing(_rates(config, largest)) as measured:
        for rate in measured:
            on_rate(rate)
            rates.append(rate)
            best = max(rates, key=lambda r: r.users_per_second)
            if len(rates) - 1 - rates.index(best) >= GIVE_UP_AFTER:
                break
    if not rates:
        raise RunError("a block of one user must fit into memory, it does not; use a smaller model, or more memory")
    return best


def with_block(text: str, block: int) -> str:
    """An experiment's TOML with this block size under [compute]; all else, comments too, stays as it is.

    Raises ConfigError when it stands there in a form that is not replaced safely.
    """
    line = f"block = {block}"
    found = re.search(r"^\[compute\][^\n]*\n(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        changed = f"{text.rstrip()}\n\n[compute]\n{line}\n"
    else:
        body, replaced = re.subn(r"^block\s*=[^\n#]*?(?=\s*(#|$))", line, found[1], count=1, flags=re.MULTILINE)
        body = body if replaced else f"{line}\n{body}"
        changed = text[: found.start(1)] + body + text[found.end(1) :]
    try:
        before = tomllib.loads(text)
        done = tomllib.loads(changed) == {**before, "compute": {**before.get("compute", {}), "block": block}}
    except tomllib.TOMLDecodeError:
        done = False
    if not done:
        raise ConfigError(
            f"compute.block stands in this file in a form that is not replaced safely; set it to {block} by hand"
        )
    return changed


def seconds_of_block(worker: Worker, config: RunConfig, users: int) -> tuple[None, float | None]:
    """The time to train a block of so many users; None where there are not so many, or they do not fit into memory."""
    setup = set_up(config, worker.setup(config).model, first_pool(config, worker.population))
    state = setup.begin()
    round_index = config.gate.warmup + 1  # the first in which the gate chooses
    broadcast = Broadcast(RoundState(state.values, round_index, state.version), state.strategy)
    block = setup.record_layout.fresh(as_array(worker.population.users("train")[:users]))
    if len(block) < users:
        return None, None
    try:
        return None, _seconds(partial(train_block, worker, setup, broadcast, block))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None, None


def _rates(config: RunConfig, largest: int) -> Generator[Rate, None, None]:
    """Of the sizes 1, 2, 4, .. that there are users and memory for."""
    workers = start_workers(config.model_copy(update={"compute": config.compute.model_copy(update={"workers": 1})}))
    try:
        size = 1
        while size <= largest:
            ((_, _, seconds),) = workers.run(seconds_of_block, [(config, size)])
            if seconds is None:
                return
            yield Rate(size, size / seconds)
            size *= 2
    finally:
        workers.close()


def _seconds(work: Callable[[], object]) -> float:
    """Median of several goes, the first not counted."""
    work()
    times: list[float] = []
    while len(times) < MIN_REPETITIONS or sum(times) < MIN_SECONDS:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return median(times)
