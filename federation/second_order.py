"""Where gradients are differentiated again: adapters, activations and attention in forms that allow it.

The fast forms read saved tensors as constants, and PyTorch's fused attention has no second derivative on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch.nn.attention import SDPBackend, sdpa_kernel

_ASKED: ContextVar[bool] = ContextVar("fedquilt_second_order", default=False)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """For the forward passes made inside, whose gradients will be differentiated again."""
    token = _ASKED.set(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _ASKED.reset(token)


def is_twice_differentiable() -> bool:
    """Whether plain forms are asked for."""
    return _ASKED.get()
