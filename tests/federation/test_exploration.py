"""Exploration: the mixture by enumeration, its weights, and what it draws toward."""

from __future__ import annotations

import math

import pytest
import torch

from federation.errors import ConfigError
from federation.exploration import Exploration, rarely_used
from federation.mask_distribution import Bernoulli, FixedBudget
from tests.federation.estimators.problems import PROBLEMS, Drawn


@pytest.mark.parametrize("case", ["bernoulli", "1 of 3, twice", "2 of 4, twice"])
def test_explored_masks_follow_the_mixture(case: str) -> None:
    draws, share, problem = 40_000, 0.3, PROBLEMS[case]
    one = Drawn(1, 11)
    sampled, log_weight = problem.exploration(share).sample(
        problem.distribution(problem.logits_g[None]),
        one.uniform("mask", (draws, problem.units)),
        one.uniform("explore", (draws,)),
    )
    masks, mixture = problem.masks(), problem.mixture(share)
    index = (sampled[0, :, None] == masks).all(2).long().argmax(1)
    assert (masks[index] == sampled[0]).all()
    counts = torch.bincount(index, minlength=len(masks))
    assert ((counts - draws * mixture).abs() < 4.5 * (draws * mixture * (1 - mixture)).sqrt()).all()
    weight = problem.probabilities(problem.logits_g) / mixture
    torch.testing.assert_close(log_weight[0], weight.log()[index])


def test_a_mask_is_explored_as_a_whole_and_by_its_own_coin() -> None:
    sure, never = Bernoulli(torch.full((3, 4), 50.0)), Bernoulli(torch.full((1, 4), -50.0))
    coin_uk = torch.tensor([[0.9, 0.9], [0.1, 0.9], [0.1, 0.1]])
    masks_ukg, _ = Exploration(0.5, never).sample(sure, torch.full((3, 2, 4), 0.5), coin_uk)
    assert torch.equal(masks_ukg, (coin_uk > 0.5)[:, :, None].expand(3, 2, 4))


def test_importance_weights_are_bounded_and_finite_for_hopeless_masks() -> None:
    pi = FixedBudget(torch.tensor([[500.0, 0.0, -500.0]]), modules=1, budget=1)
    masks = torch.eye(3, dtype=torch.bool)[None]
    log_weight = Exploration(0.1, pi.uniform()).log_importance(pi, masks)
    assert log_weight.isfinite().all()
    assert log_weight.max() <= -math.log(0.9) + 1e-6
    assert Exploration(0.0, pi.uniform()).log_importance(pi, masks).abs().max() == 0


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_an_exploration_that_is_not_a_share_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="exploration is a share"):
        Exploration(share, Bernoulli(torch.zeros(1, 2)))


def test_a_unit_is_favoured_by_how_rarely_it_is_used() -> None:
    load_g = torch.tensor([0.0, 0.1, 0.2, 0.5])
    logits_g = rarely_used(load_g, 0.3)[0]
    assert (logits_g.diff() < 0).all()
    mean_load = rarely_used(torch.tensor([0.0, 0.2, 0.4, 0.2]), 0.3)[0]
    assert (mean_load[0] - mean_load[1]).item() == pytest.approx(math.log(11), rel=1e-5)
    torch.testing.assert_close(rarely_used(7 * load_g, 0.3)[0], logits_g)


@pytest.mark.parametrize("share", [0.02, 0.25, 0.9])
def test_independent_units_are_explored_at_the_share_that_is_asked_for(share: float) -> None:
    load_g = torch.cat((torch.zeros(95), torch.ones(5)))
    assert Bernoulli(rarely_used(load_g, share)).inclusion().mean().item() == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("load", [0.0, 0.3])
def test_equal_loads_favour_no_unit(load: float) -> None:
    logits_1g = rarely_used(torch.full((5,), load), 0.25)
    torch.testing.assert_close(logits_1g, torch.full((1, 5), math.log(0.25 / 0.75)))


def test_a_load_below_zero_counts_as_zero() -> None:
    torch.testing.assert_close(*(rarely_used(torch.tensor([least, 0.2, 0.4]), 0.3) for least in (-0.4, 0.0)))
