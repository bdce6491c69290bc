"""The exact terms against autograd of the enumerated expectation."""

from __future__ import annotations

import pytest
import torch

from federation.estimators.terms import balance, entropy_bonus, price
from federation.mask_distribution import Bernoulli
from tests.federation.estimators.problems import PROBLEMS

every_problem = pytest.mark.parametrize("case", PROBLEMS)


@every_problem
def test_the_price_is_the_gradient_of_the_expected_cost(case: str) -> None:
    problem = PROBLEMS[case]
    cost_g = torch.arange(1.0, problem.units + 1, dtype=torch.float64)
    truth_g = problem.gradient(-0.3 * (problem.masks() * cost_g).sum(1))
    ours_ug = price(problem.distribution(problem.logits_g.expand(2, -1)), cost_g, 0.3)
    torch.testing.assert_close(ours_ug, truth_g.expand(2, -1))


def test_independent_units_pay_p_times_1_minus_p_even_far_out() -> None:
    logits_ug = torch.linspace(-30, 30, 6, dtype=torch.float64)[None].requires_grad_()
    cost_g = torch.arange(1.0, 7.0, dtype=torch.float64)
    (truth,) = torch.autograd.grad(-0.3 * (cost_g * torch.sigmoid(logits_ug)).sum(), logits_ug)
    torch.testing.assert_close(price(Bernoulli(logits_ug.detach()), cost_g, 0.3), truth)


def test_units_of_equal_cost_under_a_budget_have_no_price() -> None:
    problem = PROBLEMS["2 of 4, twice"]
    ours_ug = price(problem.distribution(problem.logits_g[None]), torch.ones(8, dtype=torch.float64), 1.0)
    torch.testing.assert_close(ours_ug, torch.zeros_like(ours_ug))


@every_problem
def test_the_entropy_bonus_is_the_gradient_of_the_entropy(case: str) -> None:
    problem = PROBLEMS[case]
    logits_g = problem.logits_g.clone().requires_grad_()
    p = problem.probabilities(logits_g)
    (truth_g,) = torch.autograd.grad(-0.7 * (p * p.log()).sum(), logits_g)
    ours_ug = entropy_bonus(problem.distribution(problem.logits_g[None]), 0.7)
    torch.testing.assert_close(ours_ug[0], truth_g)


@pytest.mark.parametrize("case", ["bernoulli", "1 of 3, twice"])
def test_ascending_the_entropy_bonus_makes_masks_uniform(case: str) -> None:
    problem = PROBLEMS[case]
    logits_ug = problem.logits_g[None]
    for _ in range(400):
        logits_ug = logits_ug + entropy_bonus(problem.distribution(logits_ug), 2.0)
    pi = problem.distribution(logits_ug)
    torch.testing.assert_close(pi.inclusion(), pi.uniform().inclusion(), rtol=0, atol=1e-6)


@every_problem
def test_the_balance_is_the_gradient_of_the_expected_excess_load(case: str) -> None:
    problem = PROBLEMS[case]
    load_g = torch.arange(0.0, problem.units, dtype=torch.float64) / 3
    truth_g = problem.gradient(-0.2 * (problem.masks() * (load_g / load_g.mean() - 1)).sum(1))
    torch.testing.assert_close(balance(problem.distribution(problem.logits_g[None]), load_g, 0.2)[0], truth_g)


def test_a_load_below_zero_counts_as_zero() -> None:
    pi = PROBLEMS["bernoulli"].distribution(PROBLEMS["bernoulli"].logits_g[None])
    others = [0.0, 0.2, 0.4, 0.1, 0.3]
    noisy_g, zero_g = (torch.tensor([first, *others], dtype=torch.float64) for first in (-5.0, 0.0))
    torch.testing.assert_close(balance(pi, noisy_g, 1.0), balance(pi, zero_g, 1.0))


@every_problem
@pytest.mark.parametrize("load", [0.0, 0.25])
def test_equal_loads_are_in_balance(case: str, load: float) -> None:
    problem = PROBLEMS[case]
    load_g = torch.full((problem.units,), load, dtype=torch.float64)
    assert not balance(problem.distribution(problem.logits_g[None]), load_g, 1.0).any()
