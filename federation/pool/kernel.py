"""The stacked low-rank layer: U users' rows in one computation, the frozen base as one GEMM over all their tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class StackedLowRank(torch.autograd.Function):
    """y_u = x_u W + b + s * (x_u down_u^T) up_u, with W and b frozen.

    Shapes: x (U, n, d_in), weight (d_in, d_out), bias (d_out,), rows (U, k, d_in + d_out), result (U, n, d_out).
    Against plain autograd it saves the base's weight gradient and two temporaries per call. Its backward reads
    saved tensors as constants, so a second backward would be wrong: it is refused (`once_differentiable`).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, scale: float) -> Tensor:
        users, tokens, d_in = x.shape
        down, up = rows[..., :d_in], rows[..., d_in:]
        hidden = torch.bmm(x, down.transpose(1, 2))
        y = torch.addmm(bias, x.reshape(users * tokens, d_in), weight).view(users, tokens, -1)
        y.baddbmm_(hidden, up, alpha=scale)
        ctx.save_for_backward(x, weight, rows, hidden)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        x, weight, rows, hidden = ctx.saved_tensors
        users, tokens, d_in = x.shape
        down, up = rows[..., :d_in], rows[..., d_in:]
        dy = dy.contiguous()
        d_hidden = torch.bmm(dy, up.transpose(1, 2)).mul_(ctx.scale)
        d_x = d_rows = None
        if ctx.needs_input_grad[3]:
            d_rows = torch.empty_like(rows)
            d_rows[..., :d_in] = torch.bmm(d_hidden.transpose(1, 2), x)
            d_rows[..., d_in:] = torch.bmm(hidden.transpose(1, 2), dy).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            d_x = torch.mm(dy.view(users * tokens, -1), weight.t()).view(users, tokens, d_in)
            d_x.baddbmm_(d_hidden, down)
        return d_x, None, None, d_rows, None


def stacked_low_rank(x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, scale: float) -> Tensor:
    """`StackedLowRank`, with types."""
    return StackedLowRank.apply(x, weight, bias, rows, scale)  # type: ignore[no-untyped-call, no-any-return]


def gated_low_rank(x: Tensor, y: Tensor, rows: Tensor, gates_ur: Tensor, scale: float) -> Tensor:
    """y + s * sum_r gate_ur (x . down_r) up_r, where all users share the rows.

    Shapes: x (U, n, d_in), y (U, n, d_out), rows (R, d_in + d_out), gates (U, R), result (U, n, d_out).
    """
    d_in = x.shape[-1]
    hidden = (x @ rows[:, :d_in].t()) * gates_ur[:, None, :]
    return y + (hidden @ rows[:, d_in:]) * scale
