"""The inner loop: how U users' rows start, and step by the update rule. In a round and when a user is served.

Everything that it depends on, the copies that `Learner.copies` makes, may require gradients; then so do the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from client.adapt import freeze_factors, row_gradients
from federation.data.population import Batch
from federation.learner import ActiveUnits, Learner
from federation.pool.model import PooledModel
from federation.pool.spec import Rows
from federation.rules import Parameters, Stepped
from federation.second_order import twice_differentiable


@dataclass(frozen=True)
class Inner:
    """U users' adaptation: from which units, by what context (U, F), and which factors step."""

    model: PooledModel
    learner: Learner
    active: ActiveUnits
    features_uf: Tensor
    factors: Sequence[str] = ("down", "up")

    def start(self, copies: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where the rows start."""
        return self.learner.start(copies, self.active, self.features_uf)

    def parameters(self, copies: Mapping[str, Tensor]) -> Parameters:
        """Those of the rule."""
        return self.learner.parameters(copies, self.active)

    def first_order(
        self, parameters: Parameters, start: Rows, now: Stepped, batch: Batch, at: int
    ) -> tuple[Stepped, Tensor]:
        """A step in which the gradient is a constant, and the loss before it (U,)."""
        loss_u, gradients = self._gradients(now.rows, batch)
        return self.learner.rule.step(parameters, start, now, gradients, at), loss_u

    def second_order(
        self, parameters: Parameters, start: Rows, now: Stepped, batch: Batch, at: int
    ) -> tuple[Stepped, Tensor]:
        """A step in which the gradient depends on the rows, which must require gradients."""
        with twice_differentiable(), self.model.bound(now.rows):
            loss_u = self.model.loss(batch)
            gradients = list(torch.autograd.grad(loss_u.sum(), list(now.rows.values()), create_graph=True))
        freeze_factors(gradients, self.model.spec.modules, self.factors)
        return self.learner.rule.step(parameters, start, now, gradients, at), loss_u.detach()

    def _gradients(self, rows: Rows, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            loss_u, gradients = row_gradients(self.model, rows, batch)
        freeze_factors(gradients, self.model.spec.modules, self.factors)
        return loss_u, gradients
