"""How much each entry of U users' rows matters to what they learned: the diagonal of the empirical Fisher."""

from __future__ import annotations

import torch
from torch import Tensor

from client.personal import ActiveRows
from federation.data.population import Batch
from federation.pool.model import PooledModel
from federation.pool.spec import Rows

_PART = 64
"""Most examples whose gradients are held at a time: each takes as much memory as a user's rows."""


def fisher(model: PooledModel, active: ActiveRows, rows: Rows, examples: Batch) -> dict[str, Tensor]:
    """The mean of the squared gradients of the users' own examples, by weight: {section: (U, k, d_in + d_out)}.

    Empirical: of the targets that users have, not of such as the model would draw (Kirkpatrick et al., 2017, sample
    neither). Zero for padding, and for a user without examples. An example is a "user" of its own for the model.
    """
    total = {name: torch.zeros_like(row) for name, row in rows.items()}
    window = max(1, _PART // examples.users)
    for first in range(0, examples.weight.shape[1], window):
        part = examples.window(first, first + window)
        for name, squared in _squared_gradients(model, rows, part).items():
            total[name] += torch.einsum("un,unkw->ukw", part.weight, squared)
    weight_u = examples.weight.sum(1).clamp_min(1e-12)
    return {
        m.section: (total[m.section] / weight_u[:, None, None]).where(active.units.valid_ujk[:, j, :, None], 0.0)
        for j, m in enumerate(active.spec.modules)
    }


def _squared_gradients(model: PooledModel, rows: Rows, examples: Batch) -> dict[str, Tensor]:
    """{section: (U, N, k, d_in + d_out)}."""
    shape = examples.weight.shape
    leaves = {name: row.detach().repeat_interleave(shape[1], 0).requires_grad_() for name, row in rows.items()}
    inputs, targets = examples.flat()
    alone = Batch(inputs[:, None], targets[:, None], torch.ones_like(examples.weight).view(-1, 1))
    with torch.enable_grad(), model.bound(leaves):
        loss = model.loss(alone).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {
        name: gradient.square().view(*shape, *gradient.shape[1:])
        for name, gradient in zip(leaves, gradients, strict=True)
    }
