"""Our tanh GELU against transformers' and PyTorch's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import NewGELUActivation

from federation.activations import TanhGelu, tanh_gelu, with_fast_activations
from tests import models

SHAPES = [(), (0, 4), (3,), (2, 5, 7), (300, 512)]
"""Of no element, one, a few, and more than two tiles."""


def with_gradient(f, x, gradient):
    x = x.clone().requires_grad_()
    y = f(x)
    return y.detach(), torch.autograd.grad(y, x, gradient)[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_are_those_of_pytorch_in_float64(shape):
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.randn(shape, dtype=torch.float64, generator=generator)
    gradient = torch.randn(shape, dtype=torch.float64, generator=generator)
    ours = with_gradient(tanh_gelu, x, gradient)
    theirs = with_gradient(lambda x: F.gelu(x, approximate="tanh"), x, gradient)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_lower_precisions_differ_by_rounding(dtype, tolerance):
    x = torch.cat((torch.linspace(-12, 12, 70_001), torch.tensor([-1000.0, 1000.0]))).to(dtype)
    exact_value, exact_slope = with_gradient(NewGELUActivation(), x.double(), torch.ones(len(x), dtype=torch.float64))
    value, slope = with_gradient(tanh_gelu, x, torch.ones_like(x))
    assert value.dtype == slope.dtype == dtype
    torch.testing.assert_close(value.double(), exact_value, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=tolerance, atol=tolerance)


def test_far_from_zero_it_is_the_identity_or_nothing():
    x = torch.tensor([-1e12, -100.0, 0.0, 100.0, 1e12])
    value, slope = with_gradient(tanh_gelu, x, torch.ones_like(x))
    assert value.tolist() == [0.0, 0.0, 0.0, 100.0, x[4].item()]
    assert slope.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_a_tensor_that_is_not_contiguous_keeps_its_meaning():
    x, gradient = torch.randn(6, 8).t(), torch.randn(6, 8).t()
    torch.testing.assert_close(
        with_gradient(tanh_gelu, x, gradient), with_gradient(lambda x: F.gelu(x, approximate="tanh"), x, gradient)
    )


def test_a_second_backward_is_refused_not_wrong():
    x = torch.randn(4, requires_grad=True)
    y = tanh_gelu(x)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)


def test_a_models_activations_are_replaced_and_compute_the_same():
    base = models.gpt2()
    fast = with_fast_activations(copy.deepcopy(base.module))
    assert sum(isinstance(m, TanhGelu) for m in fast.modules()) == 2
    inputs, targets = models.batch_for(base, 2, 3).flat()
    torch.testing.assert_close(base.loss(fast, inputs, targets), base.loss(base.module, inputs, targets))
