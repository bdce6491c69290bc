"""Distributions over masks, given one logit per unit: what a policy samples from.

Shapes: U users, K masks per user, J modules, R ranks, G = J * R units; unit (j, r) has the number j * R + r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from federation.errors import ConfigError, MaskError

_FLOOR = -1e9
"""The logarithm of an impossible event. Finite: the gradient of logaddexp(-inf, -inf) is NaN."""
LARGEST_LOGIT = 1e6
"""In size: sums of larger ones would reach the floor, and masks would not have their budget."""


class MaskDistribution(Protocol):
    """A distribution over the masks of U users, an exponential family with the mask as its statistic."""

    @property
    def logits_ug(self) -> Tensor: ...

    def sample(self, uniform_ukg: Tensor) -> Tensor:
        """Masks (U, K, G) bool, from one uniform number strictly inside (0, 1) per unit."""
        ...

    def mode(self) -> Tensor:
        """The likeliest mask (U, G) bool; between equal logits, the lower unit."""
        ...

    def log_prob(self, masks_ukg: Tensor) -> Tensor:
        """Log-probability of each mask, in nats: (U, K, G) -> (U, K). A distribution of one user serves all."""
        ...

    def log_prob_of_parts(self, masks_ukg: Tensor) -> Tensor:
        """Log-probabilities that add up to each mask's: (U, K, G) -> (U, K, P), of P independent parts, each of
        G / P units: of every unit or, under a fixed budget, of every module."""
        ...

    def check_masks(self, masks_ukg: Tensor) -> None:
        """Raises MaskError for masks that the distribution cannot give: (U, K, G) bool."""
        ...

    def inclusion(self) -> Tensor:
        """The probability that a unit is active: (U, G)."""
        ...

    def score(self, masks_ukg: Tensor) -> Tensor:
        """d log_prob / d logits = mask - inclusion: (U, K, G)."""
        ...

    def entropy(self) -> Tensor:
        """Entropy in nats: (U,)."""
        ...

    def entropy_share(self) -> Tensor:
        """Entropy as a share of the largest, that of `uniform()`: (U,) in [0, 1]; 1 where only one mask is possible."""
        ...

    def entropy_gradient(self) -> Tensor:
        """d entropy / d logits = -Cov(mask) @ logits: (U, G)."""
        ...

    def covariance_times(self, v_ug: Tensor) -> Tensor:
        """Cov(mask) @ v, where Cov(mask) = d inclusion / d logits: (U, G), or (1, G) for all users, -> (U, G)."""
        ...

    def uniform(self) -> MaskDistribution:
        """The same kind of distribution with all logits zero: every possible mask is equally likely."""
        ...

    def with_logits(self, logits_ug: Tensor) -> MaskDistribution:
        """The same kind of distribution with other logits."""
        ...

    def take(self, users: Tensor) -> MaskDistribution:
        """The distribution of some of the users, by position."""
        ...


def _share(entropy_u: Tensor, largest: float) -> Tensor:
    if not largest:
        return torch.ones_like(entropy_u)
    return (entropy_u / largest).clamp(0.0, 1.0)  # rounding may reach a little beyond


@dataclass(frozen=True, eq=False)
class Bernoulli:
    """Every unit is active or not, independently, with probability sigmoid(logit)."""

    logits_ug: Tensor

    def sample(self, uniform_ukg: Tensor) -> Tensor:
        return uniform_ukg < self.inclusion()[:, None]

    def mode(self) -> Tensor:
        return self.logits_ug > 0

    def log_prob(self, masks_ukg: Tensor) -> Tensor:
        return self.log_prob_of_parts(masks_ukg).sum(2)

    def log_prob_of_parts(self, masks_ukg: Tensor) -> Tensor:
        logits = self.logits_ug[:, None]
        return F.logsigmoid(torch.where(masks_ukg, logits, -logits))

    def check_masks(self, masks_ukg: Tensor) -> None:
        """Nothing: every mask is possible."""

    def inclusion(self) -> Tensor:
        return torch.sigmoid(self.logits_ug)

    def score(self, masks_ukg: Tensor) -> Tensor:
        inclusion_ug = self.inclusion()
        return masks_ukg.to(inclusion_ug) - inclusion_ug[:, None]

    def variance(self) -> Tensor:
        """p (1 - p) of every unit, without cancellation: (U, G)."""
        return torch.sigmoid(self.logits_ug) * torch.sigmoid(-self.logits_ug)

    def entropy(self) -> Tensor:
        size = self.logits_ug.abs()
        return (F.softplus(-size) + size * torch.sigmoid(-size)).sum(1)

    def entropy_share(self) -> Tensor:
        return _share(self.entropy(), self.logits_ug.shape[1] * math.log(2.0))

    def entropy_gradient(self) -> Tensor:
        return -self.covariance_times(self.logits_ug)

    def covariance_times(self, v_ug: Tensor) -> Tensor:
        return self.variance() * v_ug

    def uniform(self) -> Bernoulli:
        return Bernoulli(torch.zeros_like(self.logits_ug))

    def with_logits(self, logits_ug: Tensor) -> Bernoulli:
        return Bernoulli(logits_ug)

    def take(self, users: Tensor) -> Bernoulli:
        return Bernoulli(self.logits_ug[users])


@dataclass(frozen=True, eq=False)
class FixedBudget:
    """Exactly `budget` active units in each of `modules` modules: the conditional Bernoulli distribution.

    log pi(S) = sum over S of l_g - log e_k(exp l), per module, with e_k the elementary symmetric polynomial
    (Chen, Dempster and Liu, "Weighted finite population sampling to maximize entropy", Biometrika 1994).
    Everything follows from one chain that walks through a module's units and decides on each, given how many
    are still to be chosen: O(R k), in log space, without subtracting near-equal probabilities.

    Inside, the *lanes* L = U * J are the modules of all users, and m = 0..k is what is still to be chosen.

    Raises ConfigError when the budget is not within 1..R, or the logits do not divide into modules.
    """

    logits_ug: Tensor
    modules: int
    budget: int

    def __post_init__(self) -> None:
        units = self.logits_ug.shape[1]
        if self.modules < 1 or units % self.modules:
            raise ConfigError(f"logits must divide into modules, got {units} for {self.modules} modules")
        if not 1 <= self.budget <= self.rank:
            raise ConfigError(
                f"a budget must be within 1..{self.rank} units per module, got {self.budget}; "
                "lower the budget or raise the pool's rank"
            )

    @property
    def rank(self) -> int:
        return int(self.logits_ug.shape[1]) // self.modules

    def sample(self, uniform_ukg: Tensor) -> Tensor:
        users, masks, _ = uniform_ukg.shape
        by_module = uniform_ukg.reshape(users, masks, self.modules, self.rank)
        uniform_rkl = by_module.permute(3, 1, 0, 2).reshape(self.rank, masks, users * self.modules)
        choose_rml = self._choose_rml
        left_kl = torch.full(uniform_rkl.shape[1:], self.budget, device=uniform_ukg.device)
        chosen_rkl = torch.empty_like(uniform_rkl, dtype=torch.bool)
        for r in range(self.rank):
            # A forced choice has probability exactly 1 or 0, so the count is always right.
            chosen_rkl[r] = uniform_rkl[r] < choose_rml[r].gather(0, left_kl)
            left_kl = left_kl - chosen_rkl[r].long()
        chosen = chosen_rkl.view(self.rank, masks, users, self.modules).permute(2, 1, 3, 0)
        return chosen.flatten(2)

    def mode(self) -> Tensor:
        by_module = self.logits_ug.reshape(-1, self.rank)
        best = by_module.sort(dim=1, descending=True, stable=True).indices[:, : self.budget]
        mask = torch.zeros_like(by_module, dtype=torch.bool).scatter_(1, best, True)
        return mask.view(self.logits_ug.shape)

    def log_prob(self, masks_ukg: Tensor) -> Tensor:
        """Raises MaskError for a mask that does not have `budget` units in every module."""
        return self.log_prob_of_parts(masks_ukg).sum(2)

    def log_prob_of_parts(self, masks_ukg: Tensor) -> Tensor:
        """Raises MaskError as `log_prob` does."""
        self.check_masks(masks_ukg)
        log_e_uj = self._log_e_rml[0, self.budget].view(-1, self.modules)
        chosen_ukg = masks_ukg * self.logits_ug[:, None]
        by_module = chosen_ukg.reshape(*chosen_ukg.shape[:2], self.modules, self.rank)
        return by_module.sum(3) - log_e_uj[:, None]

    def check_masks(self, masks_ukg: Tensor) -> None:
        count_ukj = masks_ukg.reshape(*masks_ukg.shape[:2], self.modules, self.rank).sum(3)
        if not bool((count_ukj == self.budget).all()):
            worst = count_ukj[count_ukj != self.budget][0].item()
            raise MaskError(
                f"a mask of this distribution has {self.budget} units in each module, got one with {worst}; "
                "was it drawn with another budget?"
            )

    def inclusion(self) -> Tensor:
        return self._by_unit((self._reach_rml * self._choose_rml).sum(1))

    def score(self, masks_ukg: Tensor) -> Tensor:
        inclusion_ug = self.inclusion()
        return masks_ukg.to(inclusion_ug) - inclusion_ug[:, None]

    def entropy(self) -> Tensor:
        """The chain rule: the entropy of each decision, weighted by the probability to face it."""
        size = self._log_odds_rml.abs()
        decision_rml = F.softplus(-size) + size * torch.sigmoid(-size)
        entropy_l = (self._reach_rml * decision_rml).sum((0, 1))
        return entropy_l.view(-1, self.modules).sum(1)

    def entropy_share(self) -> Tensor:
        return _share(self.entropy(), self.modules * math.log(math.comb(self.rank, self.budget)))

    def entropy_gradient(self) -> Tensor:
        return -self.covariance_times(self.logits_ug)

    def covariance_times(self, v_ug: Tensor) -> Tensor:
        """E[m_g (m . v)] with v shifted, per module, so that E[m . v] = 0: then nothing large cancels.

        Along the chain, m . v is what was chosen before unit g, the unit itself, and what is expected after it.
        """
        inclusion_rl = (self._reach_rml * self._choose_rml).sum(1)
        v_rl = v_ug.expand_as(self.logits_ug).reshape(-1, self.rank).t()
        v_rl = v_rl - (inclusion_rl * v_rl).sum(0) / self.budget
        sums_rml = self._reach_rml * (v_rl[:, None] + self._shifted_down(self._expected_after(v_rl)))
        products_rml = self._choose_rml * (self._expected_before(v_rl) + sums_rml)
        return self._by_unit(products_rml.sum(1))

    def uniform(self) -> FixedBudget:
        return self.with_logits(torch.zeros_like(self.logits_ug))

    def with_logits(self, logits_ug: Tensor) -> FixedBudget:
        return FixedBudget(logits_ug, self.modules, self.budget)

    def take(self, users: Tensor) -> FixedBudget:
        return self.with_logits(self.logits_ug[users])

    @cached_property
    def _log_e_rml(self) -> Tensor:
        """log e_m of the units r, r+1, .., R-1; the floor where m exceeds their number: (R + 1, k + 1, L)."""
        logits_rl = self.logits_ug.reshape(-1, self.rank).t().contiguous()
        after = logits_rl.new_full((self.budget + 1, logits_rl.shape[1]), _FLOOR)
        table = [torch.cat((torch.zeros_like(after[:1]), after[1:]))]
        for logit_l in reversed(logits_rl.unbind(0)):
            after = table[-1]
            table.append(torch.cat((after[:1], torch.logaddexp(after[1:], logit_l + after[:-1]))))
        return torch.stack(table[::-1])

    @cached_property
    def _log_odds_rml(self) -> Tensor:
        """Log-odds of choosing unit r when m are still to be chosen from r, r+1, .., R-1: (R, k + 1, L)."""
        after = self._log_e_rml[1:]
        logits_rl = self.logits_ug.reshape(-1, self.rank).t()
        some = logits_rl[:, None] + after[:, :-1] - after[:, 1:]
        return torch.cat((torch.full_like(some[:, :1], _FLOOR), some), 1)

    @cached_property
    def _choose_rml(self) -> Tensor:
        """Probability of choosing unit r when m are still to be chosen from r on: (R, k + 1, L)."""
        return torch.sigmoid(self._log_odds_rml)

    @cached_property
    def _skip_rml(self) -> Tensor:
        """1 - choose, without cancellation."""
        return torch.sigmoid(-self._log_odds_rml)

    @cached_property
    def _reach_rml(self) -> Tensor:
        """Probability that m are still to be chosen when the chain arrives at unit r: (R, k + 1, L)."""
        choose_rml, skip_rml = self._choose_rml, self._skip_rml
        nothing = torch.zeros_like(choose_rml[0, :1])
        reach = [torch.cat((nothing.expand(self.budget, -1), torch.ones_like(nothing)))]
        for choose_ml, skip_ml in zip(choose_rml[:-1], skip_rml[:-1]):
            here = reach[-1]
            reach.append(here * skip_ml + torch.cat(((here * choose_ml)[1:], nothing)))
        return torch.stack(reach)

    def _expected_before(self, v_rl: Tensor) -> Tensor:
        """E[sum of v over the chosen units before r; m are still to be chosen at r]: (R, k + 1, L)."""
        choose_rml, skip_rml = self._choose_rml, self._skip_rml
        before = [torch.zeros_like(choose_rml[0])]
        for choose_ml, skip_ml, reach_ml, v_l in zip(choose_rml[:-1], skip_rml[:-1], self._reach_rml, v_rl):
            here = before[-1]
            chosen_ml = choose_ml * (here + reach_ml * v_l)
            before.append(here * skip_ml + F.pad(chosen_ml[1:], (0, 0, 0, 1)))
        return torch.stack(before)

    def _expected_after(self, v_rl: Tensor) -> Tensor:
        """E[sum of v over the chosen units after r | m are still to be chosen after it]: (R, k + 1, L)."""
        choose_rml, skip_rml = self._choose_rml, self._skip_rml
        after = [torch.zeros_like(choose_rml[0])]
        for choose_ml, skip_ml, v_l in zip(choose_rml.flip(0)[:-1], skip_rml.flip(0)[:-1], v_rl.flip(0)):
            here = after[-1]
            after.append(skip_ml * here + choose_ml * (v_l + F.pad(here[:-1], (0, 0, 1, 0))))
        return torch.stack(after[::-1])

    @staticmethod
    def _shifted_down(values_rml: Tensor) -> Tensor:
        """What stands at m - 1: (R, k + 1, L); zero at m = 0."""
        return F.pad(values_rml[:, :-1], (0, 0, 1, 0))

    def _by_unit(self, values_rl: Tensor) -> Tensor:
        return values_rl.t().reshape(self.logits_ug.shape)
