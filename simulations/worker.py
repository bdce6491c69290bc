"""What one worker does: it owns the base model, loads it once, and works through chunks of a cohort.

A chunk is a shard's part of one cohort: the unit of work, of retry and of commit. Doing it again changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from client.round import RoundState, local_round, round_data
from client.state import join
from client.store import UserStore
from federation.config import RunConfig
from federation.data.population import Population
from federation.formats import quantise
from federation.streams import UserIds
from federation.update import UpdateBlock
from server.round import lift
from simulations.populations import make_population
from simulations.setup import Setup, set_up, wrap
from strategies.protocol import State


@dataclass(frozen=True)
class Broadcast:
    """What every chunk of a round needs: the round's values and the strategy's state."""

    state: RoundState
    strategy: State


@dataclass(frozen=True)
class ChunkReport:
    """What the driver learns of a chunk: counts and sums, nothing of a single user."""

    users: int
    rejected: dict[str, int]
    metric_sums: dict[str, float]


class Worker:
    """The population and base model of one process, and the federations it has been asked to work for."""

    def __init__(self, config: RunConfig) -> None:
        torch.set_num_threads(1)  # processes of one thread each beat threads, and give the same bits everywhere
        self.population: Population = make_population(config.population)
        self._model = wrap(config, self.population.base_model())
        self._setups: dict[str, Setup] = {}
        self._stores: dict[Path, UserStore] = {}

    def setup(self, config: RunConfig) -> Setup:
        """The fixed parts of a federation, made once."""
        key = config.model_dump_json()
        if key not in self._setups:
            self._setups[key] = set_up(config, self._model)
        return self._setups[key]

    def store(self, setup: Setup, folder: Path) -> UserStore:
        """The user store of a federation, opened once."""
        if folder not in self._stores:
            self._stores[folder] = UserStore(folder, setup.config.federation.shards, setup.record_layout)
        return self._stores[folder]

    def close(self) -> None:
        """Closes the user stores: LMDB lets a process open a shard once, so a later run could not."""
        for store in self._stores.values():
            store.close()


def run_chunk(
    worker: Worker, broadcast: Broadcast, config: RunConfig, store_folder: Path, user_ids: UserIds
) -> tuple[Any, ChunkReport]:
    """One shard's part of a cohort: users read, trained in blocks, lifted into one partial, written back."""
    setup = worker.setup(config)
    store = worker.store(setup, store_folder)
    round_index = broadcast.state.round_index
    streams = setup.streams.at("round", round_index)
    users = store.read(user_ids, before_round=round_index)
    partial, trained, reports = None, [], []
    for part in blocks(len(user_ids), config.compute.block):
        block = users.take(part)
        data = round_data(worker.population, block.ids, setup.local, streams)
        update, block = local_round(setup.model, broadcast.state, block, data, setup.local, streams)
        update = replace(update, sections=quantise(update.sections, setup.update_formats))
        lifted, rejections = lift(update, broadcast.strategy, setup.rules)
        partial = lifted if partial is None else setup.rules.strategy.merge(partial, lifted)
        trained.append(block)
        reports.append(_report(update, rejections.reasons))
    store.write(join(trained), round_index)
    return partial, merge_reports(reports)


def run_on_store(
    worker: Worker, config: RunConfig, store_folder: Path, action: Callable[[UserStore, int], None], round_index: int
) -> tuple[None, None]:
    """Compacts or rewinds the user store."""
    action(worker.store(worker.setup(config), store_folder), round_index)
    return None, None


def blocks(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size`."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def merge_reports(reports: list[ChunkReport]) -> ChunkReport:
    """Sums of the parts."""
    rejected: dict[str, int] = {}
    sums: dict[str, float] = {}
    for report in reports:
        for reason, count in report.rejected.items():
            rejected[reason] = rejected.get(reason, 0) + count
        for name, value in report.metric_sums.items():
            sums[name] = sums.get(name, 0.0) + value
    return ChunkReport(sum(r.users for r in reports), rejected, sums)


def _report(update: UpdateBlock, reasons: Mapping[int, str]) -> ChunkReport:
    """Counts of all users, sums over the admitted ones: a metric of a rejected user need not be a number."""
    admitted = torch.ones(len(update.weight_u), dtype=torch.bool)
    admitted[list(reasons)] = False
    sums = {name: float(values[admitted].double().sum()) for name, values in update.metrics.items()}
    return ChunkReport(len(admitted), dict(Counter(reasons.values())), sums)
