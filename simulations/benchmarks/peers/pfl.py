"""pfl-research: `FederatedAveraging` on its simulated backend, in processes of `torchrun`.

Its model's parameters are the dense pool, of which a user's forward gathers the active rows; its backend keeps one
model per process, sums the users' dense differences, and reduces them over processes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import cycle
from typing import Any

import torch
import torch.distributed
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from simulations.benchmarks.peers.turns import Turns
from simulations.benchmarks.workloads import Task


class PoolLinear(nn.Module):
    """A frozen linear layer plus the current user's units, gathered from all R of them.

    Two parameters rather than one with both factors side by side: 4% more users per second on W1.
    """

    def __init__(self, base: nn.Module, rows: Tensor, d_in: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.down, self.up = nn.Parameter(rows[:, :d_in].clone()), nn.Parameter(rows[:, d_in:].clone())
        self.active = torch.empty(0, dtype=torch.long)

    def forward(self, x: Tensor) -> Tensor:
        low_rank = (x @ self.down[self.active].t()) @ self.up[self.active]
        return torch.as_tensor(self.base(x)) + low_rank * self.scale


class PoolModule(nn.Module):
    """A workload's base with the pool in it, and the methods that pfl asks for."""

    def __init__(self, given: Task) -> None:
        super().__init__()
        base = given.workload.base()
        self.base, self._loss = base.module, base.loss
        self._layers: dict[str, PoolLinear] = {}
        for m in given.spec.modules:
            parent_name, _, child = m.name.rpartition(".")
            parent = self.base.get_submodule(parent_name)
            layer = PoolLinear(getattr(parent, child), given.values[m.section], m.d_in, given.spec.scale)
            setattr(parent, child, layer)
            self._layers[m.section] = layer

    def values(self) -> dict[str, Tensor]:
        """The pool, (R, d_in + d_out) by section."""
        return {name: torch.cat((layer.down, layer.up), 1).detach() for name, layer in self._layers.items()}

    def loss(self, inputs: Tensor, targets: Tensor, active: Mapping[str, Tensor]) -> Tensor:
        """One user's mean loss with its active rows."""
        for name, layer in self._layers.items():
            layer.active = active[name]
        return self._loss(self.base, inputs, targets).mean()

    def metrics(self, *_: Any) -> dict[str, Any]:
        """pfl asks for this too; nothing is evaluated."""
        return {}


class Round(TrainingProcessCallback):  # type: ignore[misc]
    """Begins a round when it is its turn, and takes its time until the central model has moved."""

    def __init__(self, given: Task, module: PoolModule, rounds: int, turns: Turns) -> None:
        self._given, self._module, self._left, self._turns = given, module, rounds, turns
        self._first = torch.distributed.get_rank() == 0

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        self._begin()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        seconds = time.perf_counter() - self._started
        if self._first:
            if central_iteration == 0:
                self._turns.first(self._given.row_means_behind(self._module.values()))
            self._turns.done(seconds)
        self._left -= 1
        if self._left:
            self._begin()
        return False, Metrics()

    def _begin(self) -> None:
        if self._first:
            self._turns.wait()
        torch.distributed.barrier()
        self._started = time.perf_counter()


def datasets(given: Task) -> list[Dataset]:
    """Every user's examples and active rows, as pfl hands them to the loss."""
    return [
        Dataset(
            (given.data.inputs[user], given.data.targets[user]),
            user_id=str(user),
            train_kwargs={"active": given.active(user)},
        )
        for user in range(given.users)
    ]


def training(given: Task) -> NNTrainHyperParams:
    """A user's steps: epochs of one batch with all of its examples."""
    local = given.workload.local
    return NNTrainHyperParams(
        local_num_epochs=local.steps, local_learning_rate=local.learning_rate, local_batch_size=None
    )


def model_around(module: PoolModule) -> PyTorchModel:
    """pfl's model: SGD on the pool alone, and a central step that adds the mean difference."""
    rows = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def local_sgd(_: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(rows, lr=lr)

    return PyTorchModel(module, local_sgd, torch.optim.SGD(rows, lr=1.0))


def run(given: Task, rounds: int, turns: Turns) -> None:
    """So many rounds of a simulation. Every process of the group calls this."""
    module = PoolModule(given)
    owned, order = datasets(given), cycle(range(given.users))
    population = FederatedDataset(owned.__getitem__, lambda: next(order))
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,
            train_cohort_size=given.users,
            val_cohort_size=None,
        ),
        SimulatedBackend(training_data=population, val_data=population),
        model_around(module),
        training(given),
        callbacks=[Round(given, module, rounds, turns)],
        send_metrics_to_platform=False,
    )
