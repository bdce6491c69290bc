"""Exact MAML of W1's perceptron in plain PyTorch, as anyone would write it: a loop over users, and `torch.func`.

Both differentiate the same loss of one user, whose rows are four tensors: `down` and `up` of either layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from federation.data.population import Batch
from federation.pool.spec import PoolSpec
from simulations.benchmarks.workloads import perceptron

Factors = list[Tensor]
"""`down` (k, d_in) and `up` (k, d_out) of the first layer, then of the second; or of U users, stacked."""


@dataclass(frozen=True)
class PlainMaml:
    """Steps of SGD on the support part, the loss on the query part. frozen: weight and bias of both layers."""

    frozen: Sequence[Tensor]
    spec: PoolSpec
    learning_rate: float
    steps: int

    @classmethod
    def of(cls, spec: PoolSpec, learning_rate: float, steps: int) -> PlainMaml:
        """For W1's perceptron."""
        return cls(list(perceptron().module.parameters()), spec, learning_rate, steps)

    def loop(self, rows: Mapping[str, Tensor], support: Batch, query: Batch) -> dict[str, Tensor]:
        """Minus the gradient of each user's query loss, one user after the other: (U, k, d_in + d_out) by section."""
        parts = self._factors(rows)
        found = [
            self._of_user(
                [part[user] for part in parts],
                (support.inputs[user], support.targets[user]),
                (query.inputs[user], query.targets[user]),
            )
            for user in range(query.users)
        ]
        return self._directions([torch.stack(of_users) for of_users in zip(*found, strict=True)])

    def vmapped(self, rows: Mapping[str, Tensor], support: Batch, query: Batch) -> dict[str, Tensor]:
        """The same of all users at once."""

        def query_loss(factors: Factors, inputs: Tensor, targets: Tensor, unseen: Tensor, answers: Tensor) -> Tensor:
            for _ in range(self.steps):
                gradients = torch.func.grad(self._loss)(factors, inputs, targets)
                factors = self._stepped(factors, gradients)
            return self._loss(factors, unseen, answers)

        data = support.inputs, support.targets, query.inputs, query.targets
        return self._directions(torch.func.vmap(torch.func.grad(query_loss))(self._factors(rows), *data))

    def _of_user(
        self, given: Sequence[Tensor], support: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor]
    ) -> Sequence[Tensor]:
        leaves = [part.detach().requires_grad_() for part in given]
        factors = leaves
        for _ in range(self.steps):
            gradients = torch.autograd.grad(self._loss(factors, *support), factors, create_graph=True)
            factors = self._stepped(factors, gradients)
        return torch.autograd.grad(self._loss(factors, *query), leaves)

    def _loss(self, factors: Factors, inputs: Tensor, targets: Tensor) -> Tensor:
        """One user's mean loss, by its rows: (N, 64) and (N,) -> ()."""
        (w1, b1, w2, b2), (down1, up1, down2, up2), scale = self.frozen, factors, self.spec.scale
        hidden = torch.relu(F.linear(inputs, w1, b1) + scale * (inputs @ down1.t()) @ up1)
        return F.cross_entropy(F.linear(hidden, w2, b2) + scale * (hidden @ down2.t()) @ up2, targets)

    def _stepped(self, factors: Factors, gradients: Sequence[Tensor]) -> Factors:
        return [part - self.learning_rate * gradient for part, gradient in zip(factors, gradients, strict=True)]

    def _factors(self, rows: Mapping[str, Tensor]) -> Factors:
        return [part for m in self.spec.modules for part in torch.split(rows[m.section], [m.d_in, m.d_out], 2)]

    def _directions(self, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
        pairs = zip(self.spec.modules, gradients[::2], gradients[1::2], strict=True)
        return {m.section: -torch.cat((down, up), 2) for m, down, up in pairs}
