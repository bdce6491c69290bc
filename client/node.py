"""A node: the device or site that holds users' data, and does with them what a server asks for.

Whoever carries the server's letters, Flower or an agent or a test, hands them to `Node.answer`. In the node's folder:

    federations/<id>/users/      the user store of a federation
    personal/                    users' personal values, and who was forgotten (`client/personal_store.py`)
    pools/, release.json         the pools that are kept, and which is served (`client/pools.py`)

The process that owns a node calls `torch.set_num_threads(1)` first: then a round has the same bits everywhere.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal, Self, cast

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from client.evaluate import user_losses
from client.partition import OwnUsers
from client.personal_store import PersonalStore
from client.pools import Pools
from client.round import RoundState
from client.store import MANIFEST_NAME, UserStore
from client.task import Task
from client.training import begin_round, train_block, whole
from federation.base import BaseModel
from federation.config import PoolConfig, PopulationConfig, Precision, Settings, TaskConfig, parse
from federation.data.population import Batch, Part, Population
from federation.data.registry import make_population
from federation.devices import CPU, making_tensors_on, moved
from federation.errors import ConfigError, FedquiltError, NodeError
from federation.exchange import (
    MEASURES,
    Answer,
    Contribution,
    Description,
    Fault,
    Instructions,
    Letter,
    Measures,
    Refusal,
)
from federation.frames import join
from federation.pool.file import PoolFile
from federation.pool.model import PooledModel
from federation.precision import in_precision
from federation.streams import Streams, UserIds
from federation.update import Schema, Values

STORE_SHARDS = 4


def _always() -> bool:
    return True


class NodeConfig(Settings):
    """Whose data a node holds, and how it works."""

    population: PopulationConfig
    state: Path = Field(description="folder for all that the node keeps")
    partition: NonNegativeInt = Field(0, description="which part of the population's users it holds, counted from 0")
    partitions: PositiveInt = Field(1, description="how many such parts there are")
    block: PositiveInt = Field(16, description="users trained in one stacked computation (U)")
    device: Literal["cpu", "cuda", "auto"] = Field("cpu", description="auto: cuda where there is one")
    precision: Precision = Field("fp32", description="of forward and backward; rows stay fp32")

    @model_validator(mode="after")
    def _partition_is_one_of_them(self) -> Self:
        if self.partition >= self.partitions:
            raise ValueError(
                f"partitions are counted from 0, so {self.partition} is none of {self.partitions}; correct one of them"
            )
        return self


class Node:
    """The users of one node, its model and what it keeps. May be used from several threads.

    One training or evaluation runs at a time, a second one is refused as "busy"; a generation in another thread is
    undisturbed, since rows are bound to the context of a call. The model is loaded when it is first needed.

    personal: what is kept for its users. Raises ConfigError, PluginError or PopulationError for a population or a
    device that is not there, PoolError or StoreError when the folder cannot be used.
    """

    def __init__(self, config: NodeConfig) -> None:
        self.config, self.device = config, _device(config.device)
        self.population: Population = make_population(config.population)
        _make_private(config.state)
        self._pools = Pools(config.state)
        self.personal = PersonalStore(config.state / "personal")
        self._users = self._own_users()
        self._stores: dict[str, UserStore] = {}
        self._base: BaseModel | None = None
        self._wrapped: tuple[PoolConfig, PooledModel] | None = None
        self._loading, self._working = threading.RLock(), threading.Lock()

    # What a server asks for

    def answer(self, letter: Letter, wanted: Callable[[], bool] = _always) -> Answer:
        """What the node says to a letter. What it cannot do it refuses; errors that nobody foresaw are raised.

        wanted: whether someone waits for the answer still, asked between blocks of users.
        """
        try:
            if letter.pool is not None:
                self.keep(letter.pool)
            return self._answer(letter, wanted)
        except NodeError as error:
            return Refusal(cast(Fault, error.fault), str(error))
        except FedquiltError as error:
            return Refusal("failed", str(error))

    def _answer(self, letter: Letter, wanted: Callable[[], bool]) -> Answer:
        if letter.kind == "describe":
            return self.describe()
        if letter.instructions is None:
            raise NodeError("failed", f"a letter to {letter.kind} needs instructions, got none; send them")
        if letter.kind == "train":
            return self.train(letter.instructions, wanted)
        if letter.kind == "evaluate":
            return self.evaluate(letter.instructions, wanted)
        self.adopt(letter.instructions.version)
        return self.describe()

    def describe(self) -> Description:
        """What the node says of itself."""
        return Description(
            self._users.counts, self.config.partition, self._pools.versions, self._pools.release, software_version()
        )

    def keep(self, payload: bytes) -> str:
        """Keeps a pool, and returns its version. Raises PoolError for bytes that are no whole pool file."""
        return self._pools.keep(payload)

    def adopt(self, version: str) -> None:
        """Serves this version from now on. Raises NodeError unless it is kept."""
        self._pools.adopt(version)

    def train(self, instructions: Instructions, wanted: Callable[[], bool] = _always) -> Contribution:
        """A round's work for some of the node's users. The same instructions give the same bytes.

        Raises NodeError for what the node has not, or while it is busy; StoreError when users cannot be read or kept.
        """
        with self._alone():
            ids, task, values = self._work(instructions)
            store = self._store(instructions.federation, task)
            begin_round(store, instructions.round_index, instructions.durable_round)
            state = RoundState(values, instructions.round_index, instructions.version)
            payloads: list[bytes] = []
            for block in self._blocks(ids, wanted):
                payloads += train_block(task, state, store, self, block)
            return Contribution(instructions.work, self._users.counts, join(payloads))

    def evaluate(self, instructions: Instructions, wanted: Callable[[], bool] = _always) -> Measures:
        """Sums over some of the node's users of `client/evaluate.py`'s losses. Nothing is kept. Raises as `train`."""
        with self._alone():
            ids, task, values = self._work(instructions)
            sums = dict.fromkeys(MEASURES, 0.0)
            for block in self._blocks(ids, wanted):
                with making_tensors_on(self.device):
                    losses = user_losses(task, values, self, block)
                for name, loss_u in losses.items():
                    sums[name] += float(loss_u.double().sum())
            return Measures(instructions.work, self._users.counts, len(ids), sums)

    # What the node holds

    def base_model(self) -> BaseModel:
        """The frozen model, on the node's device. Rows that a caller binds are the caller's alone."""
        with self._loading:
            if self._base is None:
                base = self.population.base_model()
                base.module.to(self.device)
                self._base = in_precision(base, self.config.precision)
            return self._base

    def task(self, config: TaskConfig) -> Task:
        """A task on the node's model, whose layers are wrapped for the first one.

        Raises NodeError for a task that wraps other layers than the first, or scales them otherwise.
        """
        pool = config.pool
        with self._loading:
            if self._wrapped is None:
                model = PooledModel.around(self.base_model(), pool.rank, pool.scale, pool.target_modules)
                self._wrapped = pool, model
            first, model = self._wrapped
        wanted, has = (pool.scale, pool.target_modules), (first.scale, first.target_modules)
        if wanted != has:
            raise NodeError(
                "failed",
                f"a node's model is wrapped once, with pool.scale and pool.target_modules of {has}, the task has "
                f"{wanted}; restart the node",
            )
        return Task(config, model.of_rank(pool.rank))

    def loaded(self, version: str) -> tuple[Task, Values]:
        """A pool that is kept, as the task that it was trained for and its values, on the node's device.

        Raises NodeError for a pool that is not kept or does not fit the node's model.
        """
        task = self.task(self.pool(version).task)
        return task, self._values(task, version)

    def pool(self, version: str) -> PoolFile:
        """A pool that is kept. Raises NodeError for others."""
        return self._pools.read(version)

    def pin(self, versions: Collection[str]) -> None:
        """Keep the pools of these versions, which users' values refer to, instead of those that were pinned before."""
        self._pools.pin(versions)

    @property
    def release(self) -> str:
        """The version that is served, "" for none."""
        return self._pools.release

    def batch(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> Batch:
        """As of the population, on the node's device. Populations make their data on the CPU."""
        with making_tensors_on(CPU):
            return moved(self.population.batch(user_ids, part, size, streams), self.device)

    def user_id(self, name: str) -> int:
        """The id of one of the node's users. Raises NodeError for a name of nobody here; see `OwnUsers.id_of`."""
        return self._users.id_of(name)

    def holds(self, user_id: int) -> bool:
        """Whether a user is one of the node's, and was not forgotten."""
        return self._users.holds(user_id)

    def forget(self, user_id: int) -> tuple[bool, int]:
        """Removes what is kept of a user, who is left out from now on.

        Returns whether there were personal values, and how many federations had trained the user. Raises NodeError
        while the node is at work. Stopped half-way, it can be done again.
        """
        with self._alone():
            ids = np.array([user_id], dtype=np.int64)
            federations = sum(whole(store, partial(store.forget, ids)) for store in self._existing_stores())
            had_values = self.personal.forget(user_id)
            self._users = self._own_users()
            return had_values, federations

    def close(self) -> None:
        """Closes what is open, when no work is under way any longer. The node must not be used any more."""
        for store in self._stores.values():
            store.close()
        self.personal.close()

    # How the work is done

    def _own_users(self) -> OwnUsers:
        return OwnUsers.of(self.population, self.config.partition, self.config.partitions, self.personal.forgotten())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._working.acquire(blocking=False):
            raise NodeError("busy", "a node trains or evaluates one thing at a time, it is at work; ask again later")
        try:
            yield
        finally:
            self._working.release()

    def _work(self, instructions: Instructions) -> tuple[UserIds, Task, Values]:
        """The users, the task and the values that instructions speak of, once they fit each other."""
        ids = self._users.at(instructions.split, instructions.positions)
        self.pool(instructions.version)  # whether it is here, before a model is loaded for it
        task = self.task(_task_config(instructions.task))
        return ids, task, self._values(task, instructions.version)

    def _values(self, task: Task, version: str) -> Values:
        values = self.pool(version).values
        _check_values(values, task.schema, version)
        return moved(values, self.device)

    def _blocks(self, ids: UserIds, wanted: Callable[[], bool]) -> Iterator[UserIds]:
        """The users, block by block. Raises NodeError once nobody wants the work."""
        for start in range(0, len(ids), self.config.block):
            if not wanted():
                raise NodeError("late", "nobody waits for this work any longer; ask again")
            yield ids[start : start + self.config.block]

    def _store(self, federation: str, task: Task) -> UserStore:
        """The user store of a federation, opened once: LMDB lets a process open a shard once."""
        layout = task.record_layout
        if (store := self._stores.get(federation)) is None or store.layout != layout:
            folder = self.config.state / "federations" / federation / "users"
            store = self._stores[federation] = UserStore(folder, STORE_SHARDS, layout)
        return store

    def _existing_stores(self) -> Collection[UserStore]:
        """The user stores of all federations that the node ever took part in."""
        for manifest in self.config.state.glob(f"federations/*/users/{MANIFEST_NAME}"):
            federation = manifest.parent.parent.name
            if federation not in self._stores:
                self._stores[federation] = UserStore.existing(manifest.parent)
        return self._stores.values()


def software_version() -> str:
    """fedquilt's version, or "uninstalled" where it runs from a bundle of files, as in a Flower app."""
    try:
        return metadata.version("fedquilt")
    except metadata.PackageNotFoundError:
        return "uninstalled"


def _device(wanted: str) -> torch.device:
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise ConfigError(
            f"device = 'cuda' needs a torch that can use a GPU, torch {torch.__version__} finds none; set it to 'cpu', "
            "or to 'auto' for either"
        )
    return torch.device("cuda") if wanted != "cpu" and there else CPU


def _make_private(folder: Path) -> None:
    """What a node keeps says what its users are interested in: a folder that is made here is its owner's alone."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"state names a node's folder, {folder} cannot be made ({error}); give another") from error


def _task_config(text: str) -> TaskConfig:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise NodeError(
            "failed", f"a task is JSON, got {text[:80]!r} ({error}); is the server of this release?"
        ) from None
    return parse(TaskConfig, data)


def _check_values(values: Values, schema: Schema, version: str) -> None:
    """Refuses a pool that is not of the task: it came from outside, and shapes that broadcast would train nonsense."""
    wanted = {name: ((spec.rows, spec.width), torch.float32) for name, spec in schema.sections.items()}
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in values.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise NodeError(
                "failed",
                f"a pool holds what its task and model say, section {name!r} should be {wanted.get(name, 'absent')}, "
                f"pool {version} has {found.get(name, 'none')}; do server and node use the same base model?",
            )
