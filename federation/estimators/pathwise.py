"""Pathwise estimators: the reward's own gradient with respect to the mask, carried on to the logits. Biased.

They evaluate no masks: every sample costs a forward and a backward pass through all units.

Shapes: U users, K masks per user, G units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from federation.errors import ConfigError
from federation.estimators.protocol import Draws, Estimate, Objective
from federation.estimators.score import BOTH, draw_masks
from federation.exploration import Exploration
from federation.gate_config import DistributionKind
from federation.mask_distribution import MaskDistribution


@dataclass(frozen=True)
class StraightThrough:
    """The reward's gradient at the sampled mask, as if the mask were its own mean (Bengio, Leonard and Courville,
    "Estimating or propagating gradients through stochastic neurons", 2013).

    gamma = Cov(m) mean over k of w_k dR/dm(m_k): what autograd gives for R(m + inclusion - detached inclusion), for
    every kind of distribution. w = pi / beta, so exploration adds no bias to the surrogate's.
    """

    distributions: ClassVar[tuple[DistributionKind, ...]] = BOTH
    differentiable: ClassVar[bool] = True
    tries_masks: ClassVar[bool] = False
    unbiased: ClassVar[bool] = False
    fewest: ClassVar[int] = 1
    multiple: ClassVar[int] = 1

    def estimate(
        self, distribution: MaskDistribution, objective: Objective, exploration: Exploration, samples: int, draws: Draws
    ) -> Estimate:
        masks_ukg, weight_uk = draw_masks(distribution, exploration, samples, draws)
        reward_uk, slope_ukg = _reward_gradients(objective, masks_ukg.to(distribution.logits_ug))
        slope_ug = torch.einsum("uk,ukg->ug", weight_uk, slope_ukg) / samples
        return Estimate(distribution.covariance_times(slope_ug), masks_ukg[:, 0], reward_uk)


@dataclass(frozen=True)
class HardConcrete:
    """Gates relaxed to [0, 1], with a mass at both ends (Louizos, Welling and Kingma, "Learning sparse neural networks
    through L0 regularization", 2018).

    With a uniform number u, s = sigmoid((l - logit(u)) / temperature) and z = s stretched to
    [-stretch, 1 + stretch] and clipped to [0, 1]; gamma = mean over k of dR/dz dz/dl. A gate rounds to the unit of
    the mask that the same u gives, [u < sigmoid(l)], which is the one trained unless it explores; the gates
    themselves come from the policy and need no importance weight.

    Raises ConfigError for an option out of range.
    """

    temperature: float = 2 / 3
    stretch: float = 0.1

    distributions: ClassVar[tuple[DistributionKind, ...]] = ("bernoulli",)
    differentiable: ClassVar[bool] = True
    tries_masks: ClassVar[bool] = False
    unbiased: ClassVar[bool] = False
    fewest: ClassVar[int] = 1
    multiple: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not self.stretch >= 0:
            raise ConfigError(
                f"hard_concrete needs temperature > 0 and stretch >= 0, got {self.temperature} and {self.stretch}; "
                "correct its options"
            )

    def estimate(
        self, distribution: MaskDistribution, objective: Objective, exploration: Exploration, samples: int, draws: Draws
    ) -> Estimate:
        logits_ug = distribution.logits_ug
        uniform_ukg = draws.uniform("mask", (samples, logits_ug.shape[1]))
        coin_uk = draws.uniform("explore", (samples,))
        masks_u1g, _ = exploration.sample(distribution, uniform_ukg[:, :1], coin_uk[:, :1])
        relaxed_ukg = torch.sigmoid((logits_ug[:, None] - torch.logit(uniform_ukg)) / self.temperature)
        width = 1 + 2 * self.stretch
        stretched_ukg = width * relaxed_ukg - self.stretch
        reward_uk, slope_ukg = _reward_gradients(objective, stretched_ukg.clamp(0, 1))
        inside_ukg = (stretched_ukg > 0) & (stretched_ukg < 1)
        change_ukg = torch.where(inside_ukg, relaxed_ukg * (1 - relaxed_ukg), 0.0) * (width / self.temperature)
        return Estimate((slope_ukg * change_ukg).mean(1), masks_u1g[:, 0], reward_uk)


def _reward_gradients(objective: Objective, strength_ukg: Tensor) -> tuple[Tensor, Tensor]:
    """The reward and its gradient at each of K strengths, one after the other: (U, K) and (U, K, G)."""
    reward_u, slope_ug = zip(*(objective.reward_gradient(strength_ug) for strength_ug in strength_ukg.unbind(1)))
    return torch.stack(reward_u, 1), torch.stack(slope_ug, 1)
