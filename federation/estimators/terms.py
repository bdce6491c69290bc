"""Terms of the gate's objective whose gradient is exact, whatever estimates that of the reward. All ascend.

For every kind of distribution, d E[v . m] / d logits = Cov(m) v.

Shapes: U users, G units; results (U, G).
"""

from __future__ import annotations

import torch
from torch import Tensor

from federation.mask_distribution import MaskDistribution


def entropy_bonus(distribution: MaskDistribution, strength: float) -> Tensor:
    """Gradient of strength * entropy (in nats), which keeps units from dying out."""
    return strength * distribution.entropy_gradient()


def price(distribution: MaskDistribution, cost_g: Tensor, price_per_cost: float) -> Tensor:
    """Gradient of -price_per_cost * E[cost . m]; for independent units -price_per_cost * cost_g * p_g (1 - p_g).

    Units of equal cost under a fixed budget have none: every mask costs the same.
    """
    return -price_per_cost * distribution.covariance_times(cost_g.expand_as(distribution.logits_ug))


def balance(distribution: MaskDistribution, load_g: Tensor, strength: float) -> Tensor:
    """Gradient of -strength * E[sum over active units of load_g / mean load - 1]: rarely used units are worth more.

    load_g: how often each unit is chosen, in any unit of measure; below zero (privacy adds noise) counts as zero.
    Loads that are all equal, or zero, have none.
    """
    load_g = load_g.clamp_min(0)
    mean = load_g.mean()
    excess_g = (load_g - mean) / mean.clamp_min(torch.finfo(load_g.dtype).tiny)
    return -strength * distribution.covariance_times(excess_g.expand_as(distribution.logits_ug))
