"""What a user's work costs in multiplications and additions, and how fast this machine's matrix product is."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from simulations.benchmarks.clock import seconds
from simulations.benchmarks.peers.naive import PlainModel
from simulations.benchmarks.workloads import task

_SIZE = 1024
_PRODUCTS = 30


def flops_per_user(workload: str) -> int:
    """Floating-point operations of matrix products that one user's steps need; a multiply-add is two.

    Counted as the plain loop runs: no gradient for frozen weights, none below the first adapted layer, nothing
    computed twice. Attention counts as its whole matrices, causal or not. Element-wise work does not count.
    """
    given = task(workload, 1)
    model = PlainModel(given.workload, given.spec)
    # The fused attention of the CPU is no matrix product to the counter; its plain form is.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.train(given.values, given.active(0), given.data.inputs[0], given.data.targets[0])
    return int(counter.get_total_flops())


def gemm_job(_: Any) -> tuple[None, float]:
    """Operations per second of fp32 products of 1024 x 1024 matrices on this worker: the best of many."""
    a, b = torch.randn(_SIZE, _SIZE), torch.randn(_SIZE, _SIZE)
    product = torch.empty(_SIZE, _SIZE)
    fastest = min(seconds(lambda: torch.mm(a, b, out=product)) for _ in range(_PRODUCTS))
    return None, 2 * _SIZE**3 / fastest
