"""Gains against finite differences in float64, and stacked SGD and Adam against `torch.optim`, user by user."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from client.adapt import Adam, sgd, tuned, unit_gains
from federation.base import BaseModel
from federation.data.population import Batch
from federation.pool.model import PooledModel
from tests import models

MakeBase = Callable[[], BaseModel]
SCALE, RANK, USERS = 1.5, 4, 3
BOTH = ("down", "up")


def pooled(make: MakeBase) -> PooledModel:
    return PooledModel.around(make(), RANK, SCALE)


def random_rows(model: PooledModel, *shape: int) -> dict[str, Tensor]:
    """Rows of (*shape, d_in + d_out) by section, none of them zero."""
    generator = torch.Generator().manual_seed(3)
    return {m.section: 0.4 * torch.randn(*shape, m.width, generator=generator) for m in model.spec.modules}


def gated_loss(model: PooledModel, values: Mapping[str, Tensor], gates_ug: Tensor, batch: Batch) -> Tensor:
    with torch.no_grad(), model.gated(values, gates_ug):
        return model.loss(batch)


# -------------------------------------------------------------------------------- gains


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("strength", [0.0, 0.25])
@pytest.mark.parametrize("make", [models.gpt2, models.mlp])
def test_gains_are_minus_the_finite_differences_of_the_loss(make: MakeBase, strength: float) -> None:
    model = pooled(make)
    values, batch = random_rows(model, RANK), models.batch_for(model.base, USERS, 4)
    gain_ug = unit_gains(model, values, batch, strength)
    assert gain_ug.shape == (USERS, model.spec.units)
    for g in range(model.spec.units):
        step = 1e-5 * torch.eye(model.spec.units)[g].expand(USERS, -1)
        gates_ug = torch.full((USERS, model.spec.units), strength)
        above, below = (gated_loss(model, values, gates_ug + sign * step, batch) for sign in (1, -1))
        torch.testing.assert_close(gain_ug[:, g], (below - above) / 2e-5, rtol=1e-5, atol=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", [models.gpt2, models.mlp])
def test_a_unit_switched_on_from_zero_changes_the_loss_by_its_gain_to_first_order(make: MakeBase) -> None:
    model = pooled(make)
    values, batch = random_rows(model, RANK), models.batch_for(model.base, USERS, 4)
    nothing = torch.zeros(USERS, model.spec.units)
    gain_ug, before_u = unit_gains(model, values, batch, 0.0), gated_loss(model, values, nothing, batch)
    for g in range(model.spec.units):
        one = torch.eye(model.spec.units)[g].expand(USERS, -1)
        errors = [
            before_u - gated_loss(model, values, size * one, batch) - size * gain_ug[:, g] for size in (1e-3, 1e-4)
        ]
        # What is left is of second order: a step of a tenth leaves a hundredth.
        torch.testing.assert_close(errors[1], errors[0] / 100, rtol=0.1, atol=5e-12)


# -------------------------------------------------------------------------------- SGD


def plain_sgd(
    make: MakeBase,
    rows: Mapping[str, Tensor],
    examples: Sequence[tuple[Tensor, Tensor]],
    learning_rate: float,
    factors: Sequence[str],
) -> tuple[list[Tensor], float]:
    """One user's rows after a step per batch of (inputs, targets), and the first loss. Rows by module's name."""
    base = make()
    layers = models.with_plain_lora(base, dict(rows), SCALE)
    optimizer = torch.optim.SGD([getattr(layer, f) for layer in layers for f in factors], lr=learning_rate)
    losses = []
    for inputs, targets in examples:
        optimizer.zero_grad()
        loss = base.loss(base.module, inputs, targets).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return [layer.rows for layer in layers], losses[0]


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """|actual - expected| <= tolerance * |expected|, as norms."""
    error, size = float((actual - expected).norm()), float(expected.norm())
    assert size > 0, "nothing was compared"
    assert error <= tolerance * size, f"relative error {error / size:.2e}"


@pytest.mark.parametrize("factors", [BOTH, ("down",), ("up",)])
@pytest.mark.parametrize("make", [models.gpt2, models.mlp])
def test_stacked_sgd_equals_torch_sgd_user_by_user(make: MakeBase, factors: Sequence[str]) -> None:
    model = pooled(make)
    start = random_rows(model, USERS, 2)
    batch = models.batch_for(model.base, USERS, 6)
    windows = [batch.window(i, i + 2) for i in (0, 2, 4)]
    trained, first_loss_u = sgd(model, start, windows, len(windows), 0.5, factors)
    for u in range(USERS):
        rows = {m.name: start[m.section][u] for m in model.spec.modules}
        plain, first_loss = plain_sgd(make, rows, [(w.inputs[u], w.targets[u]) for w in windows], 0.5, factors)
        assert first_loss_u[u].item() == pytest.approx(first_loss, rel=1e-5)
        for m, row in zip(model.spec.modules, plain, strict=True):
            moved = row - start[m.section][u]
            assert_relative(trained[m.section][u] - start[m.section][u], moved, 1e-5)


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("targets", [None, ("2", "c_fc")])
@pytest.mark.parametrize("make", [models.gpt2, models.mlp])
def test_steps_take_few_batches_in_turn(make: MakeBase, targets: tuple[str, ...] | None, steps: int) -> None:
    """Also with the last layers alone adapted, so that the frozen prefix is remembered from turn to turn."""
    base = make()
    adapted = base.target_modules if targets is None else tuple(t for t in targets if t in base.target_modules)
    model = PooledModel.around(replace(base, target_modules=adapted), RANK, SCALE)
    start = random_rows(model, USERS, 2)
    batch = models.batch_for(model.base, USERS, 4)
    windows = [batch.window(i, i + 2) for i in (0, 2)]
    trained, _ = sgd(model, start, windows, steps, 0.5, BOTH)
    for u in range(USERS):
        rows = {m.name: start[m.section][u] for m in model.spec.modules}
        examples = [(windows[i % 2].inputs[u], windows[i % 2].targets[u]) for i in range(steps)]
        plain, _ = plain_sgd(lambda: replace(make(), target_modules=adapted), rows, examples, 0.5, BOTH)
        for m, row in zip(model.spec.modules, plain, strict=True):
            assert_relative(trained[m.section][u] - start[m.section][u], row - start[m.section][u], 1e-5)


@pytest.mark.parametrize("factor", BOTH)
def test_a_frozen_factor_keeps_every_bit_and_the_start_is_untouched(factor: str) -> None:
    model = pooled(models.mlp)
    start = random_rows(model, USERS, 2)
    given = {name: row.clone() for name, row in start.items()}
    trained, _ = sgd(model, start, [models.batch_for(model.base, USERS, 2)], 1, 0.5, (factor,))
    for m in model.spec.modules:
        assert torch.equal(start[m.section], given[m.section])
        by_factor = dict(zip(BOTH, torch.split(trained[m.section] - given[m.section], [m.d_in, m.d_out], -1)))
        frozen = "up" if factor == "down" else "down"
        assert not by_factor[frozen].any()
        assert by_factor[factor].any()


# -------------------------------------------------------------------------------- Adam


def test_tuning_equals_torch_adam_with_a_rate_that_falls_linearly_to_zero() -> None:
    steps, learning_rate = 12, 0.1
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(2, 3, generator=generator) for name in ("a", "b")}
    targets = {name: torch.randn(steps, 2, 3, generator=generator) for name in start}

    def gradients_of(values: Mapping[str, Tensor], step: int) -> list[Tensor]:
        return [2.0 * (values[name] - targets[name][step]) for name in values]

    found = tuned(Adam(learning_rate, steps), gradients_of, start, steps)

    plain = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = torch.optim.Adam(plain.values(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        optimizer.zero_grad()
        torch.stack([(plain[name] - targets[name][step]).square().sum() for name in plain]).sum().backward()
        optimizer.step()
        schedule.step()
    for name in start:
        torch.testing.assert_close(found[name], plain[name].detach(), rtol=1e-5, atol=1e-6)
        assert not torch.equal(found[name], start[name])
