"""Where gradients are differentiated again: the plain forms against the fast ones, and against finite differences."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from federation.activations import tanh_gelu
from federation.base import BaseModel
from federation.pool.kernel import plain_low_rank, stacked_low_rank
from federation.pool.model import PooledModel
from federation.second_order import is_twice_differentiable, twice_differentiable
from tests import models

USERS, ROWS, SCALE = 2, 3, 1.5


def test_it_is_in_force_inside_alone_even_after_an_error() -> None:
    assert not is_twice_differentiable()
    with twice_differentiable():
        with twice_differentiable():
            assert is_twice_differentiable()
        assert is_twice_differentiable()
    assert not is_twice_differentiable()
    with pytest.raises(KeyError), twice_differentiable():
        raise KeyError
    assert not is_twice_differentiable()


def test_another_thread_is_not_affected() -> None:
    seen = []
    with twice_differentiable():
        thread = threading.Thread(target=lambda: seen.append(is_twice_differentiable()))
        thread.start()
        thread.join()
    assert seen == [False]


@pytest.mark.usefixtures("float64")
def test_the_plain_layer_is_the_stacked_one_and_has_a_second_derivative() -> None:
    generator = torch.Generator().manual_seed(0)
    x, rows = torch.randn(USERS, 4, 5, generator=generator), torch.randn(USERS, ROWS, 8, generator=generator)
    weight = torch.randn(5, 3, generator=generator)
    inputs = (x.requires_grad_(), rows.requires_grad_())

    def plain(x: Tensor, rows: Tensor) -> Tensor:
        return plain_low_rank(x, x @ weight, rows, SCALE)

    fast = stacked_low_rank(x, weight, None, rows, SCALE)
    torch.testing.assert_close(plain(*inputs), fast, rtol=1e-12, atol=1e-13)
    direction = torch.randn(fast.shape, generator=generator)
    ours, theirs = (torch.autograd.grad(y, inputs, direction) for y in (plain(*inputs), fast))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradgradcheck(plain, inputs)


@pytest.mark.usefixtures("float64")
def test_the_activation_has_a_second_derivative_inside() -> None:
    x = torch.linspace(-4, 4, 30, requires_grad=True)
    with twice_differentiable():
        assert torch.autograd.gradgradcheck(tanh_gelu, (x,))


def pooled(make: Callable[[], BaseModel]) -> tuple[PooledModel, dict[str, Tensor]]:
    model = PooledModel.around(make(), 4, SCALE)
    generator = torch.Generator().manual_seed(1)
    shapes = {m.section: (USERS, ROWS, m.width) for m in model.spec.modules}
    return model, {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def slopes(model: PooledModel, rows: dict[str, Tensor], create_graph: bool) -> list[Tensor]:
    leaves = {name: row.detach().requires_grad_() for name, row in rows.items()} if not create_graph else rows
    with model.bound(leaves):
        loss = model.loss(models.batch_for(model.base, USERS, 2)).sum()
    return list(torch.autograd.grad(loss, list(leaves.values()), create_graph=create_graph))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", [models.mlp, models.gpt2, models.bert])
def test_a_models_gradient_is_the_same_inside_and_has_the_slope_of_its_finite_differences(
    make: Callable[[], BaseModel],
) -> None:
    """With the attention that the model has by default."""
    model, rows = pooled(make)
    generator, step = torch.Generator().manual_seed(2), 1e-5
    lines = {name: torch.randn(row.shape, generator=generator) for name, row in rows.items()}
    with twice_differentiable():
        leaves = {name: row.clone().requires_grad_() for name, row in rows.items()}
        inside = slopes(model, leaves, True)
        along = torch.stack([(g * line).sum() for g, line in zip(inside, lines.values(), strict=True)]).sum()
        curved = torch.autograd.grad(along, list(leaves.values()))
    for one, other in zip(inside, slopes(model, rows, False), strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=1e-9, atol=1e-11)
    ahead, behind = (
        slopes(model, {n: row + sign * step * lines[n] for n, row in rows.items()}, False) for sign in (1, -1)
    )
    for found, a, b in zip(curved, ahead, behind, strict=True):
        torch.testing.assert_close(found, (a - b) / (2 * step), rtol=1e-5, atol=1e-8)


def test_outside_a_second_derivative_is_refused_not_wrong() -> None:
    model, rows = pooled(models.mlp)
    leaves = {name: row.requires_grad_() for name, row in rows.items()}
    along = torch.stack([g.sum() for g in slopes(model, leaves, True)]).sum()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        along.backward()
