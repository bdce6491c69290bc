"""bfloat16 against float32: near in losses and gradients, float32 where values live."""

import pytest
import torch

from client.adapt import row_gradients, unit_gains
from federation.errors import ConfigError, PoolError
from federation.pool.model import PooledModel
from federation.precision import _bmm_attention, in_precision
from tests import models
from tests.federation.test_pool import random_rows


def wrapped(make, precision):
    return PooledModel.around(in_precision(make(), precision), rank=4, scale=1.5)


@pytest.mark.parametrize("make", [models.gpt2, models.llama, models.bert, models.mlp])
def test_losses_and_gradients_are_near_those_of_fp32_and_come_as_float32(make):
    exact, lower = wrapped(make, "fp32"), wrapped(make, "bf16")
    rows, batch = random_rows(exact, 3, 2), models.batch_for(exact.base, 3, 4)
    loss_u, gradients = row_gradients(exact, rows, batch)
    near_u, near = row_gradients(lower, rows, batch)
    assert next(lower.base.module.parameters()).dtype == torch.bfloat16
    assert {t.dtype for t in (near_u, *near)} == {torch.float32}
    torch.testing.assert_close(near_u, loss_u, rtol=0.02, atol=0.02)
    for a, b in zip(near, gradients, strict=True):
        assert not a.equal(b)
        assert torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.995


def test_gains_and_features_come_as_float32():
    exact, lower = wrapped(models.gpt2, "fp32"), wrapped(models.gpt2, "bf16")
    values = {name: rows[0] for name, rows in random_rows(exact, 1, 4).items()}
    batch = models.batch_for(exact.base, 3, 4)
    gain, near = (unit_gains(model, values, batch, 0.5) for model in (exact, lower))
    assert near.dtype == torch.float32
    assert torch.cosine_similarity(near.flatten(), gain.flatten(), 0) > 0.99
    assert lower.features(batch).dtype == torch.float32
    torch.testing.assert_close(lower.features(batch), exact.features(batch), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["causal", "mask", "full"])
def test_attention_is_that_of_pytorch(kind):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 5, 8, generator=generator, requires_grad=True) for _ in range(3))
    mask = torch.rand(2, 1, 5, 5, generator=generator) < 0.5
    mask[..., 0] = True
    mask = mask if kind == "mask" else None
    ours, _ = _bmm_attention(torch.nn.Module(), query, key, value, mask, is_causal=kind == "causal")
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, is_causal=kind == "causal")
    torch.testing.assert_close(ours, theirs.transpose(1, 2))
    gradient = torch.randn(ours.shape, generator=generator)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (query, key, value), gradient),
        torch.autograd.grad(theirs, (query, key, value), gradient.transpose(1, 2)),
    )


def test_the_last_tokens_alone_look_back_at_all_keys():
    query, key, value = torch.randn(1, 2, 2, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    ours, _ = _bmm_attention(torch.nn.Module(), query, key, value, None, is_causal=True)
    mask = torch.ones(2, 5, dtype=torch.bool).tril(3)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(ours, theirs.transpose(1, 2))


def test_what_our_attention_does_not_know_is_refused():
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(PoolError, match="softcap"):
        _bmm_attention(torch.nn.Module(), q, q, q, None, softcap=30.0)


def test_rotary_positions_keep_float32_angles():
    base = in_precision(models.llama(), "bf16")
    assert {p.dtype for p in base.module.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in base.module.buffers() if b.is_floating_point()} == {torch.float32}


def test_attention_that_was_asked_for_stays():
    base = models.gpt2()
    base.module.set_attn_implementation("eager")
    assert in_precision(base, "bf16").module.config._attn_implementation == "eager"


def test_fp32_over_narrow_weights_is_refused():
    base = models.gpt2()
    base.module.half()
    with pytest.raises(ConfigError, match=r"loaded with torch\.float16"):
        in_precision(base, "fp32")


def test_fp32_leaves_the_base_as_it_is():
    base = models.gpt2()
    assert in_precision(base, "fp32") is base
