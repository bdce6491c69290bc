"""Adapting U users' rows at once: gains of units, and steps of SGD or Adam on the active rows only.

The loss that is differentiated is the sum over users, so each user's gradient is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from federation.data.population import Batch
from federation.pool.model import PooledModel
from federation.pool.prefix import Prefix
from federation.pool.spec import ModuleSpec, Rows
from federation.rules import Parameters, Rule, Stepped
from federation.update import Values


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


class Tuner(Protocol):
    """How values of U users step while they are tuned, along gradients in the order of the values."""

    def begin(self, start: Rows) -> Stepped:
        """Before the first step."""
        ...

    def step(self, start: Rows, now: Stepped, gradients: Sequence[Tensor], at: int) -> Stepped:
        """One step on. at: steps taken since `begin`."""
        ...

    def lasting(self, now: Stepped, at: int) -> tuple[Rows, int]:
        """What goes on into a user's next task, after `at` steps: of the memory, and of their count."""
        ...


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba, 2015) with a rate that falls linearly to zero over `steps`, anew after so many."""

    learning_rate: float
    steps: int
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def begin(self, start: Rows) -> Stepped:
        zero = {name: torch.zeros_like(value) for name, value in start.items()}
        moments = {f"{moment} {name}": value.clone() for moment in ("first", "second") for name, value in zero.items()}
        return Stepped({name: value.detach().clone() for name, value in start.items()}, moments)

    def step(self, start: Rows, now: Stepped, gradients: Sequence[Tensor], at: int) -> Stepped:
        """In place: `now` is used up."""
        if at and at % self.steps == 0:
            now = self.begin(now.rows)
        at %= self.steps
        rate = self.learning_rate * (1 - at / self.steps)
        correction1, correction2 = 1 - self.beta1 ** (at + 1), 1 - self.beta2 ** (at + 1)
        for (name, value), g in zip(now.rows.items(), gradients, strict=True):
            m, v = now.memory[f"first {name}"], now.memory[f"second {name}"]
            m.lerp_(g, 1 - self.beta1)
            v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            value.addcdiv_(m, (v / correction2).sqrt_().add_(self.epsilon), value=-rate / correction1)
        return now

    def lasting(self, now: Stepped, at: int) -> tuple[Rows, int]:
        """Nothing: each task begins anew."""
        return {}, 0


@dataclass(frozen=True)
class ByRule:
    """The update rule with parameters of U users, as it was learned."""

    rule: Rule
    parameters: Parameters

    def begin(self, start: Rows) -> Stepped:
        return self.rule.begin(start)

    def step(self, start: Rows, now: Stepped, gradients: Sequence[Tensor], at: int) -> Stepped:
        return self.rule.step(self.parameters, start, now, gradients, at)

    def lasting(self, now: Stepped, at: int) -> tuple[Rows, int]:
        return now.memory, at


def tuned(
    tuner: Tuner, gradients_of: Callable[[Rows, int], Sequence[Tensor]], start: Rows, steps: int
) -> dict[str, Tensor]:
    """The values after so many steps. `gradients_of(values, step)` gives gradients in the order of `start`."""
    now = tuner.begin(start)
    for at in range(steps):
        now = tuner.step(start, now, gradients_of(now.rows, at), at)
    return dict(now.rows)
