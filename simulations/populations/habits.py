"""Which masks users have: what a type habitually uses, what a user swaps, and how the units work together.

A module's units are arranged in alternatives. A mask takes a fixed number of them:

    Singles  each alternative is one unit, and writes to its own output
    Groups   half of the alternatives are complements: an opener and a closer, used together
             the other half are substitutes: two units that do nearly the same, one of them used

The last `distractors` units of a module belong to no alternative, so no mask of a user has them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ECHO = 0.9
"""Cosine of a distractor with what a type's habit writes altogether."""

LIKENESS = 0.9
"""Cosine of two substitutes."""

COMPLEMENTS = ((2.0**0.5 / 0.8, 2.5**0.5), (-0.2 * 2.0**0.5 / 0.8, -(2.5**0.5)))
"""What an opener and a closer write: (a, v) and (-0.2 a, -v) with |0.8 a|^2 = 2, |v|^2 = 2.5.

Together they are worth two single units (0.8 a). An opener alone leaves (0.2 a, v), a closer (a, v): both are more
than doing nothing leaves, so both harm. Yet to first order an opener helps and a closer harms.
"""


@dataclass(frozen=True)
class Singles:
    """`budget` of `rank - distractors` units per module, any of them."""

    rank: int
    budget: int
    distractors: int = 0

    @property
    def alternatives(self) -> int:
        """N: alternatives of each class."""
        return self.rank - self.distractors

    @property
    def chosen(self) -> tuple[int, ...]:
        """How many alternatives of each class a mask takes."""
        return (self.budget,)

    def units(self, chosen_xjcn: Tensor, second_xjn: Tensor) -> Tensor:
        """Masks (X, J * R) from the chosen alternatives (X, J, C, N)."""
        return F.pad(chosen_xjcn[:, :, 0], (0, self.distractors)).flatten(1)

    def effects(self) -> Tensor:
        """What the units of the alternatives write: (R - distractors, as many outputs)."""
        return torch.eye(self.alternatives)


@dataclass(frozen=True)
class Groups:
    """Complements (units 0, 1; 2, 3; ..), then as many pairs of substitutes. About two thirds of the budget is for
    complements: round(budget / 3) pairs of them."""

    rank: int
    budget: int
    distractors: int = 0

    @property
    def alternatives(self) -> int:
        """N: alternatives of each class."""
        return (self.rank - self.distractors) // 4

    @property
    def chosen(self) -> tuple[int, ...]:
        """How many alternatives of each class a mask takes."""
        complements = round(self.budget / 3)
        return complements, self.budget - 2 * complements

    def units(self, chosen_xjcn: Tensor, second_xjn: Tensor) -> Tensor:
        """Masks (X, J * R) from the chosen alternatives (X, J, C, N) and where the second substitute is meant."""
        complements, substitutes = chosen_xjcn.unbind(2)
        both = complements.repeat_interleave(2, dim=2)
        one = torch.stack((substitutes & ~second_xjn, substitutes & second_xjn), 3).flatten(2)
        return F.pad(torch.cat((both, one), 2), (0, self.distractors)).flatten(1)

    def effects(self) -> Tensor:
        """What the units of the alternatives write: (R - distractors, as many outputs)."""
        substitutes = torch.tensor(((1.0, 0.0), (LIKENESS, (1.0 - LIKENESS**2) ** 0.5)))
        pairs = torch.stack([torch.tensor(COMPLEMENTS)] * self.alternatives + [substitutes] * self.alternatives)
        return torch.einsum("pij,pq->piqj", pairs, torch.eye(len(pairs))).reshape(2 * len(pairs), -1)


Arrangement = Singles | Groups


def highest(order_xjcn: Tensor, chosen: tuple[int, ...]) -> Tensor:
    """The chosen[c] alternatives of class c that come first, bool of the same shape (X, J, C, N)."""
    mask = torch.zeros_like(order_xjcn, dtype=torch.bool)
    for c, count in enumerate(chosen):
        mask[:, :, c].scatter_(2, order_xjcn[:, :, c].topk(count, dim=2).indices, True)
    return mask


def swapped(habit_ujcn: Tensor, chance_ujcn: Tensor, flips: float, chosen: tuple[int, ...]) -> Tensor:
    """Habits in which each alternative is swapped for another of its class with probability `flips`: (U, J, C, N).

    chance_ujcn: uniform in 0..1. Habitual alternatives that stay come first (1..2), then others at random (0..1),
    then the swapped (-1..0).
    """
    stays = torch.where(chance_ujcn < flips, -1.0, 1.0)
    return highest(chance_ujcn + torch.where(habit_ujcn, stays, 0.0), chosen)


def module_ups(arrangement: Arrangement, habit_tr: Tensor, first_type: int, outputs: int) -> Tensor:
    """What the units of one module write, (R, outputs), distractors last.

    A distractor echoes what the habit of a type writes altogether, the i-th that of type first_type + i, at the
    strength of a single unit, and writes to an output of its own besides. habit_tr (T, R) bool.
    """
    effects = arrangement.effects()
    known, distractors = len(effects), arrangement.distractors
    types = (first_type + torch.arange(distractors)) % len(habit_tr)
    echo = F.normalize(habit_tr[types, :known].float() @ effects, dim=1)
    own = (1.0 - ECHO**2) ** 0.5 * torch.eye(distractors)
    ups = torch.cat((torch.cat((effects, torch.zeros(known, distractors)), 1), torch.cat((ECHO * echo, own), 1)))
    return F.pad(ups, (0, outputs - len(ups)))
