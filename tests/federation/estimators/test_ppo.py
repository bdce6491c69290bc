"""PPO against autograd on its surrogate, written out over enumerated masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from federation.estimators.ppo import Ppo
from federation.estimators.score import Reinforce, leave_one_out
from federation.mask_distribution import FixedBudget
from tests.federation.estimators.problems import PROBLEMS, Curved, Drawn, Problem, replicas

USERS, SAMPLES, SHARE = 12, 4, 0.2
CASES = ("bernoulli", "1 of 3, twice", "2 of 4, twice", "3 of 8")


def log_parts(problem: Problem, logits_g: Tensor, masks_kg: Tensor) -> Tensor:
    """Log-probability of each gate (Bernoulli), or of each module by enumeration of its masks: (K, P)."""
    if problem.kind == "bernoulli":
        p = torch.sigmoid(logits_g)
        return torch.where(masks_kg, p, 1 - p).log()
    rank = problem.units // problem.modules
    single = Problem("budget", rank, 1, problem.budget)
    parts = []
    for j in range(problem.modules):
        own, choices = slice(j * rank, (j + 1) * rank), single.masks()
        which = (masks_kg[:, None, own] == choices).all(2).long().argmax(1)
        parts.append(single.probabilities(logits_g[own])[which].log())
    return torch.stack(parts, 1)


def surrogate(
    problem: Problem, new_g: Tensor, old_g: Tensor, masks_kg: Tensor, advantage_k: Tensor, ppo: Ppo
) -> tuple[Tensor, int]:
    """The value of the objective, and how many of its ratios are clipped."""
    ratio_kp = (log_parts(problem, new_g, masks_kg) - log_parts(problem, old_g, masks_kg)).exp()
    plain = ratio_kp * advantage_k[:, None]
    bounded = ratio_kp.clamp(1 - ppo.clip, 1 + ppo.clip) * advantage_k[:, None]
    old, new = problem.probabilities(old_g), problem.probabilities(new_g)
    divergence = (old * (old.log() - new.log())).sum()
    value = torch.minimum(plain, bounded).sum(1).mean() - ppo.kl * divergence
    return value, int((bounded < plain).sum())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kl", [0.0, 0.8])
def test_gamma_is_the_displacement_by_ascent_on_the_surrogate(case: str, kl: float) -> None:
    problem, ppo = PROBLEMS[case], Ppo(epochs=5, rate=0.3, clip=0.2, kl=kl)
    draws, exploration = Drawn(USERS, 7), problem.exploration(SHARE)
    pi = problem.distribution(problem.logits_g.expand(USERS, -1))
    gamma_ug = ppo.estimate(pi, Curved(), exploration, SAMPLES, draws).gamma_ug
    masks_ukg, log_weight_uk = exploration.sample(
        pi, draws.uniform("mask", (SAMPLES, problem.units)), draws.uniform("explore", (SAMPLES,))
    )
    advantage_uk = log_weight_uk.exp() * leave_one_out(Curved().value(masks_ukg))
    clipped = 0
    for u in range(USERS):
        logits_g = problem.logits_g
        for _ in range(ppo.epochs):
            new_g = logits_g.clone().requires_grad_()
            value, count = surrogate(problem, new_g, problem.logits_g, masks_ukg[u], advantage_uk[u], ppo)
            logits_g = logits_g + ppo.rate * torch.autograd.grad(value, new_g)[0]
            clipped += count
        displacement_g = (logits_g - problem.logits_g) / (ppo.epochs * ppo.rate)
        torch.testing.assert_close(gamma_ug[u], displacement_g, rtol=1e-8, atol=1e-10)
    assert clipped > USERS  # or the clip would not have been tested


@pytest.mark.parametrize("case", CASES)
def test_one_epoch_is_reinforce(case: str) -> None:
    one = replicas(PROBLEMS[case], Ppo(epochs=1, kl=0.0), SHARE, SAMPLES, 50, Curved())
    plain = replicas(PROBLEMS[case], Reinforce(), SHARE, SAMPLES, 50, Curved())
    torch.testing.assert_close(one.gamma_ug, plain.gamma_ug, rtol=1e-13, atol=1e-13)
    assert torch.equal(one.reward_uk, plain.reward_uk)
    assert torch.equal(one.mask_ug, plain.mask_ug)


def test_a_heavy_divergence_term_keeps_the_logits_near() -> None:
    free, held = (
        replicas(PROBLEMS["3 of 8"], Ppo(epochs=8, rate=0.2, clip=10.0, kl=kl), 0.0, SAMPLES, 50, Curved()).gamma_ug
        for kl in (0.0, 8.0)
    )
    assert held.norm() < 0.8 * free.norm()


def test_a_ratio_that_would_overflow_gives_a_finite_estimate() -> None:
    """Two unlikely masks share units: one step towards the better makes the worse e^150 times as likely."""
    logits_ug = torch.tensor([[-200.0, -200.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    masks_ukg = torch.tensor([[[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0]]]).bool()
    pi, advantage_uk = FixedBudget(logits_ug, 1, 3), torch.tensor([[1.0, -0.001]])
    assert Ppo(epochs=3, rate=600.0)._mean_gradient(pi, masks_ukg, advantage_uk).isfinite().all()
