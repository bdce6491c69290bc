"""The control that trains nothing: a user's own examples vote on its test part, over the frozen base's features."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from federation.data.population import Batch
from federation.pool.model import PooledModel
from simulations.controls import nearest_neighbours


def classes_of(model: PooledModel) -> int:
    """How many classes a base with a head tells apart."""
    return next(m.d_out for m in model.spec.modules if m.name == model.base.head)


@torch.no_grad()
def votes(model: PooledModel, support: Batch, test: Batch, neighbours: int) -> tuple[Tensor, Tensor, float]:
    """Each user's mean loss in nats and share of right answers on its test part (U,) twice, and the seconds it took."""
    started = time.perf_counter()
    seen, asked = model.example_features(support), model.example_features(test)
    chance_umc = nearest_neighbours(seen, support.targets, support.weight, asked, neighbours, classes_of(model))
    loss_um = -chance_umc.gather(2, test.targets[..., None]).squeeze(2).log()
    right_um = (chance_umc.argmax(2) == test.targets).float()
    share_um = test.weight / test.weight.sum(1, keepdim=True).clamp_min(1e-12)
    return (loss_um * share_um).sum(1), (right_um * share_um).sum(1), time.perf_counter() - started
