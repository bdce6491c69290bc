"""Exploration: now and then a mask is drawn for the units that are rarely used, not as the policy would.

A mask comes from beta = (1 - share) * pi + share * toward, and a whole mask is explored or not. An estimate of the
policy's gradient weighs it by pi / beta: without this weight, exploration biases the gradient.

Shapes: U users, K masks per user, G units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from federation.errors import ConfigError
from federation.mask_distribution import MaskDistribution


@dataclass(frozen=True)
class Exploration:
    """share: of the masks that explore. toward: what these are drawn from; of one user, it serves all.

    Raises ConfigError unless 0 <= share < 1.
    """

    share: float
    toward: MaskDistribution

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ConfigError(f"exploration is a share of the masks within [0, 1), got {self.share}")

    def sample(self, distribution: MaskDistribution, uniform_ukg: Tensor, coin_uk: Tensor) -> tuple[Tensor, Tensor]:
        """Masks from beta, and their log importance weights.

        Shapes: uniform_ukg (U, K, G) and coin_uk (U, K) in (0, 1); masks (U, K, G) bool, log pi - log beta (U, K).
        """
        explores_uk = coin_uk < self.share
        masks_ukg = distribution.sample(uniform_ukg)
        some_u = explores_uk.any(1).nonzero().squeeze(1)  # few: drawing both ways for all would cost twice
        toward = self.toward.take(torch.zeros_like(some_u)).sample(uniform_ukg[some_u])
        masks_ukg[some_u] = torch.where(explores_uk[some_u, :, None], toward, masks_ukg[some_u])
        return masks_ukg, self.log_importance(distribution, masks_ukg)

    def log_importance(self, distribution: MaskDistribution, masks_ukg: Tensor) -> Tensor:
        """log pi(mask) - log beta(mask), at most -log(1 - share): (U, K, G) -> (U, K)."""
        return log_weight(distribution.log_prob(masks_ukg), self.toward.log_prob(masks_ukg), self.share)


def log_weight(log_pi: Tensor, log_toward: Tensor, share: float) -> Tensor:
    """log pi - log beta of what was drawn from beta = (1 - share) pi + share toward: any shapes that broadcast."""
    explored = log_toward + (math.log(share) if share else -math.inf)
    return log_pi - torch.logaddexp(log_pi + math.log1p(-share), explored)


def rarely_used(load_g: Tensor, share: float) -> Tensor:
    """Logits (1, G) that favour units by how rarely they are used: log(mean load / load), at most log 11, and a shift.

    load_g: how often each unit is chosen, as any measure that is zero for never. Equal loads give equal logits, so do
    loads of zero. share: of units that are active on average where each is active on its own; the shift sees to it.
    """
    used_g = load_g.clamp_min(0.0)
    mean = used_g.mean()
    floor = 0.1 * mean + torch.finfo(load_g.dtype).tiny
    logits_g = ((mean + floor) / (used_g + floor)).log()
    low, high = torch.full_like(mean, -40.0), torch.full_like(mean, 40.0)
    for _ in range(40):  # bisection: the mean of the probabilities grows with the shift
        middle = (low + high) / 2
        below = torch.sigmoid(logits_g + middle).mean() < share
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (logits_g + low)[None]
