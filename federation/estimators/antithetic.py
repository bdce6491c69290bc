"""DisARM: masks in antithetic pairs, for independent units.

Shapes: U users, P pairs, K = 2 P masks per user, G units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from federation.errors import ConfigError
from federation.estimators.protocol import Draws, Estimate, Objective
from federation.exploration import Exploration, log_weight
from federation.gate_config import DistributionKind
from federation.mask_distribution import MaskDistribution

_FLOOR = -1e9
"""The logarithm of an impossible pair of gates: finite, so that a weight is never NaN."""


@dataclass(frozen=True)
class Disarm:
    """DisARM, also ARM++ (Dong, Mnih and Tucker, "DisARM: an antithetic gradient estimator for binary latent
    variables", 2020), mean over K / 2 pairs. K evaluations, unbiased.

    A pair is b = [u < p] and b~ = [1 - u < p]; with f the reward and l the logits,
    gamma_g = 1/2 (f(b) - f(b~)) (-1)^{b~_g} [b_g != b~_g] sigmoid(|l_g|).
    A whole pair is explored or not, so its importance weight is that of the pair (`log_pair_probability`), not of
    its two masks.
    """

    distributions: ClassVar[tuple[DistributionKind, ...]] = ("bernoulli",)
    differentiable: ClassVar[bool] = False
    tries_masks: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    fewest: ClassVar[int] = 2
    multiple: ClassVar[int] = 2

    def estimate(
        self, distribution: MaskDistribution, objective: Objective, exploration: Exploration, samples: int, draws: Draws
    ) -> Estimate:
        """Raises ConfigError for an odd number of samples."""
        if samples % 2:
            raise ConfigError(f"DisARM draws masks in pairs, got gate.samples = {samples}; set an even number")
        logits_ug = distribution.logits_ug
        uniform_upg = draws.uniform("mask", (samples // 2, logits_ug.shape[1]))
        explores_up = draws.uniform("explore", (samples // 2,)) < exploration.share
        toward_1g = exploration.toward.logits_ug
        drawn_upg = torch.sigmoid(torch.where(explores_up[:, :, None], toward_1g[:, None], logits_ug[:, None]))
        first_upg, second_upg = uniform_upg < drawn_upg, 1 - uniform_upg < drawn_upg
        reward_uk = objective.reward(torch.cat((first_upg, second_upg), 1))
        first_up, second_up = reward_uk.chunk(2, 1)

        log_pi_up = log_pair_probability(logits_ug, first_upg, second_upg)
        log_toward_up = log_pair_probability(toward_1g, first_upg, second_upg)
        weight_up = log_weight(log_pi_up, log_toward_up, exploration.share).exp()
        sign_upg = first_upg.to(weight_up) - second_upg.to(weight_up)
        mean_ug = torch.einsum("up,upg->ug", weight_up * ((first_up - second_up) / 2).to(weight_up), sign_upg) / (
            samples // 2
        )
        return Estimate(mean_ug * torch.sigmoid(logits_ug.abs()), first_upg[:, 0], reward_uk)


def log_pair_probability(logits_ug: Tensor, first_upg: Tensor, second_upg: Tensor) -> Tensor:
    """Log-probability of each antithetic pair of masks under the logits: (U, P). Logits of one user serve all.

    Per gate: P(1, 1) = max(2 p - 1, 0) = tanh(l / 2) for l > 0, P(0, 0) = max(1 - 2 p, 0), and
    P(1, 0) = P(0, 1) = min(p, 1 - p) = sigmoid(-|l|).
    """
    size_ug = logits_ug.abs()
    different_ug = F.logsigmoid(-size_ug)
    same_ug = ((-torch.expm1(-size_ug)).log() - torch.log1p((-size_ug).exp())).clamp_min(_FLOOR)
    possible_upg = first_upg == (logits_ug > 0)[:, None]
    same_upg = torch.where(possible_upg, same_ug[:, None], _FLOOR)
    return torch.where(first_upg == second_upg, same_upg, different_ug[:, None]).sum(2)
