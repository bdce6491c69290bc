"""Score-function estimators: gamma = mean over k of w_k (R(m_k) - baseline) (m_k - inclusion), w = pi / beta.

Masks come from the exploration mixture beta, so each carries its importance weight. All are unbiased as long as a
mask's baseline does not depend on that mask; they differ in the baseline, that is in variance and in what it costs.

Shapes: U users, K masks per user, G units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from federation.errors import ConfigError
from federation.estimators.protocol import Draws, Estimate, Objective
from federation.exploration import Exploration
from federation.gate_config import DistributionKind
from federation.mask_distribution import MaskDistribution

BOTH: tuple[DistributionKind, ...] = ("budget", "bernoulli")


def draw_masks(
    distribution: MaskDistribution, exploration: Exploration, samples: int, draws: Draws
) -> tuple[Tensor, Tensor]:
    """Masks from the exploration mixture, (U, K, G) bool, and their importance weights pi / beta, (U, K)."""
    units = distribution.logits_ug.shape[1]
    uniform_ukg, coin_uk = draws.uniform("mask", (samples, units)), draws.uniform("explore", (samples,))
    masks_ukg, log_weight_uk = exploration.sample(distribution, uniform_ukg, coin_uk)
    return masks_ukg, log_weight_uk.exp()


def score_gradient(distribution: MaskDistribution, masks_ukg: Tensor, coefficient_uk: Tensor) -> Tensor:
    """Mean over K of coefficient * (mask - inclusion): (U, G)."""
    return torch.einsum("uk,ukg->ug", coefficient_uk, distribution.score(masks_ukg)) / masks_ukg.shape[1]


def leave_one_out(reward_uk: Tensor) -> Tensor:
    """Each reward minus the mean of the user's other rewards: (U, K) -> (U, K).

    The baseline of a mask does not depend on that mask, so it adds no bias (Kool, van Hoof and Welling,
    "Buy 4 REINFORCE samples, get a baseline for free!", 2019). Raises ConfigError when K is below 2.
    """
    samples = reward_uk.shape[1]
    if samples < 2:
        raise ConfigError(f"leave-one-out needs at least 2 masks per user, got {samples}; draw more")
    return (reward_uk - reward_uk.mean(1, keepdim=True)) * (samples / (samples - 1))


@dataclass(frozen=True)
class Tried:
    """Masks from the exploration mixture, (U, K, G) bool, their importance weights and their rewards, (U, K) each."""

    masks_ukg: Tensor
    weight_uk: Tensor
    reward_uk: Tensor


class ScoreFunction(ABC):
    """Base of estimators that try masks: they differ in what they make of the rewards."""

    distributions: ClassVar[tuple[DistributionKind, ...]] = BOTH
    differentiable: ClassVar[bool] = False
    tries_masks: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    fewest: ClassVar[int] = 2
    multiple: ClassVar[int] = 1

    @abstractmethod
    def gamma(self, distribution: MaskDistribution, objective: Objective, tried: Tried) -> Tensor:
        """The gradient with respect to the logits: (U, G)."""

    def estimate(
        self, distribution: MaskDistribution, objective: Objective, exploration: Exploration, samples: int, draws: Draws
    ) -> Estimate:
        masks_ukg, weight_uk = draw_masks(distribution, exploration, samples, draws)
        tried = Tried(masks_ukg, weight_uk, objective.reward(masks_ukg))
        return Estimate(self.gamma(distribution, objective, tried), masks_ukg[:, 0], tried.reward_uk)


@dataclass(frozen=True)
class Reinforce(ScoreFunction):
    """REINFORCE with the leave-one-out baseline (Williams, 1992; Kool et al., 2019). K evaluations, unbiased."""

    def gamma(self, distribution: MaskDistribution, objective: Objective, tried: Tried) -> Tensor:
        coefficient_uk = tried.weight_uk * leave_one_out(tried.reward_uk)
        return score_gradient(distribution, tried.masks_ukg, coefficient_uk)


@dataclass(frozen=True)
class ReinforceGain(ScoreFunction):
    """REINFORCE with leave-one-out on what the first-order gain v = dR/dm at the mean mask leaves unexplained.

    gamma = mean over k of w_k LOO(R_k - v . m_k) (m_k - inclusion) + Cov(m) v. The second term is the exact gradient
    of E[v . m], which the first one lacks; v depends on no mask, so it is unbiased for every kind of distribution.
    MuProp's control variate (Gu et al., 2016) without its reward at the mean mask, which leave-one-out replaces.
    K evaluations and one backward pass.
    """

    differentiable: ClassVar[bool] = True

    def gamma(self, distribution: MaskDistribution, objective: Objective, tried: Tried) -> Tensor:
        _, gain_ug = objective.reward_gradient(distribution.inclusion())
        explained_uk = torch.einsum("ug,ukg->uk", gain_ug, tried.masks_ukg.to(gain_ug))
        coefficient_uk = tried.weight_uk * leave_one_out(tried.reward_uk - explained_uk)
        sampled_ug = score_gradient(distribution, tried.masks_ukg, coefficient_uk)
        return sampled_ug + distribution.covariance_times(gain_ug)


@dataclass(frozen=True)
class SelfCritical(ScoreFunction):
    """REINFORCE with the reward of the likeliest mask as baseline (Rennie et al., "Self-critical sequence training",
    2017): what is better than the mask that would be used is reinforced. K + 1 evaluations, unbiased."""

    fewest: ClassVar[int] = 1

    def gamma(self, distribution: MaskDistribution, objective: Objective, tried: Tried) -> Tensor:
        baseline_u1 = objective.reward(distribution.mode()[:, None])
        coefficient_uk = tried.weight_uk * (tried.reward_uk - baseline_u1)
        return score_gradient(distribution, tried.masks_ukg, coefficient_uk)


@dataclass(frozen=True)
class MuProp(ScoreFunction):
    """REINFORCE on what the first-order Taylor expansion at the mean mask leaves (Gu et al., "MuProp", 2016).

    gamma = mean over k of w_k [R(m_k) - R(pi) - v . (m_k - pi)] (m_k - pi) + Cov(m) v, where pi are the inclusion
    probabilities and v = dR/dm there. For independent units Cov(m) v = p (1 - p) v, as in the paper; the covariance
    extends it to a fixed budget. K evaluations and one backward pass, unbiased.
    """

    differentiable: ClassVar[bool] = True
    fewest: ClassVar[int] = 1

    def gamma(self, distribution: MaskDistribution, objective: Objective, tried: Tried) -> Tensor:
        centre_u, gain_ug = objective.reward_gradient(distribution.inclusion())
        expansion_uk = centre_u[:, None] + torch.einsum("ug,ukg->uk", gain_ug, distribution.score(tried.masks_ukg))
        coefficient_uk = tried.weight_uk * (tried.reward_uk - expansion_uk)
        sampled_ug = score_gradient(distribution, tried.masks_ukg, coefficient_uk)
        return sampled_ug + distribution.covariance_times(gain_ug)
