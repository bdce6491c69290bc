"""Distributions over masks against enumeration of all masks, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from federation.errors import ConfigError, MaskError
from federation.mask_distribution import Bernoulli, FixedBudget, MaskDistribution

EDGES = {
    "equal": torch.zeros(6),
    "spread": torch.tensor([50.0, -50.0, 3.0, -2.0, 50.0, -50.0]),
    "all high": torch.full((6,), 50.0),
    "all low": torch.full((6,), -50.0),
    "one far above": torch.tensor([1000.0, 0.0, 0.1, -0.1, 0.2, 0.3]),
    "ordinary": torch.tensor([0.3, -1.2, 2.1, 0.7, -0.4, 1.5]),
}
MODULES_AND_BUDGET = {
    "1 of 6": (1, 1),
    "2 of 6": (1, 2),
    "6 of 6": (1, 6),
    "2 of 3, twice": (2, 2),
    "1 of 2, three times": (3, 1),
}
KINDS = ("bernoulli", *MODULES_AND_BUDGET)


def distribution(kind: str, logits_ug: Tensor) -> MaskDistribution:
    if kind == "bernoulli":
        return Bernoulli(logits_ug)
    return FixedBudget(logits_ug, *MODULES_AND_BUDGET[kind])


def all_masks(kind: str) -> Tensor:
    """Every possible mask of six units: (M, 6) bool."""
    masks = torch.tensor(list(itertools.product((False, True), repeat=6)))
    if kind == "bernoulli":
        return masks
    modules, budget = MODULES_AND_BUDGET[kind]
    return masks[(masks.view(64, modules, -1).sum(2) == budget).all(1)]


def by_enumeration(kind: str, logits_g: Tensor) -> tuple[Tensor, Tensor]:
    """All masks (M, 6) and their log-probabilities (M,), from the definition."""
    masks = all_masks(kind)
    return masks, torch.log_softmax((masks * logits_g).sum(1), 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edge", EDGES)
def test_every_quantity_equals_its_enumeration(kind: str, edge: str) -> None:
    logits_ug = torch.stack((EDGES["ordinary"].flip(0), EDGES[edge])).double()
    ours = distribution(kind, logits_ug)
    for u in range(2):
        masks, log_prob = by_enumeration(kind, logits_ug[u])
        prob = log_prob.exp()
        inclusion = prob @ masks.double()
        torch.testing.assert_close(ours.log_prob(masks.expand(2, -1, -1))[u], log_prob)
        torch.testing.assert_close(ours.inclusion()[u], inclusion, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ours.entropy()[u], -(prob * log_prob).sum(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            ours.score(masks.expand(2, -1, -1))[u], masks.double() - inclusion, rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edge", EDGES)
def test_float32_is_finite_and_close_to_float64(kind: str, edge: str) -> None:
    logits_ug = EDGES[edge][None]
    single, double = distribution(kind, logits_ug), distribution(kind, logits_ug.double())
    torch.testing.assert_close(single.inclusion().double(), double.inclusion(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single.entropy().double(), double.entropy(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(single.entropy_gradient().double(), double.entropy_gradient(), rtol=1e-3, atol=1e-3)
    assert single.log_prob(all_masks(kind)[None]).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_gradient_equals_finite_differences(kind: str) -> None:
    logits_ug = EDGES["ordinary"][None].double()
    step = 1e-5 * torch.eye(6, dtype=torch.float64)
    above = distribution(kind, logits_ug + step).entropy()
    below = distribution(kind, logits_ug - step).entropy()
    torch.testing.assert_close(
        distribution(kind, logits_ug).entropy_gradient()[0], (above - below) / 2e-5, rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edge", EDGES)
def test_covariance_times_equals_the_enumerated_covariance(kind: str, edge: str) -> None:
    logits_ug = torch.stack((EDGES["ordinary"].flip(0), EDGES[edge])).double()
    v_ug = torch.randn(2, 6, generator=torch.Generator().manual_seed(3)).double()
    ours = distribution(kind, logits_ug).covariance_times(v_ug)
    for u in range(2):
        masks, log_prob = by_enumeration(kind, logits_ug[u])
        centred = masks.double() - log_prob.exp() @ masks.double()
        covariance = centred.t() @ (log_prob.exp()[:, None] * centred)
        torch.testing.assert_close(ours[u], covariance @ v_ug[u], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_covariance_is_the_derivative_of_the_inclusion(kind: str) -> None:
    logits_ug = EDGES["ordinary"][None].double().requires_grad_()
    inclusion_g = distribution(kind, logits_ug).inclusion()[0]
    jacobian = torch.cat([torch.autograd.grad(value, logits_ug, retain_graph=True)[0] for value in inclusion_g])
    columns = distribution(kind, logits_ug.detach().expand(6, -1)).covariance_times(torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(columns, jacobian)


@pytest.mark.parametrize("kind", KINDS)
def test_one_vector_serves_all_users(kind: str) -> None:
    generator = torch.Generator().manual_seed(8)
    logits_ug, v_1g = torch.randn(5, 6, generator=generator), torch.randn(1, 6, generator=generator)
    ours = distribution(kind, logits_ug)
    assert ours.covariance_times(v_1g).equal(ours.covariance_times(v_1g.repeat(5, 1)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edge", EDGES)
def test_entropy_share_is_of_the_number_of_masks(kind: str, edge: str) -> None:
    masks, log_prob = by_enumeration(kind, EDGES[edge].double())
    share = distribution(kind, EDGES[edge][None].double()).entropy_share()
    if len(masks) == 1:
        assert share.tolist() == [1.0]
    else:
        truth = -(log_prob.exp() * log_prob).sum() / math.log(len(masks))
        torch.testing.assert_close(share[0], truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_share_is_within_zero_and_one(kind: str) -> None:
    logits_ug = torch.randn(300, 6, generator=torch.Generator().manual_seed(9)) * torch.logspace(-5, 3, 300)[:, None]
    share = distribution(kind, logits_ug).entropy_share()
    assert ((share >= 0) & (share <= 1)).all()
    torch.testing.assert_close(distribution(kind, logits_ug).uniform().entropy_share(), torch.ones(300))


@pytest.mark.parametrize("kind", KINDS)
def test_score_is_the_gradient_of_log_prob(kind: str) -> None:
    masks = all_masks(kind)[None]
    logits_ug = EDGES["ordinary"][None].double().requires_grad_()
    log_prob = distribution(kind, logits_ug).log_prob(masks)[0]
    gradients = [torch.autograd.grad(value, logits_ug, retain_graph=True)[0][0] for value in log_prob]
    torch.testing.assert_close(distribution(kind, logits_ug).score(masks)[0], torch.stack(gradients))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edge", EDGES)
def test_sampling_frequencies_match_probabilities(kind: str, edge: str) -> None:
    draws = 20_000
    logits_ug = torch.stack((EDGES[edge], EDGES["ordinary"].flip(0)))
    uniform = torch.rand(2, draws, 6, generator=torch.Generator().manual_seed(5)).clamp_min(2.0**-25)
    samples = distribution(kind, logits_ug).sample(uniform)
    code = 2 ** torch.arange(6)
    for u in range(2):
        masks, log_prob = by_enumeration(kind, logits_ug[u].double())
        counts = torch.bincount((samples[u] * code).sum(1), minlength=64)
        expected = torch.zeros(64, dtype=torch.float64)
        expected[(masks * code).sum(1)] = draws * log_prob.exp()
        spread = (expected * (1 - expected / draws)).sqrt()
        assert ((counts - expected).abs() <= 4.5 * spread + 1e-6 * draws).all()


@pytest.mark.parametrize("budget", [1, 8, 31, 32])
def test_a_fixed_budget_is_always_met(budget: int) -> None:
    generator = torch.Generator().manual_seed(budget)
    logits_ug = torch.randn(16, 4 * 32, generator=generator) * torch.logspace(-1, 3, 16)[:, None]
    samples = FixedBudget(logits_ug, 4, budget).sample(torch.rand(16, 5, 128, generator=generator))
    assert (samples.view(16, 5, 4, 32).sum(3) == budget).all()


@pytest.mark.parametrize("kind", KINDS)
def test_mode_is_the_likeliest_mask(kind: str) -> None:
    logits_g = EDGES["ordinary"]
    masks, log_prob = by_enumeration(kind, logits_g)
    assert distribution(kind, logits_g[None]).mode()[0].equal(masks[log_prob.argmax()])


def test_mode_prefers_the_lower_unit_between_equals() -> None:
    mode = FixedBudget(torch.tensor([[0.0, 1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 5.0]]), modules=2, budget=2).mode()
    assert mode.nonzero()[:, 1].tolist() == [1, 2, 4, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_gives_every_mask_the_same_probability(kind: str) -> None:
    masks = all_masks(kind)
    log_prob = distribution(kind, EDGES["spread"][None].double()).uniform().log_prob(masks[None])[0]
    torch.testing.assert_close(log_prob.exp(), torch.full((len(masks),), 1 / len(masks), dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_of_users_equals_single_users(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logits_ug, uniform = torch.randn(9, 6, generator=generator), torch.rand(9, 3, 6, generator=generator)
    block = distribution(kind, logits_ug)
    for u in range(9):
        single = distribution(kind, logits_ug[u : u + 1])
        assert single.sample(uniform[u : u + 1])[0].equal(block.sample(uniform)[u])
        torch.testing.assert_close(single.inclusion()[0], block.inclusion()[u], rtol=0, atol=1e-6)
        torch.testing.assert_close(single.entropy_gradient()[0], block.entropy_gradient()[u], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_distribution_of_one_user_serves_all(kind: str) -> None:
    one = distribution(kind, EDGES["ordinary"][None])
    masks = all_masks(kind)[:4].expand(3, -1, -1)
    repeated = one.take(torch.zeros(3, dtype=torch.int64))
    assert repeated.logits_ug.shape == (3, 6)
    assert one.log_prob(masks).equal(repeated.log_prob(masks))
    assert one.score(masks).equal(repeated.score(masks))


def test_a_budget_over_all_modules_is_exact_in_single_precision() -> None:
    generator = torch.Generator().manual_seed(2)
    logits_ug = 4.0 * torch.randn(4, 256, generator=generator)
    one, two = FixedBudget(logits_ug, modules=1, budget=64), FixedBudget(logits_ug.double(), modules=1, budget=64)
    samples = one.sample(torch.rand(4, 8, 256, generator=generator))
    assert (samples.sum(2) == 64).all()
    torch.testing.assert_close(one.inclusion().sum(1), torch.full((4,), 64.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(one.inclusion().double(), two.inclusion(), rtol=0, atol=1e-4)
    torch.testing.assert_close(one.log_prob(samples).double(), two.log_prob(samples), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("budget", [0, -1, 4])
def test_an_impossible_budget_is_refused(budget: int) -> None:
    with pytest.raises(ConfigError, match=rf"within 1\.\.3 units per module, got {budget}"):
        FixedBudget(torch.zeros(1, 6), modules=2, budget=budget)


def test_logits_that_do_not_divide_into_modules_are_refused() -> None:
    with pytest.raises(ConfigError, match="got 6 for 4 modules"):
        FixedBudget(torch.zeros(1, 6), modules=4, budget=1)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_the_marginals_of_independent_units_or_modules(kind: str) -> None:
    logits_g = EDGES["ordinary"].double()
    masks, log_prob = by_enumeration(kind, logits_g)
    ours = distribution(kind, logits_g[None]).log_prob_of_parts(masks[None])[0]
    parts = 6 if kind == "bernoulli" else MODULES_AND_BUDGET[kind][0]
    assert ours.shape == (len(masks), parts)
    own = masks.view(len(masks), parts, -1)
    same_mnp = (own[:, None] == own[None]).all(3)
    torch.testing.assert_close(ours.exp(), (log_prob.exp()[None, :, None] * same_mnp).sum(1))


@pytest.mark.parametrize("kind", KINDS)
def test_other_logits_keep_the_kind(kind: str) -> None:
    ours = distribution(kind, torch.zeros(2, 6)).with_logits(EDGES["ordinary"].double()[None])
    masks, log_prob = by_enumeration(kind, EDGES["ordinary"].double())
    torch.testing.assert_close(ours.log_prob(masks[None])[0], log_prob)


@pytest.mark.parametrize("kind", KINDS)
def test_the_masks_that_it_can_give_are_those_that_it_takes(kind: str) -> None:
    possible = {tuple(mask) for mask in all_masks(kind).tolist()}
    ours = distribution(kind, torch.zeros(1, 6))
    for mask in itertools.product((False, True), repeat=6):
        if mask in possible:
            ours.check_masks(torch.tensor([[mask]]))
        else:
            with pytest.raises(MaskError, match="units in each module, got one with"):
                ours.check_masks(torch.tensor([[mask]]))


def test_a_mask_of_another_budget_has_no_log_prob() -> None:
    with pytest.raises(MaskError, match="has 2 units in each module, got one with 3"):
        FixedBudget(torch.zeros(1, 6), modules=2, budget=2).log_prob(torch.ones(1, 1, 6, dtype=torch.bool))
