"""Small problems with every mask enumerated, in float64: oracles for whatever estimates their gradient."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from federation.estimators.protocol import Estimate, Estimator
from federation.exploration import Exploration
from federation.gate_config import DistributionKind
from federation.mask_distribution import Bernoulli, FixedBudget, MaskDistribution

LOGITS = torch.tensor([0.3, -1.2, 2.1, 0.7, -0.4, 1.5, -0.8, 0.2], dtype=torch.float64)
TOWARD = torch.tensor([-1.0, 0.9, 0.4, -0.7, 1.3, -0.2, 0.6, -1.4], dtype=torch.float64)


@dataclass(frozen=True)
class Problem:
    """A kind of distribution over masks of a few units, the policy's logits and what exploration is drawn toward."""

    kind: DistributionKind
    units: int
    modules: int = 1
    budget: int = 1

    @property
    def logits_g(self) -> Tensor:
        return LOGITS[: self.units]

    @property
    def toward_g(self) -> Tensor:
        return TOWARD[: self.units]

    def distribution(self, logits_ug: Tensor) -> MaskDistribution:
        if self.kind == "bernoulli":
            return Bernoulli(logits_ug.contiguous())
        return FixedBudget(logits_ug.contiguous(), self.modules, self.budget)

    def exploration(self, share: float) -> Exploration:
        return Exploration(share, self.distribution(self.toward_g[None]))

    def masks(self) -> Tensor:
        """Every possible mask: (M, G) bool."""
        masks = torch.tensor(list(itertools.product((False, True), repeat=self.units)))
        if self.kind == "bernoulli":
            return masks
        return masks[(masks.view(len(masks), self.modules, -1).sum(2) == self.budget).all(1)]

    def probabilities(self, logits_g: Tensor) -> Tensor:
        """Of every mask, from the definition, differentiable: (M,)."""
        return torch.softmax((self.masks() * logits_g).sum(1), 0)

    def mixture(self, share: float) -> Tensor:
        """Of every mask under the exploration mixture: (M,)."""
        return (1 - share) * self.probabilities(self.logits_g) + share * self.probabilities(self.toward_g)

    def inclusion(self, logits_g: Tensor) -> Tensor:
        """From the definition, differentiable: (G,)."""
        return self.probabilities(logits_g) @ self.masks().double()

    def gradient(self, value_m: Tensor) -> Tensor:
        """d E[value] / d logits at the policy's: (G,)."""
        logits_g = self.logits_g.clone().requires_grad_()
        return torch.autograd.grad(self.probabilities(logits_g) @ value_m, logits_g)[0]


PROBLEMS = {
    "bernoulli": Problem("bernoulli", 6),
    "1 of 3, twice": Problem("budget", 6, modules=2, budget=1),
    "2 of 4, twice": Problem("budget", 8, modules=2, budget=2),
    "3 of 8": Problem("budget", 8, modules=1, budget=3),
}


@dataclass(frozen=True)
class Curved:
    """A reward with interactions within and between modules, and with curvature in the strengths: an Objective."""

    interaction: float = 1.0

    def value(self, strength: Tensor) -> Tensor:
        """(.., G) -> (..)."""
        m = strength.double()
        linear = m @ torch.linspace(-1.0, 2.0, m.shape[-1], dtype=torch.float64)
        pairs = 1.7 * m[..., 0] * m[..., 4] - 0.9 * m[..., 2] * m[..., 3] + 1.1 * m[..., 0] * m[..., 1] * m[..., 5]
        return linear + self.interaction * (pairs + 0.6 * (m.sum(-1) - 1.5).tanh() * m[..., 1].square()) + 3.0

    def reward(self, masks_ukg: Tensor) -> Tensor:
        return self.value(masks_ukg)

    def reward_gradient(self, strength_ug: Tensor) -> tuple[Tensor, Tensor]:
        strength_ug = strength_ug.detach().clone().requires_grad_()
        value_u = self.value(strength_ug)
        return value_u.detach(), torch.autograd.grad(value_u.sum(), strength_ug)[0]


@dataclass(frozen=True)
class Black:
    """The same reward without a gradient."""

    def reward(self, masks_ukg: Tensor) -> Tensor:
        return Curved().value(masks_ukg)

    def reward_gradient(self, strength_ug: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("this estimator promised to ask for no gradient")


@dataclass(frozen=True)
class Untried(Curved):
    """The same reward, of no mask."""

    def reward(self, masks_ukg: Tensor) -> Tensor:
        raise AssertionError("this estimator promised to try no masks")


@dataclass(frozen=True)
class Scripted:
    """Draws that were chosen beforehand, by purpose."""

    values: Mapping[str, Tensor]

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        value = self.values[purpose]
        assert value.shape[1:] == shape, f"{purpose}: asked for {shape}"
        return value


@dataclass(frozen=True)
class Drawn:
    """Draws for U users from a seed."""

    users: int
    seed: int

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        seed = self.seed * 1000 + sum(map(ord, purpose))
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(self.users, *shape, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)


@dataclass(frozen=True)
class OneOf:
    """The draws of one of several users."""

    draws: Drawn
    user: int

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        return self.draws.uniform(purpose, shape)[[self.user]]


def drawing(masks_ukg: Tensor) -> Scripted:
    """Draws that make a distribution give just these masks, without exploring."""
    uniform_ukg = torch.where(masks_ukg, 1e-9, 1 - 1e-9).double()
    return Scripted({"mask": uniform_ukg, "explore": torch.full(masks_ukg.shape[:2], 1 - 1e-9, dtype=torch.float64)})


def over_all_tuples(problem: Problem, estimator: Estimator, share: float, samples: int) -> tuple[Tensor, Estimate]:
    """The probability of every tuple of masks under the exploration mixture, (P,), and its estimate, as P users."""
    masks, mixture = problem.masks(), problem.mixture(share)
    index = torch.cartesian_prod(*[torch.arange(len(masks))] * samples).view(-1, samples)
    pi = problem.distribution(problem.logits_g.expand(len(index), -1))
    draws = drawing(masks[index])
    estimate = estimator.estimate(pi, Curved(), problem.exploration(share), samples, draws)
    assert bool((estimate.mask_ug == masks[index[:, 0]]).all())
    return mixture[index].prod(1), estimate


def replicas(
    problem: Problem, estimator: Estimator, share: float, samples: int, users: int, objective: Curved, seed: int = 7
) -> Estimate:
    """Independent estimates of one user, as `users` users."""
    pi = problem.distribution(problem.logits_g.expand(users, -1))
    return estimator.estimate(pi, objective, problem.exploration(share), samples, Drawn(users, seed))
