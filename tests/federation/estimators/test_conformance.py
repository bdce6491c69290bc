"""What every estimator keeps, ours and installed ones: a new plugin is put to this file by being known."""

from __future__ import annotations

import pytest
import torch

from federation.estimators.protocol import Estimator
from federation.estimators.registry import ESTIMATORS, checked
from tests.federation.estimators.problems import (
    LOGITS,
    PROBLEMS,
    Black,
    Curved,
    Drawn,
    OneOf,
    Problem,
    Untried,
    replicas,
)

SHARE = 0.2
CASES = [
    (name, problem)
    for name in ESTIMATORS.known()
    for problem in ("bernoulli", "1 of 3, twice", "3 of 8")
    if PROBLEMS[problem].kind in ESTIMATORS.make(name).distributions
]
every_case = pytest.mark.parametrize(("name", "case"), CASES)


def made(name: str, problem: Problem) -> tuple[Estimator, int]:
    """The estimator, and a number of masks that it takes."""
    estimator = ESTIMATORS.make(name)
    samples = max(4, estimator.fewest, estimator.multiple)
    samples += -samples % estimator.multiple
    return estimator, samples


@every_case
def test_an_estimate_has_its_shapes_and_a_possible_mask(name: str, case: str) -> None:
    problem = PROBLEMS[case]
    estimator, samples = made(name, problem)
    estimate = replicas(problem, estimator, SHARE, samples, 5, Curved())
    assert checked(estimate, problem.distribution(problem.logits_g.expand(5, -1)), samples, name)
    assert estimate.gamma_ug.isfinite().all()
    assert estimate.reward_uk.isfinite().all()
    assert not estimate.gamma_ug.requires_grad


@every_case
def test_the_fewest_masks_suffice(name: str, case: str) -> None:
    problem = PROBLEMS[case]
    estimator, _ = made(name, problem)
    estimate = replicas(problem, estimator, SHARE, estimator.fewest, 5, Curved())
    assert estimate.gamma_ug.isfinite().all()
    assert estimate.reward_uk.shape == (5, estimator.fewest)


@every_case
def test_stacked_equals_single(name: str, case: str) -> None:
    problem = PROBLEMS[case]
    estimator, samples = made(name, problem)
    logits_ug = torch.stack([LOGITS.roll(u)[: problem.units] * (1 + u) for u in range(4)])
    draws = Drawn(4, 3)
    together = estimator.estimate(problem.distribution(logits_ug), Curved(), problem.exploration(SHARE), samples, draws)
    for u in range(4):
        pi = problem.distribution(logits_ug[u : u + 1])
        alone = estimator.estimate(pi, Curved(), problem.exploration(SHARE), samples, OneOf(draws, u))
        torch.testing.assert_close(together.gamma_ug[u], alone.gamma_ug[0])
        torch.testing.assert_close(together.reward_uk[u], alone.reward_uk[0])
        assert (together.mask_ug[u] == alone.mask_ug[0]).all()


@every_case
def test_only_a_differentiable_one_asks_for_the_rewards_gradient(name: str, case: str) -> None:
    problem = PROBLEMS[case]
    estimator, samples = made(name, problem)
    pi = problem.distribution(problem.logits_g[None])

    def estimate() -> object:
        return estimator.estimate(pi, Black(), problem.exploration(SHARE), samples, Drawn(1, 1))

    if estimator.differentiable:
        with pytest.raises(AssertionError, match="promised"):
            estimate()
    else:
        assert estimate()


@every_case
def test_only_one_that_tries_masks_asks_for_their_reward(name: str, case: str) -> None:
    problem = PROBLEMS[case]
    estimator, samples = made(name, problem)
    pi = problem.distribution(problem.logits_g[None])

    def estimate() -> object:
        return estimator.estimate(pi, Untried(), problem.exploration(SHARE), samples, Drawn(1, 1))

    if estimator.tries_masks:
        with pytest.raises(AssertionError, match="promised"):
            estimate()
    else:
        assert estimate()


@every_case
def test_the_trained_mask_follows_the_exploration_mixture(name: str, case: str) -> None:
    problem, users = PROBLEMS[case], 30_000
    estimator, _ = made(name, problem)
    estimate = replicas(problem, estimator, SHARE, estimator.fewest, users, Curved())
    code = 2 ** torch.arange(problem.units)
    seen = torch.bincount((estimate.mask_ug * code).sum(1), minlength=2**problem.units)[(problem.masks() * code).sum(1)]
    assert seen.sum() == users
    expected = problem.mixture(SHARE)
    assert ((seen - users * expected).abs() < 4.5 * (users * expected * (1 - expected)).sqrt() + 1).all()


@pytest.mark.parametrize(("name", "case"), [case for case in CASES if ESTIMATORS.make(case[0]).unbiased])
def test_the_unbiased_ones_estimate_the_gradient_of_the_expected_reward(name: str, case: str) -> None:
    problem, users = PROBLEMS[case], 200_000
    estimator, samples = made(name, problem)
    gamma_ug = replicas(problem, estimator, SHARE, samples, users, Curved()).gamma_ug
    truth_g = problem.gradient(Curved().value(problem.masks()))
    assert ((gamma_ug.mean(0) - truth_g).abs() < 4 * gamma_ug.std(0) / users**0.5 + 1e-9).all()
    assert (gamma_ug.std(0) / users**0.5 < 0.02 * truth_g.norm()).all()  # or the line above would say little
