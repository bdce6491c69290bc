"""Outer signals against finite differences, a closed form, and one user at a time in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from client.adapt import row_gradients
from client.meta import SIGNALS, Lesson, fomaml, maml
from federation.base import BaseModel, frozen
from federation.data.population import Batch
from federation.learner import RATES_OF_UNITS, SHARED_RATES, START_SECTION
from tests import models
from tests.client.lessons import SCALE, STEPS, USERS, MakeBase, lesson_of, only, query_loss

SETTINGS = [(rule, start) for rule in ("sgd", "rates") for start in ("pool", "universal", "contextual")]
BASES = [models.mlp, models.gpt2]
OFF = -1e3
"""A logit whose sigmoid is 0."""


def settings(signal: str, rule: str = "sgd", start: str = "pool", **more: Any) -> dict[str, Any]:
    return {"signal": signal, "rule": {"name": rule}, "start": {"name": start}, **more}


def difference(a: Tensor, b: Tensor) -> float:
    """|a - b| over |b|."""
    return float((a - b).norm() / b.norm())


# -------------------------------------------------------------------------------- finite differences


def assert_slopes(lesson: Lesson, tolerance: float = 1e-5) -> None:
    """What exact MAML sends is minus the slope of every user's query loss, along a random line in each section."""
    directions, step = maml(lesson).directions, 1e-5
    assert set(directions) == set(lesson.copies)
    generator = torch.Generator().manual_seed(4)
    for name, copy in lesson.copies.items():
        line = torch.randn(copy.shape, generator=generator)
        at = [query_loss(lesson, {**lesson.copies, name: copy + sign * step * line}) for sign in (1, -1)]
        slope_u = (at[0] - at[1]) / (2 * step)
        expected_u = -(directions[name] * line).flatten(1).sum(1)
        torch.testing.assert_close(expected_u, slope_u, rtol=tolerance, atol=2e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("rule", "start"), SETTINGS)
@pytest.mark.parametrize("make", BASES)
def test_exact_maml_is_the_slope_of_the_query_loss(make: MakeBase, rule: str, start: str) -> None:
    lesson = lesson_of(make, settings("maml", rule, start))
    assert_slopes(lesson)
    exact, cheap = maml(lesson), fomaml(lesson)
    torch.testing.assert_close(exact.support_loss_u, cheap.support_loss_u, rtol=1e-12, atol=0)
    for module in lesson.inner.model.spec.modules:
        assert difference(cheap.directions[module.section], exact.directions[module.section]) > 1e-3


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("query_steps", [(0,), (1,), (0, 1, 3), (3,)])
@pytest.mark.parametrize("make", BASES)
def test_the_query_loss_may_count_after_several_steps(make: MakeBase, query_steps: tuple[int, ...]) -> None:
    assert_slopes(lesson_of(make, settings("maml", "rates", "contextual", query_steps=query_steps)))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("train", ["down", "up", "nothing"])
def test_a_factor_that_does_not_step_has_a_slope_all_the_same(train: str) -> None:
    lesson = lesson_of(models.mlp, settings("maml", "rates", "universal"), train=train)
    assert_slopes(lesson)
    for module in lesson.inner.model.spec.modules:
        assert all(part.any() for part in torch.split(maml(lesson).directions[module.section], module.d_in, 2))


@pytest.mark.usefixtures("float64")
def test_batches_in_turn_have_the_slope_of_their_turns() -> None:
    lesson = lesson_of(models.mlp, settings("maml", "rates", "universal"), batches=2, steps=5, learning_rate=0.05)
    assert len(lesson.batches) == 2
    assert_slopes(lesson)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("train", ["both", "up"])
@pytest.mark.parametrize("query_steps", [(), (0,), (1, 3)])
@pytest.mark.parametrize(("rule", "start"), SETTINGS)
@pytest.mark.parametrize("make", BASES)
def test_activations_that_are_computed_again_change_nothing_but_rounding(
    make: MakeBase, rule: str, start: str, query_steps: tuple[int, ...], train: str
) -> None:
    lesson = lesson_of(make, settings("maml", rule, start, query_steps=query_steps), train=train)
    whole, again = maml(lesson), maml(replace(lesson, recompute=True))
    assert whole.query_loss_u is not None
    assert again.query_loss_u is not None
    torch.testing.assert_close(again.support_loss_u, whole.support_loss_u, rtol=1e-12, atol=0)
    torch.testing.assert_close(again.query_loss_u, whole.query_loss_u, rtol=1e-12, atol=0)
    for name, direction in whole.directions.items():
        torch.testing.assert_close(again.directions[name], direction, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", BASES)
def test_before_the_first_step_there_is_no_second_order(make: MakeBase) -> None:
    lesson = lesson_of(make, settings("maml", "rates", "contextual", query_steps=(0,)))
    exact, cheap = maml(lesson).directions, fomaml(lesson).directions
    for name, direction in exact.items():
        torch.testing.assert_close(cheap[name], direction, rtol=1e-9, atol=1e-13)
    assert not exact[RATES_OF_UNITS].any()
    assert exact[START_SECTION].any()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", BASES)
def test_with_constant_gradients_the_slope_of_a_rate_is_an_inner_product(make: MakeBase) -> None:
    """d query / d rate = -<sum of the inner gradients, query gradient>, for each factor of each unit."""
    lesson = lesson_of(make, settings("fomaml", "rates", "pool"))
    lesson.copies[RATES_OF_UNITS][..., 2] = OFF
    lesson.copies[SHARED_RATES].fill_(0.0)[..., STEPS] = OFF
    found, inner = fomaml(lesson).directions, lesson.inner
    modules, width = inner.model.spec.modules, lesson.copies[RATES_OF_UNITS].shape[1]
    bend = (lesson.copies[RATES_OF_UNITS].view(USERS, len(modules), -1, 3)[..., :2] / math.log(16.0)).tanh()
    rate, per_log = 0.3 * 16.0**bend, 0.3 * 16.0**bend * (1 - bend.square())
    rows = {m.section: lesson.copies[m.section] for m in modules}
    gradients = []
    for at in range(STEPS):
        gradients.append(row_gradients(inner.model, rows, lesson.batch(at))[1])
        rows = {
            m.section: rows[m.section]
            - torch.cat([rate[:, j, :, f : f + 1].expand(-1, -1, w) for f, w in enumerate((m.d_in, m.d_out))], 2)
            * gradients[at][j]
            for j, m in enumerate(modules)
        }
    query = row_gradients(inner.model, rows, lesson.query)[1]
    onto_step = torch.zeros(USERS, STEPS)
    for j, m in enumerate(modules):
        for f, own in enumerate((slice(0, m.d_in), slice(m.d_in, m.width))):
            each = [(gradient[j] * query[j])[..., own].sum(2) for gradient in gradients]
            sent = found[RATES_OF_UNITS].view(USERS, len(modules), width // len(modules), 3)[:, j, :, f]
            torch.testing.assert_close(sent, torch.stack(each).sum(0) * per_log[:, j, :, f], rtol=1e-8, atol=1e-12)
            onto_step += torch.stack([(one * per_log[:, j, :, f]).sum(1) for one in each], 1)
    torch.testing.assert_close(found[SHARED_RATES][:, 0, :STEPS], onto_step, rtol=1e-8, atol=1e-12)


# -------------------------------------------------------------------------------- a quadratic


def linear(seed: int = 0) -> BaseModel:
    """y = W x with the squared error: where `up` alone steps, a loss that is quadratic in what steps."""
    torch.manual_seed(seed)

    def loss(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return (module(inputs) - targets).square().mean(1)

    module = nn.Sequential(nn.Linear(5, 3, bias=False))
    return BaseModel(frozen(module), loss, lambda module, inputs: inputs, 5, ("0",), "tiny-mlp")


@dataclass(frozen=True)
class Quadratic:
    """User u's loss on a batch as a function of its `up` (k, 3), of the gradient H up + b."""

    hidden: Tensor
    missing: Tensor

    @classmethod
    def of(cls, lesson: Lesson, batch: Batch, u: int, used: Tensor) -> Quadratic:
        data, (weight,) = only(batch, u), lesson.inner.model.base.module.parameters()
        down = lesson.copies["pool/0"][u, used, :5]
        return cls(SCALE * data.inputs[0] @ down.t(), data.targets[0] - data.inputs[0] @ weight.t())

    @property
    def H(self) -> Tensor:
        return 2.0 / self.missing.numel() * self.hidden.t() @ self.hidden

    @property
    def b(self) -> Tensor:
        return -2.0 / self.missing.numel() * self.hidden.t() @ self.missing

    def loss(self, up: Tensor) -> Tensor:
        return (self.hidden @ up - self.missing).square().mean()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_on_a_quadratic_rows_and_gradients_are_those_of_the_closed_form(steps: int, recompute: bool) -> None:
    """up_K = up* + A^K (up_0 - up*) with A = 1 - diag(rate) H; the slope of the query loss there, through A^K."""
    meta = settings("maml", "rates", "pool", recompute=recompute)
    lesson = lesson_of(linear, meta, steps=steps, batches=1, train="up")
    log_rate_uk = lesson.copies[RATES_OF_UNITS][..., 1]
    lesson.copies[RATES_OF_UNITS][..., 2] = OFF
    lesson.copies[SHARED_RATES].fill_(0.0)[..., steps] = OFF
    found = maml(lesson)
    assert found.query_loss_u is not None
    for u in (0, 1):  # user 2 has no unit
        used = lesson.inner.active.valid_ujk[u, 0]
        inner, query = (Quadratic.of(lesson, batch, u, used) for batch in (lesson.batches[0], lesson.query))
        bend = (log_rate_uk[u, used] / math.log(16.0)).tanh()
        rate = 0.3 * 16.0**bend
        first, best = lesson.copies["pool/0"][u, used, 5:], -torch.linalg.solve(inner.H, inner.b)
        A = torch.eye(len(rate)) - rate[:, None] * inner.H
        to = [torch.linalg.matrix_power(A, at) for at in range(steps + 1)]
        last = best + to[steps] @ (first - best)
        slope = query.H @ last + query.b
        torch.testing.assert_close(found.query_loss_u[u], query.loss(last), rtol=1e-11, atol=0)
        expected = -to[steps].t() @ slope
        torch.testing.assert_close(found.directions["pool/0"][u, used, 5:], expected, rtol=1e-9, atol=1e-12)
        gradients = [inner.H @ to[at] @ (first - best) for at in range(steps)]
        onto_rate = sum(((to[steps - 1 - at].t() @ slope) * gradients[at]).sum(1) for at in range(steps))
        expected = onto_rate * rate * (1 - bend.square())
        torch.testing.assert_close(found.directions[RATES_OF_UNITS][u, used, 1], expected, rtol=1e-9, atol=1e-12)


# -------------------------------------------------------------------------------- one user in plain PyTorch


class Functional(nn.Module):
    """The base's loss of one user's examples with LoRA layers, as a function of their (down, up)."""

    def __init__(self, make: MakeBase, widths: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.base = make()
        models.with_plain_lora(self.base, {name: torch.zeros(1, sum(w)) for name, w in widths.items()}, SCALE)
        self.module = self.base.module

    def forward(self, batch: Batch) -> Tensor:
        return self.base.loss(self.module, batch.inputs[0], batch.targets[0]).mean()

    def at(self, factors: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return functional_call(self, {f"module.{name}": value for name, value in factors.items()}, (batch,))


class PlainUser:
    """User u of a lesson alone: its own units, its own examples, no padding, plain autograd."""

    def __init__(self, make: MakeBase, lesson: Lesson, u: int) -> None:
        self.lesson, self.u, self.modules = lesson, u, lesson.inner.model.spec.modules
        self.loss = Functional(make, {m.name: (m.d_in, m.d_out) for m in self.modules}).at
        self.used = lesson.inner.active.valid_ujk[u]
        self.first: dict[str, Tensor] = {}
        for j, m in enumerate(self.modules):
            down, up = torch.split(lesson.copies[m.section][u, self.used[j]], [m.d_in, m.d_out], 1)
            self.first |= {f"{m.name}.down": down, f"{m.name}.up": up}
        units = lesson.copies.get(RATES_OF_UNITS, torch.zeros(USERS, len(self.modules) * self.used.shape[1], 3))
        self.units = units[u].view(*self.used.shape, -1)
        self.shared = lesson.copies.get(SHARED_RATES, torch.zeros(USERS, 1, STEPS + 1))[u, 0]

    def gradients(self, factors: Mapping[str, Tensor], batch: Batch, second_order: bool) -> dict[str, Tensor]:
        if not second_order:
            factors = {name: f.detach().requires_grad_() for name, f in factors.items()}
        with sdpa_kernel(SDPBackend.MATH):
            loss = self.loss(factors, only(batch, self.u))
            found = torch.autograd.grad(loss, list(factors.values()), create_graph=second_order, allow_unused=True)
        return {n: torch.zeros_like(f) if g is None else g for (n, f), g in zip(factors.items(), found, strict=True)}

    def rates(self, at: int) -> dict[str, Tensor]:
        """Of each factor's units, (k, 1)."""
        most, found = math.log(16.0), {}
        for j, m in enumerate(self.modules):
            for column, factor in enumerate(("down", "up")):
                log_rate = self.units[j, self.used[j], column] + self.shared[at]
                found[f"{m.name}.{factor}"] = (0.3 * (most * (log_rate / most).tanh()).exp())[:, None]
        return found

    def adapted(self, start: Mapping[str, Tensor], second_order: bool) -> dict[str, Tensor]:
        """After all steps of the lesson's rule."""
        now, velocity = dict(start), {name: torch.zeros_like(f) for name, f in start.items()}
        learned = SHARED_RATES in self.lesson.copies
        for at in range(self.lesson.steps):
            found = self.gradients(now, self.lesson.batch(at), second_order)
            rates = self.rates(at)
            for name, gradient in found.items():
                j = [m.name for m in self.modules].index(name.rpartition(".")[0])
                velocity[name] = (self.shared[STEPS].sigmoid() * velocity[name] if learned else 0.0) + gradient
                decay = self.units[j, self.used[j], 2:].sigmoid() if learned else 0.0
                pulled = decay * (now[name] - start[name])
                now[name] = now[name] - (rates[name] if learned else 0.3) * velocity[name] - pulled
        return now

    def directions(self, signal: str) -> dict[str, Tensor]:
        """What the user sends, by factor; and by section, what it sends of its rates."""
        if signal == "delta":
            return {n: f - self.first[n] for n, f in self.adapted(self.first, False).items()}
        if signal == "reptile":
            now = self.adapted(self.first, False)
            last = self.gradients(now, self.lesson.query, False)
            return {name: f - 0.3 * last[name] - self.first[name] for name, f in now.items()}
        wanted = {**self.first, RATES_OF_UNITS: self.units, SHARED_RATES: self.shared}
        wanted = {name: value.clone().requires_grad_() for name, value in wanted.items()}
        self.units, self.shared = wanted[RATES_OF_UNITS], wanted[SHARED_RATES]
        now = self.adapted({name: wanted[name] for name in self.first}, signal == "maml")
        loss = self.loss(now, only(self.lesson.query, self.u))
        found = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True, allow_unused=True)
        return {name: -gradient for name, gradient in zip(wanted, found, strict=True)}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("signal", "rule"),
    [("delta", "sgd"), ("reptile", "sgd"), ("fomaml", "sgd"), ("fomaml", "rates"), ("maml", "sgd"), ("maml", "rates")],
)
@pytest.mark.parametrize("make", BASES)
def test_a_stack_of_users_sends_what_each_sends_in_plain_pytorch(make: MakeBase, signal: Any, rule: str) -> None:
    lesson = lesson_of(make, settings(signal, rule))
    found = SIGNALS[signal](lesson)
    for u in range(USERS):
        plain = PlainUser(make, lesson, u)
        expected = plain.directions(signal)
        for j, m in enumerate(plain.modules):
            down_up = torch.cat((expected[f"{m.name}.down"], expected[f"{m.name}.up"]), 1)
            sent = found.directions[m.section][u]
            torch.testing.assert_close(sent[plain.used[j]], down_up, rtol=1e-8, atol=1e-11)
            assert not sent[~plain.used[j]].any()
        for name in {RATES_OF_UNITS, SHARED_RATES} & set(found.directions):
            sent = found.directions[name][u].view(expected[name].shape)
            torch.testing.assert_close(sent, expected[name], rtol=1e-8, atol=1e-11)
            assert sent.any()
        first = plain.loss(plain.first, only(lesson.batch(0), u))
        torch.testing.assert_close(found.support_loss_u[u], first.detach(), rtol=1e-10, atol=0)
