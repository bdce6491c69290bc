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
from client.frozen import NodeModel
from client.limits import TaskLimits
from client.partition import OwnUsers
from client.personal_store import PersonalStore
from client.pools import Pools
from client.private import private_folder
from client.round import RoundState
from client.store import UserStore
from client.stores import UserStores
from client.task import Task
from client.training import begin_round, train_block, whole
from federation.base import BaseModel
from federation.config import PopulationConfig, Precision, TaskConfig
from federation.data.population import Batch, Part, Population
from federation.data.registry import make_population
from federation.data.source import OnDevice
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
from federation.files import remove_leftovers
from federation.frames import join
from federation.pool.file import PoolFile
from federation.settings import Settings, parse
from federation.streams import Streams, UserIds
from federation.update import Values


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
    limits: TaskLimits = Field(TaskLimits(), description="the most that a server may ask of the device")

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
    device that is not there, or a folder that others may look into; PoolError or StoreError when it cannot be used.
    """

    def __init__(self, config: NodeConfig) -> None:
        self.config, self.device = config, _device(config.device)
        self.population: Population = make_population(config.population)
        self._source = OnDevice(self.population, self.device)
        private_folder(config.state)
        remove_leftovers(config.state)
        self._pools = Pools(config.state)
        self.personal = PersonalStore(config.state / "personal")
        self._users = self._own_users()
        self._stores = UserStores(config.state / "federations")
        self._model = NodeModel(self.population.base_model, self.device, config.precision)
        self._working = threading.Lock()

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
        """Serves this version from now on, once it is seen to fit the node's model, which is loaded for that.

        Raises NodeError unless it is kept and can serve; otherwise as `task`.
        """
        pool = self.pool(version)
        self._fitting(pool.task, pool)
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
        return self._model.base()

    def task(self, config: TaskConfig) -> Task:
        """A task on the node's model, whose layers are wrapped for the first one.

        Raises NodeError for a task that wraps other layers than the first, or scales them otherwise, and for one beyond
        the owner's limits; PoolError for targets that are no linear layers.
        """
        self.config.limits.check(config)
        return self._model.task(config)

    def loaded(self, version: str) -> tuple[Task, Values]:
        """A pool that is kept, as the task that it was trained for and its values, on the node's device.

        Raises NodeError for a pool that is not kept or does not fit the node's model; otherwise as `task`.
        """
        pool = self.pool(version)
        return self._fitting(pool.task, pool), moved(pool.values, self.device)

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
        """As of the population, on the node's device."""
        return self._source.batch(user_ids, part, size, streams)

    @property
    def tasks(self) -> int:
        """As of `OnDevice`."""
        return self._source.tasks

    def of_task(self, index: int) -> OnDevice:
        """As of `OnDevice`."""
        return self._source.of_task(index)

    def user_id(self, name: str) -> int:
        """The id of one of the node's users. Raises NodeError for a name of nobody here; see `OwnUsers.id_of`."""
        return self._users.id_of(name)

    def known_id(self, name: str) -> int:
        """The id that a name stands for, whether or not the user's data is here. Raises NodeError where it is none."""
        return self._users.known_id(name)

    def holds(self, user_id: int) -> bool:
        """Whether a user is one of the node's, and was not forgotten."""
        return self._users.holds(user_id)

    def forget(self, user_id: int) -> tuple[bool, int]:
        """Removes what is kept of a user, who is left out from now on.

        The user's data need not be here any longer. Returns whether there were personal values, and how many
        federations had trained the user. Raises NodeError for a user of whom the node knows nothing, and while it is at
        work. Stopped half-way, it can be done again.
        """
        with self._alone():
            ids = np.array([user_id], dtype=np.int64)
            federations = sum(whole(store, partial(store.forget, ids)) for store in self._stores.existing())
            if not (federations or self.holds(user_id) or user_id in self.personal.users()):
                raise NodeError(
                    "unknown users",
                    f"a user to forget is one of the node's, or one of whom it keeps something, {user_id} is neither; "
                    "see how the name is written, or it was forgotten already",
                )
            had_values = self.personal.forget(user_id)
            self._users = self._own_users()
            return had_values, federations

    def close(self) -> None:
        """Closes what is open, when no work is under way any longer. The node must not be used any more."""
        self._stores.close()
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
        pool = self.pool(instructions.version)  # whether it is here, before a model is loaded for it
        task = self._fitting(_task_config(instructions.task), pool)
        return ids, task, moved(pool.values, self.device)

    def _fitting(self, config: TaskConfig, pool: PoolFile) -> Task:
        """A task on the node's model, once the pool fits both."""
        self.config.limits.check(config)
        return self._model.task(config, pool)

    def _blocks(self, ids: UserIds, wanted: Callable[[], bool]) -> Iterator[UserIds]:
        """The users, block by block. Raises NodeError once nobody wants the work."""
        for start in range(0, len(ids), self.config.block):
            if not wanted():
                raise NodeError("late", "nobody waits for this work any longer; ask again")
            yield ids[start : start + self.config.block]

    def _store(self, federation: str, task: Task) -> UserStore:
        return self._stores.of(federation, task.record_layout)


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


def _task_config(text: str) -> TaskConfig:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NodeError(
            "failed", f"a task is JSON, got {text[:80]!r} ({error}); is the server of this release?"
        ) from None
    return parse(TaskConfig, data)
