"""Pathwise estimators against autograd on their surrogates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from federation.estimators.pathwise import HardConcrete, StraightThrough
from tests.federation.estimators.problems import PROBLEMS, Curved, Drawn, drawing

SHARE = 0.3


@pytest.mark.parametrize("case", PROBLEMS)
def test_straight_through_is_autograd_through_the_mean(case: str) -> None:
    problem = PROBLEMS[case]
    pi, exploration, draws = (
        problem.distribution(problem.logits_g.expand(6, -1)),
        problem.exploration(SHARE),
        Drawn(6, 2),
    )
    estimate = StraightThrough().estimate(pi, Curved(), exploration, 3, draws)
    uniform_ukg, coin_uk = draws.uniform("mask", (3, problem.units)), draws.uniform("explore", (3,))
    masks_ukg, log_weight_uk = exploration.sample(pi, uniform_ukg, coin_uk)
    for u in range(6):
        logits_g = problem.logits_g.clone().requires_grad_()
        mean_g = problem.inclusion(logits_g)
        value_k = Curved().value(masks_ukg[u] + mean_g - mean_g.detach())
        (truth_g,) = torch.autograd.grad((log_weight_uk[u].exp() * value_k).mean(), logits_g)
        torch.testing.assert_close(estimate.gamma_ug[u], truth_g, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(estimate.reward_uk[u], value_k.detach())


@pytest.mark.parametrize("case", PROBLEMS)
def test_exploration_does_not_move_straight_throughs_expectation(case: str) -> None:
    problem = PROBLEMS[case]
    masks = problem.masks()
    pi = problem.distribution(problem.logits_g.expand(len(masks), -1))
    means = []
    for share in (0.0, SHARE):
        gamma_ug = (
            StraightThrough().estimate(pi, Curved(), problem.exploration(share), 1, drawing(masks[:, None])).gamma_ug
        )
        means.append(problem.mixture(share) @ gamma_ug)
    torch.testing.assert_close(means[0], means[1])


def gates(logits_g: Tensor, uniform_kg: Tensor, temperature: float, stretch: float) -> Tensor:
    """z as in Louizos et al., equations 10 and 11, with 1 - u for u: (K, G)."""
    noise = torch.log(1 - uniform_kg) - torch.log(uniform_kg)
    s = torch.sigmoid((noise + logits_g) / temperature)
    return torch.clamp(s * (1 + stretch - -stretch) + -stretch, min=0, max=1)


@pytest.mark.parametrize(("temperature", "stretch"), [(2 / 3, 0.1), (0.2, 0.4), (1.5, 0.0)])
def test_hard_concrete_is_autograd_through_its_gates(temperature: float, stretch: float) -> None:
    problem = PROBLEMS["bernoulli"]
    pi, draws = problem.distribution(problem.logits_g.expand(6, -1)), Drawn(6, 2)
    estimator = HardConcrete(temperature, stretch)
    estimate = estimator.estimate(pi, Curved(), problem.exploration(SHARE), 3, draws)
    for u in range(6):
        logits_g = problem.logits_g.clone().requires_grad_()
        z_kg = gates(logits_g, draws.uniform("mask", (3, 6))[u], temperature, stretch)
        value_k = Curved().value(z_kg)
        (truth_g,) = torch.autograd.grad(value_k.mean(), logits_g)
        torch.testing.assert_close(estimate.gamma_ug[u], truth_g, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(estimate.reward_uk[u], value_k.detach())


def test_a_hard_concrete_gate_rounds_to_the_mask() -> None:
    problem = PROBLEMS["bernoulli"]
    pi, draws = problem.distribution(problem.logits_g.expand(500, -1)), Drawn(500, 4)
    estimate = HardConcrete().estimate(pi, Curved(), problem.exploration(0.0), 1, draws)
    z_ug = gates(problem.logits_g, draws.uniform("mask", (1, 6))[:, 0], 2 / 3, 0.1)
    assert torch.equal(estimate.mask_ug, z_ug > 0.5)
