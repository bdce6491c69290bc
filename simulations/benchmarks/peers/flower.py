"""Flower's simulation: `run_simulation` on Ray with an actor per process, `FedAvg` over dense pools.

A client trains its user's rows as the plain loop does, puts them back into the pool it was sent, and returns the whole
pool: Flower's strategies average arrays of one shape. Model and data stay in the actor from message to message.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor

from federation.errors import RunError
from simulations.benchmarks.peers.naive import PlainModel
from simulations.benchmarks.peers.turns import Turns
from simulations.benchmarks.workloads import PROCESSES, Task, task

client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """One user's round."""
    asked, user = message.content.config_records["config"], int(str(context.node_config["partition-id"]))
    model, given = _model(str(asked["workload"]), int(str(asked["users"])))
    pool = train_dense(model, given, message.content.array_records["arrays"].to_torch_state_dict(), user)
    replied = RecordDict({"arrays": ArrayRecord(pool), "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=replied, reply_to=message)


def train_dense(model: PlainModel, given: Task, pool: dict[str, Tensor], user: int) -> dict[str, Tensor]:
    """The pool after one user's training, its active rows replaced in place."""
    active = given.active(user)
    trained = model.train(pool, active, given.data.inputs[user], given.data.targets[user])
    for name, rows in trained.items():
        pool[name][active[name]] = rows
    return pool


class Timed(FedAvg):
    """FedAvg that begins a round when it is its turn, and takes the time from configuring to the average."""

    def __init__(self, given: Task, turns: Turns) -> None:
        everyone = given.users
        super().__init__(fraction_evaluate=0.0, min_train_nodes=everyone, min_available_nodes=everyone)
        self._given, self._turns = given, turns

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._turns.wait()
        self._started = time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        seconds = time.perf_counter() - self._started
        if arrays is None or any(reply.has_error() for reply in replies) or len(replies) != self._given.users:
            raise RunError(
                f"all {self._given.users} clients must train, {len(replies)} replied; see their errors above"
            )
        if server_round == 1:
            self._turns.first(self._given.row_means_behind(arrays.to_torch_state_dict()))
        self._turns.done(seconds)
        return arrays, metrics


def run(given: Task, rounds: int, turns: Turns) -> None:
    """So many rounds of a simulation."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, _: Context) -> None:
        Timed(given, turns).start(
            grid=grid,
            initial_arrays=ArrayRecord(dict(given.values)),
            num_rounds=rounds,
            train_config=ConfigRecord({"workload": given.workload.name, "users": given.users}),
        )

    init_args: dict[str, Any] = {
        "address": "local",
        "num_cpus": PROCESSES,
        "logging_level": "error",
        "log_to_driver": False,
        "_system_config": {"worker_niceness": 0},  # as our own workers have it; 15 by default
    }
    run_simulation(
        server,
        client,
        num_supernodes=given.users,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": init_args},
    )


@cache
def _model(workload: str, users: int) -> tuple[PlainModel, Task]:
    """An actor's model and data, made for its first message."""
    torch.set_num_threads(1)
    given = task(workload, users)
    return PlainModel(given.workload, given.spec), given
