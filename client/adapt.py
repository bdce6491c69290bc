"""Adapting U users' rows at once: gains of units, and steps of SGD or Adam on the active rows only.

The loss that is differentiated is the sum over users, so each user's gradient is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from federation.data.population import Batch
from federation.pool.model import PooledModel
from federation.pool.prefix import Prefix
from federation.pool.spec import ModuleSpec
from federation.update import Values

Rows = Mapping[str, Tensor]
"""U users' rows: {section: (U, k, d_in + d_out)}."""


def unit_gains(model: PooledModel, values: Values, batch: Batch, strength: float) -> Tensor:
    """First-order predicted benefit of switching a unit on: gain_ug = -d loss_u / d gate_ug, all gates at `strength`.

    One backward pass gives it for all units (U, G). The sign matters: it is not a magnitude.
    """
    gates_ug = torch.full((batch.users, model.spec.units), strength, requires_grad=True)
    with model.gated(values, gates_ug):
        loss_u = model.loss(batch)
    return -torch.autograd.grad(loss_u.sum(), gates_ug)[0]


def row_gradients(model: PooledModel, rows: Rows, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Each user's loss (U,) and the gradient of its rows, in the order of `rows`."""
    leaves = {name: row.detach().requires_grad_() for name, row in rows.items()}
    with model.bound(leaves):
        loss_u = model.loss(batch)
    return loss_u.detach(), list(torch.autograd.grad(loss_u.sum(), list(leaves.values())))


def freeze_factors(gradients: Sequence[Tensor], modules: Sequence[ModuleSpec], factors: Sequence[str]) -> None:
    """Zeroes, in place, the columns of the factors ("down", "up") that are not trained."""
    for gradient, module in zip(gradients, modules, strict=True):
        if "down" not in factors:
            gradient[..., : module.d_in] = 0.0
        if "up" not in factors:
            gradient[..., module.d_in :] = 0.0


def sgd(
    model: PooledModel, rows: Rows, batches: Sequence[Batch], steps: int, learning_rate: float, factors: Sequence[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """Steps of SGD on the active rows, the batches in turn. Returns the new rows and the loss before the first (U,).

    Without a factor to train there is one forward pass and no step.
    """
    if not factors:
        with torch.no_grad(), model.bound(rows):
            return dict(rows), model.loss(batches[0])
    current = {m.section: rows[m.section].detach().clone() for m in model.spec.modules}
    first_loss_u: Tensor | None = None
    prefixes = [Prefix() for _ in batches]
    for step in range(steps):
        at = step % len(batches)
        with prefixes[at].remembered() if steps > len(batches) else nullcontext():
            loss_u, gradients = row_gradients(model, current, batches[at])
        first_loss_u = loss_u if first_loss_u is None else first_loss_u
        freeze_factors(gradients, model.spec.modules, factors)
        for row, gradient in zip(current.values(), gradients, strict=True):
            row.add_(gradient, alpha=-learning_rate)
    assert first_loss_u is not None, "sgd needs at least one batch"
    return current, first_loss_u


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba, 2015) with a rate that falls linearly to zero: how a new user's rows are tuned."""

    learning_rate: float
    steps: int
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def tune(
        self,
        gradients_of: Callable[[Mapping[str, Tensor], int], Sequence[Tensor]],
        start: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The tuned values. `gradients_of(values, step)` gives gradients in the order of `start`."""
        values = {name: value.detach().clone() for name, value in start.items()}
        first = [torch.zeros_like(v) for v in values.values()]
        second = [torch.zeros_like(v) for v in values.values()]
        for step in range(self.steps):
            rate = self.learning_rate * (1 - step / self.steps)
            correction1, correction2 = 1 - self.beta1 ** (step + 1), 1 - self.beta2 ** (step + 1)
            gradients = gradients_of(values, step)
            for value, m, v, g in zip(values.values(), first, second, gradients, strict=True):
                m.lerp_(g, 1 - self.beta1)
                v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
                value.addcdiv_(m, (v / correction2).sqrt_().add_(self.epsilon), value=-rate / correction1)
        return values
