"""The frozen prefix: remembered where nothing that is trained lies below, and never where it matters."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from client.adapt import row_gradients
from federation.pool.model import PooledModel
from federation.pool.prefix import Prefix, prefix_of
from tests import models
from tests.federation.test_pool import random_rows


def wrapped(make, targets=None):
    return PooledModel.around(make(), rank=4, scale=1.5, target_modules=targets)


def count_calls(module: nn.Module) -> list[str]:
    """Names of the leaf modules that really compute, as they do."""
    calls = []
    for name, child in module.named_modules():
        if not list(child.children()):
            own = type(child).forward

            def counted(self, *args, _own=own, _name=name, **kwargs):
                calls.append(_name)
                return _own(self, *args, **kwargs)

            child.__class__ = type(type(child).__name__, (type(child),), {"forward": counted})
    return calls


UPPER = {
    models.gpt2: ("h.1.mlp.c_fc",),
    models.llama: ("layers.1.self_attn.q_proj",),
    models.bert: ("layer.1.attention.self.query",),
    models.mlp: ("2",),
}
"""A layer of the upper half of each model."""


@pytest.mark.parametrize("make", UPPER)
@pytest.mark.parametrize("upper", [False, True])
def test_steps_on_the_same_batch_give_the_same_gradients_with_and_without(make, upper):
    base = make()
    calls = count_calls(base.module)
    model = PooledModel.around(base, rank=4, scale=1.5, target_modules=UPPER[make] if upper else None)
    batch, prefix = models.batch_for(model.base, 3, 2), Prefix()
    for seed in range(3):
        rows = random_rows(model, 3, 2, seed)
        calls.clear()
        loss_u, gradients = row_gradients(model, rows, batch)
        plain = len(calls)
        calls.clear()
        with prefix.remembered():
            again_u, again = row_gradients(model, rows, batch)
        assert (len(calls) < plain) == (seed > 0 and (upper or make is not models.mlp))
        torch.testing.assert_close(again_u, loss_u)
        torch.testing.assert_close(again, gradients)


def test_blocks_below_the_first_adapted_layer_compute_once():
    base = models.gpt2()
    calls = count_calls(base.module)
    model = PooledModel.around(base, rank=4, scale=1.5, target_modules=("h.1.mlp.c_fc",))
    batch, prefix = models.batch_for(model.base, 2, 2), Prefix()
    for step in range(3):
        calls.clear()
        with prefix.remembered():
            row_gradients(model, random_rows(model, 2, 2, step), batch)
        assert any(".h.0." in name for name in calls) == (step == 0)
        assert any("wte" in name for name in calls) == (step == 0)
        assert "transformer.h.1.mlp.c_proj" in calls  # above the first adapted layer: every time


def test_without_gradients_nothing_is_remembered():
    """There it cannot be told what depends on rows: a layer above adapted ones would answer with old values."""
    model = wrapped(models.gpt2)
    batch, prefix = models.batch_for(model.base, 2, 2), Prefix()
    losses = []
    with torch.no_grad():
        for seed in (1, 2):
            with prefix.remembered(), model.bound(random_rows(model, 2, 2, seed)):
                losses.append(model.loss(batch))
    assert not losses[0].equal(losses[1])


def test_an_output_that_was_changed_in_place_is_computed_anew():
    prefix, outputs = Prefix(), []
    for _ in range(3):
        with prefix.remembered():
            outputs.append(prefix.recall("a", lambda: torch.ones(2)))
            outputs[-1].mul_(5.0)
    assert [o.tolist() for o in outputs] == [[5.0, 5.0]] * 3


def test_what_may_hide_a_trained_tensor_is_not_remembered():
    @dataclass
    class Cache:
        keys: torch.Tensor

    prefix, trained = Prefix(), torch.ones(2, requires_grad=True)
    with prefix.remembered():
        assert prefix_of(torch.ones(2), (None, 3, "x"), {"mask": torch.ones(2)}) is prefix
        assert prefix_of(torch.ones(2), {"state": [trained]}) is None
        assert prefix_of(torch.ones(2), Cache(trained)) is None
    assert prefix_of(torch.ones(2)) is None


def test_a_forward_that_someone_else_put_in_place_is_left_alone():
    base = models.mlp()
    base.module[1].forward = lambda x: 2.0 * x
    PooledModel.around(base, rank=2, scale=1.0)
    assert base.module[1](torch.ones(1)).item() == 2.0


def test_calls_of_one_module_are_told_apart():
    prefix = Prefix()
    for _ in range(2):
        with prefix.remembered():
            assert [prefix.recall("a", lambda i=i: i) for i in range(3)] == [0, 1, 2]


def test_a_copy_of_a_wrapped_model_uses_its_own_weights():
    model = wrapped(models.gpt2)
    copied = copy.deepcopy(model.base.module)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    inputs, targets = models.batch_for(model.base, 1, 1).flat()
    assert copied(input_ids=inputs).logits.abs().max() == 0
    assert model.base.loss(model.base.module, inputs, targets).isfinite().all()
