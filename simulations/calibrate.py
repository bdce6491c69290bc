"""How many users to train in one stacked computation: more share the overhead, until they leave the processor's cache.

The block size decides in which order sums are taken, so it is configuration, and choosing it is a step of its own: the
sizes 1, 2, 4, .. are timed on the work of one worker, in one process of one thread.
"""

from __future__ import annotations

import re
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

from client.round import RoundState
from federation.config import RunConfig
from federation.data.population import as_array
from federation.errors import ConfigError
from simulations.setup import first_pool, set_up
from simulations.work.worker import Broadcast, Worker, train_block

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
    cohort. Every size's rate is reported as it is found."""
    largest = max(1, config.federation.cohort // config.federation.shards)
    rates: list[Rate] = []
    for rate in _rates(config, largest):
        on_rate(rate)
        rates.append(rate)
        best = max(rates, key=lambda r: r.users_per_second)
        if len(rates) - 1 - rates.index(best) >= GIVE_UP_AFTER:
            break
    return best


def with_block(text: str, block: int) -> str:
    """An experiment's TOML with this block size under [compute]; all else, comments too, stays as it is."""
    line = f"block = {block}"
    found = re.search(r"^\[compute\][^\n]*\n(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        changed = f"{text.rstrip()}\n\n[compute]\n{line}\n"
    else:
        body, replaced = re.subn(r"^block\s*=[^\n#]*?(?=\s*(#|$))", line, found[1], count=1, flags=re.MULTILINE)
        body = body if replaced else f"{line}\n{body}"
        changed = text[: found.start(1)] + body + text[found.end(1) :]
    if tomllib.loads(changed)["compute"]["block"] != block:
        raise ConfigError("compute.block stands in this file in a form that is not replaced safely; set it by hand")
    return changed


def _rates(config: RunConfig, largest: int) -> Iterator[Rate]:
    worker = Worker(config)
    setup = set_up(config, worker.setup(config).model, first_pool(config, worker.population))
    state = setup.begin()
    round_index = config.gate.warmup + 1  # the first in which the gate chooses
    broadcast = Broadcast(RoundState(state.values, round_index, state.version), state.strategy)
    everyone = setup.record_layout.fresh(as_array(worker.population.users("train")[:largest]))
    size = 1
    while size <= len(everyone):
        block = everyone.take(slice(0, size))
        yield Rate(size, size / _seconds(partial(train_block, worker, setup, broadcast, block)))
        size *= 2


def _seconds(work: Callable[[], object]) -> float:
    """Median of several goes, the first not counted."""
    work()
    times: list[float] = []
    while len(times) < MIN_REPETITIONS or sum(times) < MIN_SECONDS:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return median(times)
