"""What one worker does: it owns the base model, loads it once, and works through chunks of a cohort.

A job is a module-level function `job(worker, *args) -> (result, report)`. The jobs of a round are chunks: a chunk is a
shard's part of one cohort, the unit of work, of retry and of commit. Doing it again changes nothing.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from client.round import RoundState, local_round, round_data
from client.state import UserBlock, join
from client.store import UserStore, mended
from federation.config import RunConfig
from federation.data.population import Batch, Part, Population
from federation.data.registry import make_population
from federation.data.source import OnDevice
from federation.devices import CPU, making_tensors_on, moved
from federation.errors import RunError
from federation.formats import quantise
from federation.streams import Streams, UserIds
from federation.update import UpdateBlock
from server.round import lift
from simulations.compute.memory import Memory, largest, private_memory
from simulations.setup import Setup, set_up, wrap
from strategies.protocol import State

Job = Callable[..., tuple[Any, Any]]
T = TypeVar("T")

_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


@dataclass(frozen=True)
class Broadcast:
    """What every chunk of a round needs: the round's values and the strategy's state."""

    state: RoundState
    strategy: State


@dataclass(frozen=True)
class ChunkReport:
    """What the driver learns of a chunk: counts and sums, nothing of a single user; and the memory that it took.

    rebuilt: the shards that were found damaged and set aside: their users' states begin anew, so the bits are others.
    halved_blocks: how many blocks were of half the size, for want of memory: then sums are taken in another order.
    """

    users: int
    rejected: dict[str, int]
    metric_sums: dict[str, float]
    memory: Memory
    rebuilt: tuple[int, ...] = ()
    halved_blocks: int = 0


class Worker:
    """The population and base model of one process, and the federations it has been asked to work for.

    device: where the base model is; jobs find their tensors there (`perform`).
    Raises RunError when torch cannot use the device.
    """

    def __init__(self, config: RunConfig) -> None:
        torch.set_num_threads(1)  # processes of one thread each beat threads, and give the same bits everywhere
        self.device = torch.device(config.compute.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise RunError(
                f"compute.device = 'cuda' needs a torch that can use a GPU, {platform.node()} has torch "
                f"{torch.__version__} and finds none; install a CUDA build there, or set it to 'cpu'"
            )
        self.population: Population = make_population(config.population)
        self._source = OnDevice(self.population, self.device)
        base = self.population.base_model()
        base.module.to(self.device)
        self._model = wrap(config, base)
        self._setups: dict[str, Setup] = {}
        self._stores: dict[Path, UserStore] = {}
        self._fitting: dict[str, int] = {}

    def setup(self, config: RunConfig) -> Setup:
        """The fixed parts of a federation, made once."""
        key = config.model_dump_json()
        if key not in self._setups:
            self._setups[key] = set_up(config, self._model)
        return self._setups[key]

    def batch(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> Batch:
        """As of a population, on the worker's device."""
        return self._source.batch(user_ids, part, size, streams)

    @property
    def tasks(self) -> int:
        """As of `OnDevice`."""
        return self._source.tasks

    def of_task(self, index: int) -> OnDevice:
        """As of `OnDevice`."""
        return self._source.of_task(index)

    def store(self, setup: Setup, folder: Path) -> UserStore:
        """The user store of a federation, opened once."""
        if folder not in self._stores:
            self._stores[folder] = UserStore(folder, setup.config.federation.shards, setup.record_layout)
        return self._stores[folder]

    def block_users(self, config: RunConfig) -> int:
        """How many users of a federation are trained together: as configured, or as many as were found to fit."""
        return self._fitting.get(config.model_dump_json(), config.compute.block)

    def keep_block_users(self, config: RunConfig, users: int) -> None:
        """Notes how many fit, so that memory runs out in one chunk and not in each."""
        self._fitting[config.model_dump_json()] = users

    def close(self) -> None:
        """Closes the user stores: LMDB lets a process open a shard once, so a later run could not."""
        for store in self._stores.values():
            store.close()


def perform(worker: Worker, job: Job, *arguments: Any) -> tuple[Any, Any]:
    """Does a job on the worker's device: its arguments go there, new tensors are made there, its results come back."""
    with making_tensors_on(worker.device):
        return moved(job(worker, *moved(arguments, worker.device)), CPU)


def run_chunk(
    worker: Worker, broadcast: Broadcast, config: RunConfig, store_folder: Path, user_ids: UserIds
) -> tuple[Any, ChunkReport]:
    """One shard's part of a cohort: users read, trained in blocks, lifted into one partial, written back."""
    setup = worker.setup(config)
    store = worker.store(setup, store_folder)
    round_index = broadcast.state.round_index
    users, lost = mended(store, lambda: store.read(user_ids, before_round=round_index))
    partial, trained, report = train_users(worker, setup, broadcast, users)
    _, lost_later = mended(store, lambda: store.write(trained, round_index))
    return partial, replace(report, rebuilt=_united(lost, lost_later))


def train_users(
    worker: Worker, setup: Setup, broadcast: Broadcast, users: UserBlock
) -> tuple[Any, UserBlock, ChunkReport]:
    """All of the users, in blocks: their updates as one partial, and their new state."""
    partial, trained, reports = None, [], []
    most, fitting = setup.config.compute.block, worker.block_users(setup.config)

    def train(part: slice) -> tuple[Any, UserBlock, ChunkReport]:
        return train_block(worker, setup, broadcast, users.take(part))

    for (lifted, block, report), size in halving_blocks(train, len(users), fitting, max(1, most // 2)):
        partial = lifted if partial is None else setup.rules.strategy.merge(partial, lifted)
        trained.append(block)
        reports.append(replace(report, halved_blocks=int(size < most)))
        if size < fitting:
            worker.keep_block_users(setup.config, size)
    return partial, join(trained), merge_reports(reports)


def train_block(
    worker: Worker, setup: Setup, broadcast: Broadcast, block: UserBlock
) -> tuple[Any, UserBlock, ChunkReport]:
    """The users' updates as a partial, on the worker's device, and their new state, on the CPU."""
    streams = setup.streams.at("round", broadcast.state.round_index)
    data = round_data(worker, block.ids, setup.local, streams)
    update, block = local_round(setup.model, broadcast.state, moved(block, worker.device), data, setup.local, streams)
    update = replace(update, sections=quantise(update.sections, setup.update_formats))
    lifted, rejections = lift(update, broadcast.strategy, setup.rules)
    return lifted, moved(block, CPU), _report(update, rejections.reasons)


def run_on_store(
    worker: Worker, config: RunConfig, store_folder: Path, action: Callable[[UserStore, int], None], round_index: int
) -> tuple[None, tuple[int, ...]]:
    """Compacts or rewinds the user store. Reports the shards that were set aside."""
    store = worker.store(worker.setup(config), store_folder)
    return None, mended(store, lambda: action(store, round_index))[1]


def blocks(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size`."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def halving_blocks(work: Callable[[slice], T], count: int, size: int, least: int) -> Iterator[tuple[T, int]]:
    """`work` on consecutive slices of at most `size`, and the size by then.

    Where memory runs out, what is left is done in slices of half the size. Raises RunError where it runs out in slices
    of `least`.
    """
    start = 0
    while start < count:
        part = slice(start, min(start + size, count))
        try:
            done = work(part)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if size <= least:
                raise RunError(
                    f"a block of users must fit into memory, one of {part.stop - start} does not ({error}); "
                    "lower compute.block in a new run, or compute.workers and resume"
                ) from error
            size = max(size // 2, least)
        else:
            yield done, size
            start = part.stop


def out_of_memory(error: Exception) -> bool:
    """Whether an allocator said so: of a GPU (a type of its own), of torch on the CPU (only words), or of Python."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in said for word in _OUT_OF_MEMORY)


def merge_reports(reports: list[ChunkReport]) -> ChunkReport:
    """Sums of the parts, and the most memory of each process."""
    rejected: dict[str, int] = {}
    sums: dict[str, float] = {}
    for report in reports:
        for reason, count in report.rejected.items():
            rejected[reason] = rejected.get(reason, 0) + count
        for name, value in report.metric_sums.items():
            sums[name] = sums.get(name, 0.0) + value
    return ChunkReport(
        users=sum(r.users for r in reports),
        rejected=rejected,
        metric_sums=sums,
        memory=largest(r.memory for r in reports),
        rebuilt=_united(*(r.rebuilt for r in reports)),
        halved_blocks=sum(r.halved_blocks for r in reports),
    )


def _united(*shards: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted({shard for part in shards for shard in part}))


def _report(update: UpdateBlock, reasons: Mapping[int, str]) -> ChunkReport:
    """Counts of all users, sums over the admitted ones: a metric of a rejected user need not be a number."""
    admitted = torch.ones(len(update.weight_u), dtype=torch.bool)
    admitted[list(reasons)] = False
    sums = {name: float(values[admitted].double().sum()) for name, values in update.metrics.items()}
    return ChunkReport(len(admitted), dict(Counter(reasons.values())), sums, private_memory())
