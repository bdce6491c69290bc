"""The stacked low-rank layer: U users' rows in one computation, the frozen base as one GEMM over all their tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class StackedLowRank(torch.autograd.Function):
    """y_u = base_u + s * (x_u down_u^T) up_u, with base_u = x_u W + b frozen.

    Shapes: x (U, n, d_in), weight (d_in, d_out), bias (d_out,) or None, rows (U, k, d_in + d_out), y (U, n, d_out).
    base: x W + b, if it is known already (it is left as it is), else None.

    x and the weight may be bfloat16: then the rows are rounded for the products, whose sums are of float32. The rows
    themselves stay float32, and so does the sum of their gradients over steps.
    Against plain autograd it saves the base's weight gradient and two temporaries per call. Its backward reads
    saved tensors as constants, so a second backward would be wrong: it is refused (`once_differentiable`).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, scale: float, base: Tensor | None
    ) -> Tensor:
        users, tokens, d_in = x.shape
        used = rows.to(x.dtype)
        down, up = used[..., :d_in], used[..., d_in:]
        hidden = torch.bmm(x, down.transpose(1, 2))
        if base is None:
            flat = x.reshape(users * tokens, d_in)
            y = torch.mm(flat, weight) if bias is None else torch.addmm(bias, flat, weight)
            y = y.view(users, tokens, -1).baddbmm_(hidden, up, alpha=scale)
        else:
            y = torch.baddbmm(base, hidden, up, alpha=scale)
        ctx.save_for_backward(x, weight, used, hidden)
        ctx.scale, ctx.rows_dtype = scale, rows.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None, None]:
        x, weight, rows, hidden = ctx.saved_tensors
        users, tokens, d_in = x.shape
        down, up = rows[..., :d_in], rows[..., d_in:]
        dy = dy.contiguous()
        d_hidden = torch.bmm(dy, up.transpose(1, 2)).mul_(ctx.scale)
        d_x = d_rows = None
        if ctx.needs_input_grad[3]:
            d_rows = torch.empty_like(rows, dtype=ctx.rows_dtype)
            d_rows[..., :d_in] = torch.bmm(d_hidden.transpose(1, 2), x)
            d_rows[..., d_in:] = torch.bmm(hidden.transpose(1, 2), dy)
            d_rows[..., d_in:].mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            d_x = torch.mm(dy.view(users * tokens, -1), weight.t()).view(users, tokens, d_in)
            d_x.baddbmm_(d_hidden, down)
        return d_x, None, None, d_rows, None, None


def stacked_low_rank(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, scale: float, base: Tensor | None = None
) -> Tensor:
    """`StackedLowRank`, with types."""
    return StackedLowRank.apply(x, weight, bias, rows, scale, base)  # type: ignore[no-untyped-call, no-any-return]


def plain_low_rank(x: Tensor, base: Tensor, rows: Tensor, scale: float) -> Tensor:
    """What `stacked_low_rank` gives, by operations that autograd differentiates as often as asked.

    Shapes: x (U, n, d_in), base (U, n, d_out), rows (U, k, d_in + d_out), result (U, n, d_out).
    """
    used = rows.to(x.dtype)
    down, up = torch.split(used, [x.shape[2], base.shape[2]], 2)
    return torch.baddbmm(base, _hidden(x, down), up, alpha=scale)


def _hidden(x: Tensor, down: Tensor) -> Tensor:
    return _Hidden.apply(x, down)  # type: ignore[no-untyped-call, no-any-return]


class _Hidden(torch.autograd.Function):
    """x_u down_u^T as `torch.bmm`, with gradients whose own gradients with respect to x lie in memory as x does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(x, down)
        return torch.bmm(x, down.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, d_hidden: Tensor) -> tuple[Tensor | None, Tensor]:
        x, down = ctx.saved_tensors
        d_x = torch.bmm(d_hidden, down) if ctx.needs_input_grad[0] else None
        return d_x, torch.bmm(d_hidden.transpose(1, 2), x)


def gated_low_rank(x: Tensor, y: Tensor, rows: Tensor, gates_ur: Tensor, scale: float) -> Tensor:
    """y + s * sum_r gate_ur (x . down_r) up_r, where all users share the rows. y, of the base, is added to in place.

    Shapes: x (U, n, d_in), y (U, n, d_out), rows (R, d_in + d_out), gates (U, R), result (U, n, d_out).
    """
    d_in = x.shape[-1]
    used = rows.to(x.dtype)
    hidden = (x @ used[:, :d_in].t()) * gates_ur[:, None, :].to(x.dtype)
    return y.flatten(0, 1).addmm_(hidden.flatten(0, 1), used[:, d_in:], alpha=scale).view_as(y)
