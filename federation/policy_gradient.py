"""Estimators of gamma_ug = dJ_u / d logits_ug, where J is the expected reward of a user's masks.

An estimator is a pure function of a distribution, masks drawn from its exploration mixture, their rewards and
their importance weights. The gate turns gamma into a gradient of its own parameters (`GateSpec.vjp`). All
gradients ascend.

Shapes: U users, K masks per user, G units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from federation.errors import ConfigError
from federation.mask_distribution import Bernoulli, MaskDistribution


def explored(
    distribution: MaskDistribution, exploration: float, uniform_ukg: Tensor, coin_uk: Tensor
) -> tuple[Tensor, Tensor]:
    """Masks from beta = (1 - exploration) * pi + exploration * uniform, and their log importance weights.

    A whole mask is explored or not. Shapes: uniform_ukg (U, K, G) and coin_uk (U, K) uniform in (0, 1);
    results masks (U, K, G) bool and log pi - log beta (U, K).
    """
    explores_uk = coin_uk < exploration
    some_u = explores_uk.any(1).nonzero().squeeze(1)  # few: sampling from pi and from uniform for all would cost twice
    masks_ukg = distribution.sample(uniform_ukg)
    uniform = distribution.take(some_u).uniform().sample(uniform_ukg[some_u])
    masks_ukg[some_u] = torch.where(explores_uk[some_u, :, None], uniform, masks_ukg[some_u])
    return masks_ukg, log_importance(distribution, masks_ukg, exploration)


def log_importance(distribution: MaskDistribution, masks_ukg: Tensor, exploration: float) -> Tensor:
    """log pi(mask) - log beta(mask), at most -log(1 - exploration): (U, K, G) -> (U, K).

    Without this weight, exploration biases the gradient. Raises ConfigError unless 0 <= exploration < 1.
    """
    if not 0 <= exploration < 1:
        raise ConfigError(f"exploration is a share of the masks within [0, 1), got {exploration}")
    log_pi = distribution.log_prob(masks_ukg)
    log_uniform = distribution.take(torch.arange(1)).uniform().log_prob(masks_ukg)  # the same for every user
    share = torch.full_like(log_pi, exploration)
    return log_pi - torch.logaddexp(log_pi + torch.log1p(-share), log_uniform + share.log())


def leave_one_out(reward_uk: Tensor) -> Tensor:
    """Each reward minus the mean of the user's other rewards: (U, K) -> (U, K).

    The baseline of a mask does not depend on that mask, so it adds no bias (Kool, van Hoof and Welling,
    "Buy 4 REINFORCE samples, get a baseline for free!", 2019). Raises ConfigError when K is below 2.
    """
    samples = reward_uk.shape[1]
    if samples < 2:
        raise ConfigError(f"leave-one-out needs at least 2 masks per user, got {samples}; draw more")
    return (reward_uk - reward_uk.mean(1, keepdim=True)) * (samples / (samples - 1))


def reinforce(distribution: MaskDistribution, masks_ukg: Tensor, reward_uk: Tensor, log_weight_uk: Tensor) -> Tensor:
    """gamma = mean over K of w * advantage * (mask - inclusion), w = pi / beta: unbiased (Williams, 1992).

    Shapes: masks_ukg (U, K, G), reward_uk and log_weight_uk (U, K), result (U, G). The rewards of one user
    must come from the same data, so that their differences are the masks' alone.
    """
    coefficient_uk = log_weight_uk.exp() * leave_one_out(reward_uk)
    return torch.einsum("uk,ukg->ug", coefficient_uk, distribution.score(masks_ukg)) / reward_uk.shape[1]


def entropy_bonus(distribution: MaskDistribution, strength: float) -> Tensor:
    """Gradient of strength * entropy, which keeps units from dying out: (U, G)."""
    return strength * distribution.entropy_gradient()


def price(distribution: Bernoulli, cost_g: Tensor, price_per_cost: float) -> Tensor:
    """Gradient of -price_per_cost * sum over g of cost_g * p_g, exact, never sampled: (U, G).

    Only for independent units: with a fixed budget and equal costs, the price has no gradient.
    """
    return -price_per_cost * cost_g * distribution.variance()
