"""DisARM over every pair of masks that can be drawn, from the policy and exploring."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from federation.errors import ConfigError
from federation.estimators.antithetic import Disarm, log_pair_probability
from tests.federation.estimators.problems import PROBLEMS, Curved, Drawn, Problem, Scripted

PROBLEM = PROBLEMS["bernoulli"]
ODDS_AND_ENDS = torch.tensor([[0.0, 1e-4, -3.0, 40.0, -60.0, 0.7]], dtype=torch.float64)


def pair_table(logit: float) -> dict[tuple[bool, bool], float]:
    """The law of (b, b~) of one gate, by the length of the intervals of u in which each occurs."""
    p = torch.sigmoid(torch.tensor(logit, dtype=torch.float64)).item()
    return {
        (True, True): max(2 * p - 1, 0.0),
        (False, False): max(1 - 2 * p, 0.0),
        (True, False): min(p, 1 - p),
        (False, True): min(p, 1 - p),
    }


def outcomes(logits_g: Tensor) -> tuple[Tensor, Tensor]:
    """Uniform numbers that reach every pair which these logits can give, (O, G), and their probabilities, (O,)."""
    different = [pair_table(float(logit))[True, False] for logit in logits_g]
    per_gate = [((1e-9, d), (1 - 1e-9, d), (0.5, 1 - 2 * d)) for d in different]
    numbers = torch.tensor(list(itertools.product(*per_gate)), dtype=torch.float64)
    return numbers[:, :, 0], numbers[:, :, 1].prod(1)


def expectation(problem: Problem, share: float) -> Tensor:
    own, toward = outcomes(problem.logits_g), outcomes(problem.toward_g)
    uniform = torch.cat((own[0], toward[0]))[:, None]
    coin = torch.cat((torch.full((len(own[1]), 1), 1 - 1e-9), torch.full((len(toward[1]), 1), 1e-9))).double()
    probability = torch.cat(((1 - share) * own[1], share * toward[1]))
    assert abs(probability.sum() - 1) < 1e-12
    pi = problem.distribution(problem.logits_g.expand(len(uniform), -1))
    draws = Scripted({"mask": uniform, "explore": coin})
    return probability @ Disarm().estimate(pi, Curved(), problem.exploration(share), 2, draws).gamma_ug


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_the_expectation_is_the_gradient_of_the_expected_reward(share: float) -> None:
    truth_g = PROBLEM.gradient(Curved().value(PROBLEM.masks()))
    torch.testing.assert_close(expectation(PROBLEM, share), truth_g, rtol=1e-10, atol=1e-11)


def test_the_probability_of_a_pair_is_the_length_of_its_intervals() -> None:
    pairs = torch.tensor(list(itertools.product((False, True), repeat=2)))
    for g, logit in enumerate(ODDS_AND_ENDS[0].tolist()):
        one = ODDS_AND_ENDS[:, g : g + 1]
        ours = log_pair_probability(one, pairs[None, :, :1], pairs[None, :, 1:])[0].exp()
        law = pair_table(logit)
        torch.testing.assert_close(ours, torch.tensor([law[bool(a), bool(b)] for a, b in pairs], dtype=torch.float64))


def test_a_whole_pairs_log_probability_is_the_sum_of_its_gates() -> None:
    first, second = torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    gates = [
        log_pair_probability(ODDS_AND_ENDS[:, g : g + 1], first[..., g : g + 1], second[..., g : g + 1])
        for g in range(6)
    ]
    torch.testing.assert_close(log_pair_probability(ODDS_AND_ENDS, first, second), torch.stack(gates).sum(0))


def test_more_pairs_are_averaged() -> None:
    pi, exploration = PROBLEM.distribution(PROBLEM.logits_g.expand(9, -1)), PROBLEM.exploration(0.3)
    draws = Drawn(9, 5)
    together = Disarm().estimate(pi, Curved(), exploration, 6, draws)
    uniform, coin = draws.uniform("mask", (3, 6)), draws.uniform("explore", (3,))
    alone = [
        Disarm()
        .estimate(pi, Curved(), exploration, 2, Scripted({"mask": uniform[:, [p]], "explore": coin[:, [p]]}))
        .gamma_ug
        for p in range(3)
    ]
    torch.testing.assert_close(together.gamma_ug, torch.stack(alone).mean(0))


def test_impossible_pairs_and_far_logits_give_finite_estimates() -> None:
    pi = PROBLEM.distribution(1000 * PROBLEM.logits_g.expand(200, -1).float())
    estimate = Disarm().estimate(pi, Curved(), PROBLEM.exploration(0.5), 4, Drawn(200, 1))
    assert estimate.gamma_ug.isfinite().all()


def test_a_pair_that_only_rounding_can_draw_gives_a_finite_estimate() -> None:
    """u = p = 1/2: neither gate is on, which has no probability."""
    pi, half = PROBLEM.distribution(torch.zeros(1, 6)), torch.full((1, 1, 6), 0.5)
    draws = Scripted({"mask": half, "explore": half[:, :, 0]})
    assert Disarm().estimate(pi, Curved(), PROBLEM.exploration(0.0), 2, draws).gamma_ug.isfinite().all()


def test_an_odd_number_of_masks_is_refused() -> None:
    pi = PROBLEM.distribution(PROBLEM.logits_g[None])
    with pytest.raises(ConfigError, match=r"in pairs, got gate\.samples = 3"):
        Disarm().estimate(pi, Curved(), PROBLEM.exploration(0.0), 3, Drawn(1, 1))
