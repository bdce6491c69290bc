"""The loop that anyone would write: one user after the other, `torch.optim.SGD` on its own rows of a plain model.

Two processes do half of the users each. They are the engine's own workers, so allocator and threads are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from federation.pool.spec import PoolSpec
from federation.update import Values
from simulations.benchmarks.workloads import Task, Workload, task

Sums = dict[str, Tensor]
"""Sums of users' differences, (R, d_in + d_out) by section."""


class LowRank(nn.Module):
    """A frozen linear layer plus one user's k units, as anyone would write it."""

    def __init__(self, base: nn.Module, d_in: int, d_out: int, k: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.down, self.up = nn.Parameter(torch.zeros(k, d_in)), nn.Parameter(torch.zeros(k, d_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.base(x)) + (x @ self.down.t()) @ self.up * self.scale


class PlainModel:
    """A workload's base with room for one user's active rows in every adapted layer."""

    def __init__(self, workload: Workload, spec: PoolSpec) -> None:
        self._base, self._local = workload.base(), workload.local
        self._layers: dict[str, LowRank] = {}
        for m in spec.modules:
            parent_name, _, child = m.name.rpartition(".")
            parent = self._base.module.get_submodule(parent_name)
            layer = LowRank(getattr(parent, child), m.d_in, m.d_out, workload.config.gate.budget, spec.scale)
            setattr(parent, child, layer)
            self._layers[m.section] = layer

    def train(self, values: Values, active: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Sums:
        """One user's active rows after its steps, (k, d_in + d_out) by section."""
        self._load(values, active)
        parameters = [p for layer in self._layers.values() for p in (layer.down, layer.up)]
        optimizer = torch.optim.SGD(parameters, lr=self._local.learning_rate)
        for _ in range(self._local.steps):
            optimizer.zero_grad(set_to_none=True)
            self._base.loss(self._base.module, inputs, targets).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return {name: torch.cat((layer.down.detach(), layer.up.detach()), 1) for name, layer in self._layers.items()}

    @torch.no_grad()
    def _load(self, values: Values, active: Mapping[str, Tensor]) -> None:
        for name, layer in self._layers.items():
            rows = values[name][active[name]]
            layer.down.copy_(rows[:, : layer.down.shape[1]])
            layer.up.copy_(rows[:, layer.down.shape[1] :])


def train_each(model: PlainModel, given: Task, users: range) -> Sums:
    """Some users, one after the other; the sums of what their training changed."""
    sums = {name: torch.zeros_like(rows) for name, rows in given.values.items()}
    for user in users:
        active = given.active(user)
        trained = model.train(given.values, active, given.data.inputs[user], given.data.targets[user])
        for name, rows in trained.items():
            sums[name].index_add_(0, active[name], rows - given.values[name][active[name]])
    return sums


def naive_job(_: Any, workload: str, users: int, part: range) -> tuple[Sums, None]:
    """A worker's share of a naive round."""
    given = task(workload, users)
    return train_each(_model(workload), given, part), None


def add(a: Sums, b: Sums) -> Sums:
    """The sums of both."""
    return {name: a[name] + b[name] for name in a}


@cache
def _model(workload: str) -> PlainModel:
    given = task(workload, 1)
    return PlainModel(given.workload, given.spec)
