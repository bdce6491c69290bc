"""The stacked pool against a plain loop over users, against the base model, and against finite differences."""

import pytest
import torch
from torch import nn

from federation.errors import PoolError
from federation.pool.kernel import StackedLowRank
from federation.pool.layers import PoolLayer
from federation.pool.model import PooledModel
from federation.pool.spec import gather, rows_of_mask
from tests import models

SCALE = 1.5
MODELS = [models.gpt2, models.llama, models.bert, models.mlp]


def random_rows(model, users, k, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {m.section: 0.3 * torch.randn(users, k, m.width, generator=generator) for m in model.spec.modules}


@pytest.mark.parametrize("make", MODELS)
def test_a_block_of_users_equals_a_loop_over_users(make):
    users, k = 3, 2
    model = PooledModel.around(make(), rank=4, scale=SCALE)
    rows = {name: row.requires_grad_() for name, row in random_rows(model, users, k).items()}
    batch = models.batch_for(model.base, users, 4)
    with model.bound(rows):
        loss_u = model.loss(batch)
    gradients = dict(zip(rows, torch.autograd.grad(loss_u.sum(), list(rows.values())), strict=True))
    for u in range(users):
        base = make()
        layers = models.with_plain_lora(base, {m.name: rows[m.section][u].detach() for m in model.spec.modules}, SCALE)
        loss = base.loss(base.module, batch.inputs[u], batch.targets[u]).mean()
        loss.backward()
        torch.testing.assert_close(loss_u[u].detach(), loss.detach(), rtol=1e-5, atol=1e-6)
        for layer, m in zip(layers, model.spec.modules, strict=True):
            plain = torch.cat((layer.down.grad, layer.up.grad), 1)
            torch.testing.assert_close(gradients[m.section][u], plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", MODELS)
def test_without_units_it_is_exactly_the_base_model(make):
    base = make()
    batch = models.batch_for(base, 2, 3)
    inputs, targets = batch.flat()
    expected = base.loss(base.module, inputs, targets)
    model = PooledModel.around(base, rank=4, scale=SCALE)
    assert base.loss(base.module, inputs, targets).equal(expected)
    no_rows = {name: torch.zeros_like(row) for name, row in random_rows(model, 2, 2).items()}
    with model.bound(no_rows):
        torch.testing.assert_close(base.loss(base.module, inputs, targets), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("make", [models.gpt2, models.mlp])
def test_gated_pool_with_a_0_1_gate_equals_the_gathered_rows(make):
    model = PooledModel.around(make(), rank=5, scale=SCALE)
    values = {name: row[0] for name, row in random_rows(model, 1, 5).items()}
    mask = torch.rand(3, model.spec.units, generator=torch.Generator().manual_seed(0)) < 0.4
    batch = models.batch_for(model.base, 3, 2)
    with model.gated(values, mask.float()):
        gated = model.loss(batch)
    ids, valid = rows_of_mask(mask, len(model.spec.modules), 5)
    with model.bound(gather(values, model.spec, ids, valid)):
        torch.testing.assert_close(model.loss(batch), gated, rtol=1e-5, atol=1e-6)


def test_rows_of_mask_lists_each_modules_units_in_order():
    mask = torch.tensor([[0, 1, 0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0, 0, 0]], dtype=torch.bool)
    ids, valid = rows_of_mask(mask, 2, 3)
    assert [[ids[u, j][valid[u, j]].tolist() for j in range(2)] for u in range(2)] == [[[1, 3], [0, 1, 2]], [[], [0]]]


def test_bindings_of_two_threads_never_meet():
    import threading

    model = PooledModel.around(models.gpt2(), rank=4, scale=SCALE)
    batch = models.batch_for(model.base, 1, 2)
    mine, other = random_rows(model, 1, 2, seed=1), random_rows(model, 1, 2, seed=2)
    with model.bound(mine):
        alone = model.loss(batch)
        thread = threading.Thread(target=lambda: model.bound(other).__enter__())
        thread.start()
        thread.join()
        assert model.loss(batch).equal(alone)


def test_the_fast_layer_refuses_a_second_backward():
    x, rows = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 1, 9, requires_grad=True)
    y = StackedLowRank.apply(x, torch.randn(4, 5), torch.zeros(5), rows, 1.0, None)
    (gradient,) = torch.autograd.grad(y.square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_fast_layers_gradient_matches_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    rows = torch.randn(2, 2, 9, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    bias = torch.randn(5, dtype=torch.float64, generator=generator)
    for b in (bias, None):
        assert torch.autograd.gradcheck(
            lambda x, rows, b=b: StackedLowRank.apply(x, weight, b, rows, 1.3, None), (x, rows)
        )


def test_a_base_output_that_is_known_changes_nothing_and_stays_as_it_is():
    x, rows = torch.randn(2, 3, 4), torch.randn(2, 1, 9, requires_grad=True)
    weight, bias = torch.randn(4, 5), torch.randn(5)
    known = torch.addmm(bias, x.view(6, 4), weight).view(2, 3, 5)
    before = known.clone()
    anew = StackedLowRank.apply(x, weight, bias, rows, 1.3, None)
    recalled = StackedLowRank.apply(x, weight, bias, rows, 1.3, known)
    torch.testing.assert_close(recalled, anew)
    (a,) = torch.autograd.grad(anew.square().sum(), rows)
    (b,) = torch.autograd.grad(recalled.square().sum(), rows)
    torch.testing.assert_close(a, b)
    assert known.equal(before)


def test_bad_input_is_named():
    with pytest.raises(PoolError, match="match no linear layer"):
        PooledModel.around(models.gpt2(), rank=4, scale=1.0, target_modules=("c_atn",))
    with pytest.raises(PoolError, match=r"only nn\.Linear and Conv1D"):
        PooledModel.around(models.gpt2(), rank=4, scale=1.0, target_modules=("wte",))
    model = PooledModel.around(models.gpt2(), rank=4, scale=1.0)
    rows = random_rows(model, 2, 1)
    with pytest.raises(PoolError, match="another pool"):
        model.bound({name: row[..., :-1] for name, row in rows.items()})
    with model.bound(rows), pytest.raises(PoolError, match="same number of examples"):
        model.base.module(input_ids=torch.zeros(3, 4, dtype=torch.long))
    with pytest.raises(PoolError, match="another pool"):
        model.gated({}, torch.ones(2, 3))


@pytest.mark.parametrize("targets", [("c_attn", "ln_f"), ("c_attn", "c_fc", "wte"), ("c_atn",)])
def test_targets_that_cannot_be_wrapped_change_nothing(targets):
    base = models.gpt2()
    before = {name: (type(module), module.forward) for name, module in base.module.named_modules()}
    with pytest.raises(PoolError):
        PooledModel.around(base, rank=4, scale=1.0, target_modules=targets)
    assert {name: (type(module), module.forward) for name, module in base.module.named_modules()} == before
    assert PooledModel.around(base, rank=4, scale=1.0).spec.modules


@pytest.mark.parametrize("make", MODELS)
def test_what_is_planned_is_what_is_wrapped(make):
    base = make()
    planned = PooledModel.planned(base, 4, SCALE)
    assert not [m for m in base.module.modules() if isinstance(m, PoolLayer)]
    wrapped = PooledModel.around(base, 4, SCALE)
    layers = {name: m for name, m in base.module.named_modules() if isinstance(m, PoolLayer)}
    assert [(name, m.d_in, m.d_out) for name, m in layers.items()] == [
        (m.name, m.d_in, m.d_out) for m in wrapped.spec.modules
    ]
    by_name = tuple(layers)
    assert planned == wrapped == PooledModel.planned(base, 4, SCALE) == PooledModel.planned(base, 4, SCALE, by_name)
    assert len(PooledModel.planned(base, 4, SCALE, by_name[:1]).spec.modules) == 1


def test_a_model_is_wrapped_once():
    base = models.gpt2()
    model = PooledModel.around(base, rank=4, scale=1.0)
    with pytest.raises(PoolError, match="PoolLayer"):
        PooledModel.around(base, rank=4, scale=1.0)
    batch = models.batch_for(base, 2, 1)
    with model.bound(random_rows(model, 2, 1)):
        model.loss(batch)


def test_any_local_path_loads_through_from_pretrained(tmp_path):
    from federation.base import causal_lm

    models.llama().module.save_pretrained(tmp_path)
    loaded = causal_lm(tmp_path, ("q_proj",))
    assert PooledModel.around(loaded, rank=2, scale=1.0).spec.modules[0].name == "model.layers.0.self_attn.q_proj"
    assert not any(p.requires_grad for p in loaded.module.parameters())
    assert isinstance(loaded.module, nn.Module)
