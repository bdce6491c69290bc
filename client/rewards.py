"""What masks are worth to U users: the quality on their query part, with the pool's rows as they are or adapted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from client.adapt import sgd
from federation.data.population import Batch
from federation.pool.model import PooledModel
from federation.pool.spec import gather, rows_of_mask
from federation.qualities import Quality
from federation.update import Values

_TOGETHER = 32
"""Masks that are judged in one computation: of many more, activations leave the cache."""


@dataclass(frozen=True)
class Adaptation:
    """Steps of SGD that a mask's rows take before they are judged; none with steps = 0."""

    batches: Sequence[Batch]
    steps: int
    learning_rate: float


@dataclass(frozen=True)
class MaskReward:
    """An estimator's `Objective`: the quality on `query` of U users' rows, after their adaptation."""

    model: PooledModel
    values: Values
    query: Batch
    quality: Quality
    adaptation: Adaptation

    def reward(self, masks_ukg: Tensor) -> Tensor:
        """(U, K, G) bool -> (U, K), stacked, some users with all of their masks at a time."""
        users, samples, _ = masks_ukg.shape
        parts = torch.split(torch.arange(users), max(1, _TOGETHER // samples))
        return torch.cat([self._reward_of(part, masks_ukg[part]) for part in parts])

    def reward_gradient(self, strength_ug: Tensor) -> tuple[Tensor, Tensor]:
        """The quality with every unit on at `strength_ug`, without adaptation, and its gradient: (U,), (U, G)."""
        gates_ug = strength_ug.detach().clone().requires_grad_()
        with self.model.gated(self.values, gates_ug):
            quality_u = self.model.quality(self.query, self.quality)
        return quality_u.detach(), torch.autograd.grad(quality_u.sum(), gates_ug)[0]

    def _reward_of(self, users: Tensor, masks_ukg: Tensor) -> Tensor:
        """The rewards of some users' masks, by position: (U, K)."""
        repeated = users.repeat_interleave(masks_ukg.shape[1])
        rows = self._adapted(self._rows(masks_ukg.flatten(0, 1)), repeated)
        with torch.no_grad(), self.model.bound(rows):
            return self.model.quality(self.query.take(repeated), self.quality).view(masks_ukg.shape[:2])

    def _rows(self, masks_ng: Tensor) -> dict[str, Tensor]:
        modules = len(self.model.spec.modules)
        most = int(masks_ng.view(len(masks_ng), modules, -1).sum(2).max())
        return gather(self.values, self.model.spec, *rows_of_mask(masks_ng, modules, max(most, 1)))

    def _adapted(self, rows: dict[str, Tensor], repeated: Tensor) -> Mapping[str, Tensor]:
        if not self.adaptation.steps:
            return rows
        batches = [batch.take(repeated) for batch in self.adaptation.batches]
        return sgd(self.model, rows, batches, self.adaptation.steps, self.adaptation.learning_rate, ("down", "up"))[0]
