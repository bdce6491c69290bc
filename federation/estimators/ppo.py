"""PPO for masks: several ascent steps on the same rewards, kept near the policy that drew the masks.

Shapes: U users, K masks per user, G units; P parts of a mask, each of G / P units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from federation.errors import ConfigError
from federation.estimators.protocol import Objective
from federation.estimators.score import ScoreFunction, Tried, leave_one_out
from federation.mask_distribution import MaskDistribution

_FARTHEST = 10.0
"""Log ratios count as no farther from 0 than this: where A < 0 the clip leaves a large ratio as it is, and that of a
module with many units would overflow. A ratio of e^10 moves the logits farther than any clip would have let it."""


@dataclass(frozen=True)
class Ppo(ScoreFunction):
    """Proximal policy optimisation (Schulman et al., 2017) of a one-step bandit, in the space of a user's own logits.

    From the logits that drew the masks, `epochs` steps of `rate` ascend, per user,

        mean over k, sum over parts of min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) - kl * KL(old || new),

    with A the importance weight times the leave-one-out advantage. A part is what has a ratio of its own: a gate, or
    a module with its fixed budget; the ratio of whole masks would explode with their size.
    gamma = (logits after - logits before) / (epochs * rate). With one epoch that is `reinforce`. Biased with more.

    Why the logits and not the gate's parameters: the displacement goes through the gate's vjp as any gamma does, so
    the work stays stacked over users with one backward pass through the gate, and the server receives an ordinary
    gradient that it may clip, average and scale.

    rate: step of the logits, per unit of reward. K evaluations. Raises ConfigError for an option out of range.
    """

    epochs: int = 4
    rate: float = 1.0
    clip: float = 0.2
    kl: float = 0.01

    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.epochs < 1 or not self.rate > 0 or not self.clip > 0 or not self.kl >= 0:
            raise ConfigError(f"ppo needs epochs >= 1, rate > 0, clip > 0 and kl >= 0, got {self}; correct its options")

    def gamma(self, distribution: MaskDistribution, objective: Objective, tried: Tried) -> Tensor:
        return self._mean_gradient(distribution, tried.masks_ukg, tried.weight_uk * leave_one_out(tried.reward_uk))

    def _mean_gradient(self, old: MaskDistribution, masks_ukg: Tensor, advantage_uk: Tensor) -> Tensor:
        """The mean of the epochs' gradients, which is the displacement over epochs * rate: (U, G)."""
        old_inclusion_ug, old_log_prob_ukp = old.inclusion(), old.log_prob_of_parts(masks_ukg)
        total_ug, new = torch.zeros_like(old.logits_ug), old
        for epoch in range(self.epochs):
            if epoch:
                new = old.with_logits(old.logits_ug + self.rate * total_ug)
            log_ratio_ukp = new.log_prob_of_parts(masks_ukg) - old_log_prob_ukp
            ratio_ukp = log_ratio_ukp.clamp(-_FARTHEST, _FARTHEST).exp()
            pull_ukp = _clipped(ratio_ukp, advantage_uk[:, :, None], self.clip)
            pull_ukg = pull_ukp.repeat_interleave(masks_ukg.shape[2] // pull_ukp.shape[2], 2)
            ascent_ug = (pull_ukg * new.score(masks_ukg)).mean(1)
            total_ug = total_ug + ascent_ug - self.kl * (new.inclusion() - old_inclusion_ug)
        return total_ug / self.epochs


def _clipped(ratio_ukp: Tensor, advantage_ukp: Tensor, clip: float) -> Tensor:
    """d min(ratio A, clip(ratio) A) / d log ratio: ratio A, or 0 where the ratio has already moved far enough."""
    far = torch.where(advantage_ukp > 0, ratio_ukp > 1 + clip, ratio_ukp < 1 - clip)
    return torch.where(far, 0.0, ratio_ukp * advantage_ukp)
