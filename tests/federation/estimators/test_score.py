"""Score-function estimators in exact expectation, over every tuple of masks."""

from __future__ import annotations

import itertools

import pytest
import torch

from federation.errors import ConfigError
from federation.estimators.registry import ESTIMATORS
from federation.estimators.score import MuProp, Reinforce, ReinforceGain, SelfCritical, leave_one_out, score_gradient
from federation.gate import GateSpec, GateState
from tests.federation.estimators.problems import PROBLEMS, Black, Curved, Drawn, drawing, over_all_tuples, replicas

SAMPLES = {"reinforce": 2, "reinforce_gain": 2, "self_critical": 1, "muprop": 1}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("case", PROBLEMS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_the_expectation_is_the_gradient_of_the_expected_reward(name: str, case: str, share: float) -> None:
    problem = PROBLEMS[case]
    probability, estimate = over_all_tuples(problem, ESTIMATORS.make(name), share, SAMPLES[name])
    truth_g = problem.gradient(Curved().value(problem.masks()))
    torch.testing.assert_close(probability @ estimate.gamma_ug, truth_g, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", SAMPLES)
def test_so_it_is_with_more_masks(name: str) -> None:
    problem = PROBLEMS["1 of 3, twice"]
    probability, estimate = over_all_tuples(problem, ESTIMATORS.make(name), 0.1, SAMPLES[name] + 1)
    truth_g = problem.gradient(Curved().value(problem.masks()))
    torch.testing.assert_close(probability @ estimate.gamma_ug, truth_g, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("case", PROBLEMS)
def test_without_its_weight_exploration_would_bias(case: str) -> None:
    """Guards the tests above: the weights do matter there."""
    problem, share = PROBLEMS[case], 0.1
    masks, mixture = problem.masks(), problem.mixture(share)
    index = torch.tensor(list(itertools.product(range(len(masks)), repeat=2)))
    pi = problem.distribution(problem.logits_g.expand(len(index), -1))
    unweighted = score_gradient(pi, masks[index], leave_one_out(Curved().value(masks[index])))
    truth_g = problem.gradient(Curved().value(masks))
    assert (mixture[index].prod(1) @ unweighted - truth_g).norm() > 0.02 * truth_g.norm()


@pytest.mark.parametrize("name", SAMPLES)
def test_the_rewards_are_those_of_the_masks(name: str) -> None:
    problem = PROBLEMS["2 of 4, twice"]
    masks_ukg = problem.masks()[torch.tensor([[0, 7, 7], [35, 2, 11]])]
    pi = problem.distribution(problem.logits_g.expand(2, -1))
    estimate = ESTIMATORS.make(name).estimate(pi, Curved(), problem.exploration(0.1), 3, drawing(masks_ukg))
    assert torch.equal(estimate.reward_uk, Curved().value(masks_ukg))


@pytest.mark.parametrize("case", ["bernoulli", "2 of 4, twice"])
def test_a_gain_that_explains_the_reward_leaves_no_variance(case: str) -> None:
    problem, additive = PROBLEMS[case], Curved(interaction=0.0)
    for estimator in (ReinforceGain(), MuProp()):
        gamma_ug = replicas(problem, estimator, 0.1, 2, 1000, additive).gamma_ug
        torch.testing.assert_close(
            gamma_ug, problem.gradient(additive.value(problem.masks())).expand_as(gamma_ug), rtol=1e-9, atol=1e-11
        )


@pytest.mark.parametrize("case", ["bernoulli", "2 of 4, twice"])
def test_the_gain_lowers_the_variance_of_a_mostly_additive_reward(case: str) -> None:
    problem, mostly_additive = PROBLEMS[case], Curved(interaction=0.3)
    without, with_gain = (
        replicas(problem, estimator, 0.1, 2, 20_000, mostly_additive).gamma_ug.var(0).sum()
        for estimator in (Reinforce(), ReinforceGain())
    )
    assert with_gain < 0.25 * without


def test_self_critical_learns_nothing_from_the_mask_it_would_use() -> None:
    problem = PROBLEMS["2 of 4, twice"]
    pi = problem.distribution(problem.logits_g[None])
    estimate = SelfCritical().estimate(pi, Black(), problem.exploration(0.1), 1, drawing(pi.mode()[:, None]))
    assert not estimate.gamma_ug.any()


@pytest.mark.parametrize("case", ["bernoulli", "1 of 3, twice"])
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_the_gates_gradient_is_unbiased(case: str, share: float) -> None:
    problem, masks = PROBLEMS[case], PROBLEMS[case].masks()
    generator = torch.Generator().manual_seed(3)
    spec = GateSpec(2, 3, 3, 2, hidden=4, factor_width=3, initial_alpha=1.5, groups=2)
    phi = torch.randn(1, spec.size, generator=generator).double().mul(0.5).requires_grad_()
    features, embedding, gain = torch.split(torch.randn(1, 11, generator=generator).double(), [3, 2, 6], 1)
    embedding = embedding.clone().requires_grad_()
    state = GateState(features, embedding, gain, torch.ones(1), 1 / 3)
    logits_ug = spec.logits(phi, state)
    expected_reward = problem.probabilities(logits_ug[0]) @ Curved().value(masks)
    truth = torch.autograd.grad(expected_reward, (phi, embedding))

    index = torch.cartesian_prod(torch.arange(len(masks)), torch.arange(len(masks)))
    pairs, logits_g = len(index), logits_ug[0].detach()
    pi = problem.distribution(logits_g.expand(pairs, -1))
    gamma_ug = Reinforce().estimate(pi, Curved(), problem.exploration(share), 2, drawing(masks[index])).gamma_ug
    mixture = (1 - share) * problem.probabilities(logits_g) + share * problem.probabilities(problem.toward_g)
    feature_pf, embedding_pe, gain_pg = (part.detach().expand(pairs, -1) for part in (features, embedding, gain))
    each = GateState(feature_pf, embedding_pe, gain_pg, torch.ones(pairs), 1 / 3)
    phi_gradient, embedding_gradient = spec.vjp(phi.detach(), each, gamma_ug)
    probability = mixture[index].prod(1)
    torch.testing.assert_close(probability @ phi_gradient, truth[0][0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(probability @ embedding_gradient, truth[1][0], rtol=1e-9, atol=1e-12)


def test_leave_one_out_equals_its_loop() -> None:
    reward_uk = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    loop = [[row[k] - torch.cat((row[:k], row[k + 1 :])).mean() for k in range(4)] for row in reward_uk]
    torch.testing.assert_close(leave_one_out(reward_uk), torch.tensor(loop, dtype=torch.float64))


def test_leave_one_out_needs_two_masks() -> None:
    with pytest.raises(ConfigError, match="at least 2 masks per user, got 1"):
        leave_one_out(torch.zeros(3, 1))


def test_far_logits_give_finite_estimates() -> None:
    problem = PROBLEMS["2 of 4, twice"]
    pi = problem.distribution(1000 * problem.logits_g.expand(50, -1))
    for name in SAMPLES:
        estimator = ESTIMATORS.make(name)
        estimate = estimator.estimate(pi, Curved(), problem.exploration(0.5), 2, Drawn(50, 1))
        assert estimate.gamma_ug.isfinite().all()
