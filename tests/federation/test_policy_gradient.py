"""Gradient estimators in exact expectation, over every tuple of masks, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from federation.errors import ConfigError
from federation.gate import GateSpec, GateState
from federation.mask_distribution import Bernoulli, FixedBudget, MaskDistribution
from federation.policy_gradient import (
    entropy_bonus,
    explored,
    leave_one_out,
    log_importance,
    price,
    reinforce,
)

MODULES, RANK, BUDGET = 2, 3, 1
UNITS = MODULES * RANK


def make(kind: str, logits_ug: Tensor) -> MaskDistribution:
    return Bernoulli(logits_ug) if kind == "bernoulli" else FixedBudget(logits_ug, MODULES, BUDGET)


def all_masks(kind: str) -> Tensor:
    """(M, G) bool."""
    masks = torch.tensor(list(itertools.product((False, True), repeat=UNITS)))
    if kind == "bernoulli":
        return masks
    return masks[(masks.view(-1, MODULES, RANK).sum(2) == BUDGET).all(1)]


def reward(masks: Tensor) -> Tensor:
    """Any function of a mask, with interactions: (.., G) -> (..)."""
    m = masks.double()
    linear = torch.linspace(-1.0, 2.0, UNITS, dtype=torch.float64)
    return m @ linear + 1.7 * m[..., 0] * m[..., 4] - 0.9 * m[..., 2] * m[..., 3] + 3.0


def gamma_of_all_pairs(kind: str, logits_g: Tensor, exploration: float) -> tuple[Tensor, Tensor]:
    """The probability of each pair of masks under beta x beta, (P,), and its gamma, (P, G)."""
    masks = all_masks(kind)
    log_pi = torch.log_softmax((masks * logits_g).sum(1), 0)
    beta = (1 - exploration) * log_pi.exp() + exploration / len(masks)
    first, second = torch.cartesian_prod(torch.arange(len(masks)), torch.arange(len(masks))).unbind(1)
    pairs_ukg = torch.stack((masks[first], masks[second]), 1)
    pi = make(kind, logits_g.expand(len(pairs_ukg), -1))
    gamma = reinforce(pi, pairs_ukg, reward(pairs_ukg), log_importance(pi, pairs_ukg, exploration))
    return beta[first] * beta[second], gamma


def objective(kind: str, logits_g: Tensor) -> Tensor:
    """E[R] under pi, from the definition, differentiable in the logits."""
    masks = all_masks(kind)
    return torch.softmax((masks * logits_g).sum(1), 0) @ reward(masks)


@pytest.mark.parametrize("kind", ["bernoulli", "fixed"])
@pytest.mark.parametrize("exploration", [0.0, 0.1, 0.6])
def test_reinforce_is_unbiased(kind: str, exploration: float) -> None:
    logits_g = torch.tensor([0.3, -1.2, 2.1, 0.7, -0.4, 1.5], dtype=torch.float64, requires_grad=True)
    (truth,) = torch.autograd.grad(objective(kind, logits_g), logits_g)
    probability, gamma = gamma_of_all_pairs(kind, logits_g.detach(), exploration)
    torch.testing.assert_close(probability @ gamma, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["bernoulli", "fixed"])
@pytest.mark.parametrize("exploration", [0.0, 0.1])
def test_the_gates_gradient_is_unbiased(kind: str, exploration: float) -> None:
    generator = torch.Generator().manual_seed(3)
    spec = GateSpec(MODULES, RANK, 3, 2, hidden=4, factor_width=3, initial_alpha=1.5)
    phi = (spec.init(generator) + 0.3 * torch.randn(1, spec.size, generator=generator)).double()
    phi = phi.requires_grad_()
    one = torch.randn(1, 3 + 2 + UNITS, generator=generator).double()
    features, embedding, gain = torch.split(one, [3, 2, UNITS], 1)
    embedding = embedding.clone().requires_grad_()
    logits_ug = spec.logits(phi, GateState(features, embedding, gain, BUDGET / RANK))
    truth = torch.autograd.grad(objective(kind, logits_ug[0]), (phi, embedding))

    probability, gamma = gamma_of_all_pairs(kind, logits_ug[0].detach(), exploration)
    pairs = len(gamma)
    state = GateState(
        features.expand(pairs, -1),
        embedding.detach().expand(pairs, -1),
        gain.expand(pairs, -1),
        BUDGET / RANK,
    )
    phi_gradient, embedding_gradient = spec.vjp(phi.detach(), state, gamma)
    torch.testing.assert_close(probability @ phi_gradient, truth[0][0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(probability @ embedding_gradient, truth[1][0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["bernoulli", "fixed"])
def test_without_its_weight_exploration_would_bias(kind: str) -> None:
    """Guards the test above: the weights do matter here."""
    logits_g = torch.tensor([0.3, -1.2, 2.1, 0.7, -0.4, 1.5], dtype=torch.float64, requires_grad=True)
    (truth,) = torch.autograd.grad(objective(kind, logits_g), logits_g)
    masks = all_masks(kind)
    beta = 0.9 * torch.softmax((masks * logits_g.detach()).sum(1), 0) + 0.1 / len(masks)
    pairs = list(itertools.product(range(len(masks)), repeat=2))
    pairs_ukg = torch.stack([masks[list(pair)] for pair in pairs])
    pi = make(kind, logits_g.detach().expand(len(pairs), -1))
    unweighted = reinforce(pi, pairs_ukg, reward(pairs_ukg), torch.zeros(len(pairs), 2, dtype=torch.float64))
    probability = torch.stack([beta[list(pair)].prod() for pair in pairs])
    assert (probability @ unweighted - truth).norm() > 0.02 * truth.norm()


@pytest.mark.parametrize("kind", ["bernoulli", "fixed"])
def test_explored_masks_follow_the_mixture(kind: str) -> None:
    draws, exploration = 40_000, 0.3
    logits_g = torch.tensor([0.3, -1.2, 2.1, 0.7, -0.4, 1.5])
    generator = torch.Generator().manual_seed(11)
    uniform, coin = (
        torch.rand(1, draws, UNITS, generator=generator),
        torch.rand(1, draws, generator=generator),
    )
    sampled, log_weight = explored(make(kind, logits_g[None]), exploration, uniform, coin)
    masks = all_masks(kind)
    pi = torch.softmax((masks * logits_g.double()).sum(1), 0)
    beta = (1 - exploration) * pi + exploration / len(masks)
    code = 2 ** torch.arange(UNITS)
    by_code = {int((mask * code).sum()): i for i, mask in enumerate(masks)}
    index = torch.tensor([by_code[c] for c in (sampled[0] * code).sum(1).tolist()])
    counts = torch.bincount(index, minlength=len(masks))
    assert ((counts - draws * beta).abs() < 4.5 * (draws * beta * (1 - beta)).sqrt()).all()
    torch.testing.assert_close(log_weight[0].double(), (pi / beta).log()[index], rtol=1e-4, atol=1e-5)


def test_importance_weights_are_bounded_and_finite_for_hopeless_masks() -> None:
    pi = FixedBudget(torch.tensor([[500.0, 0.0, -500.0]]), modules=1, budget=1)
    log_weight = log_importance(pi, torch.eye(3, dtype=torch.bool)[None], exploration=0.1)
    assert log_weight.isfinite().all()
    assert log_weight.max() <= -torch.log(torch.tensor(0.9)) + 1e-6
    assert log_importance(pi, torch.eye(3, dtype=torch.bool)[None], exploration=0.0).abs().max() == 0


def test_leave_one_out_equals_its_loop() -> None:
    reward_uk = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    loop = [[row[k] - torch.cat((row[:k], row[k + 1 :])).mean() for k in range(4)] for row in reward_uk]
    torch.testing.assert_close(leave_one_out(reward_uk), torch.tensor(loop, dtype=torch.float64))


def test_leave_one_out_needs_two_masks() -> None:
    with pytest.raises(ConfigError, match="at least 2 masks per user, got 1"):
        leave_one_out(torch.zeros(3, 1))


@pytest.mark.parametrize("exploration", [-0.1, 1.0])
def test_an_exploration_that_is_not_a_share_is_refused(exploration: float) -> None:
    with pytest.raises(ConfigError, match="exploration is a share"):
        log_importance(Bernoulli(torch.zeros(1, 2)), torch.zeros(1, 1, 2, dtype=torch.bool), exploration)


def test_price_is_the_gradient_of_the_expected_cost() -> None:
    logits = torch.linspace(-30, 30, 6, dtype=torch.float64)[None].requires_grad_()
    cost_g = torch.arange(1.0, 7.0, dtype=torch.float64)
    (truth,) = torch.autograd.grad(-0.3 * (cost_g * torch.sigmoid(logits)).sum(), logits)
    torch.testing.assert_close(price(Bernoulli(logits.detach()), cost_g, 0.3), truth)


@pytest.mark.parametrize("kind", ["bernoulli", "fixed"])
def test_ascending_the_entropy_bonus_makes_masks_uniform(kind: str) -> None:
    logits_ug = torch.tensor([[0.3, -1.2, 2.1, 0.7, -0.4, 1.5]], dtype=torch.float64)
    for _ in range(400):
        logits_ug = logits_ug + entropy_bonus(make(kind, logits_ug), 2.0)
    pi = make(kind, logits_ug)
    torch.testing.assert_close(pi.inclusion(), pi.uniform().inclusion(), rtol=0, atol=1e-6)
