"""The contract of an estimator: from a distribution over masks and what masks are worth, the gradient of the logits.

The objective of a user is J = E_{m ~ pi}[R(m)] with the mask distribution pi = pi(logits). An estimator gives
gamma_ug = dJ_u / d logits_ug, or what stands for it; the gate turns gamma into a gradient of its own parameters
(`GateSpec.vjp`). All gradients ascend. A price on active units is no estimator's business: its gradient is exact
(`federation.estimators.terms.price`).

Shapes: U users, K masks per user, G units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from federation.exploration import Exploration
from federation.gate_config import DistributionKind
from federation.mask_distribution import MaskDistribution


class Objective(Protocol):
    """What masks are worth to U users. All calls of one round look at the same examples, so that differences between
    rewards are the masks' alone."""

    def reward(self, masks_ukg: Tensor) -> Tensor:
        """R of each mask: (U, K, G) bool -> (U, K). Costs K evaluations."""
        ...

    def reward_gradient(self, strength_ug: Tensor) -> tuple[Tensor, Tensor]:
        """R with every unit g switched on as far as strength_ug in [0, 1], and dR / d strength: (U,), (U, G).

        To the first order and before any adaptation; one forward and one backward pass through all units.
        """
        ...


class Draws(Protocol):
    """The randomness of U users' estimates in one round."""

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """(U, *shape) numbers strictly inside (0, 1). The same purpose gives the same numbers."""
        ...


@dataclass(frozen=True)
class Estimate:
    """An estimator's answer.

    gamma_ug: (U, G), the gradient with respect to the logits. mask_ug: (U, G) bool, one mask drawn from the
    exploration mixture, which the user trains. reward_uk: (U, K), the rewards of the masks that were tried.
    """

    gamma_ug: Tensor
    mask_ug: Tensor
    reward_uk: Tensor


class Estimator(Protocol):
    """How the gradient of the expected reward is estimated. Stacked over users, no state.

    distributions: the kinds that it works for. differentiable: whether it asks for `reward_gradient`.
    tries_masks: whether it asks for `reward`, which is what masks are worth after steps; its gradient is not.
    unbiased: whether the mean of its gamma is the gradient of J.
    fewest: the least number of masks K that it can work with. multiple: K must be a multiple of it (2: masks in pairs).
    """

    distributions: ClassVar[tuple[DistributionKind, ...]]
    differentiable: ClassVar[bool]
    tries_masks: ClassVar[bool]
    unbiased: ClassVar[bool]
    fewest: ClassVar[int]
    multiple: ClassVar[int]

    def estimate(
        self, distribution: MaskDistribution, objective: Objective, exploration: Exploration, samples: int, draws: Draws
    ) -> Estimate:
        """gamma from `samples` masks per user, drawn from the exploration mixture."""
        ...
