"""What a configuration may ask of an estimator and what it is told otherwise; and what an estimate must be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from federation.errors import ConfigError, PluginError
from federation.estimators.pathwise import HardConcrete
from federation.estimators.ppo import Ppo
from federation.estimators.protocol import Estimate, Estimator
from federation.estimators.registry import ESTIMATORS, checked, estimator_of
from federation.gate_config import GateConfig
from federation.settings import parse
from tests.federation.estimators.problems import PROBLEMS, Problem


def of(name: str, kind: str = "budget", quality_differentiable: bool = True, **gate: Any) -> Estimator:
    settings = {"estimator": {"name": name}, "distribution": kind, **gate}
    return estimator_of(parse(GateConfig, settings), quality_differentiable)


def test_options_reach_the_estimator() -> None:
    assert of("ppo", estimator={"name": "ppo", "options": {"epochs": 2, "clip": 0.1}}) == Ppo(epochs=2, clip=0.1)


@pytest.mark.parametrize("name", ["disarm", "hard_concrete"])
def test_one_for_independent_units_is_refused_for_a_budget(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*'bernoulli', got 'budget'.*reinforce, reinforce_gain") as caught:
        of(name)
    assert "disarm," not in str(caught.value).split("there are")[1]
    assert of(name, "bernoulli")


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(PluginError, match="did you mean 'reinforce'"):
        of("reinforced")


@pytest.mark.parametrize(
    ("name", "samples", "told"),
    [("reinforce", 1, "at least 2 masks per user, got gate.samples = 1"), ("disarm", 3, "in multiples of 2, got")],
)
def test_a_number_of_masks_that_it_cannot_use_is_refused(name: str, samples: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        of(name, "bernoulli", samples=samples)
    assert of(name, "bernoulli", samples=samples + 1)


def test_one_that_needs_a_gradient_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match=r"needs a quality with a gradient.*: reinforce, self_critical, ppo$"):
        of("muprop", quality_differentiable=False)
    assert of("reinforce", quality_differentiable=False)


@pytest.mark.parametrize(("name", "kind"), [("straight_through", "budget"), ("hard_concrete", "bernoulli")])
def test_one_that_tries_no_masks_is_refused_for_rewards_after_steps(name: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}.*tries no masks.*reward\.steps = 2; .*masks: reinforce, .*ppo$"):
        of(name, kind, reward={"steps": 2})
    assert of(name, kind)
    assert of("reinforce_gain", kind, reward={"steps": 2})


def test_where_the_gate_does_not_choose_any_that_is_there_will_do() -> None:
    assert of("disarm", policy="saliency", samples=1, reward={"steps": 2}, quality_differentiable=False)
    with pytest.raises(PluginError, match="did you mean 'disarm'"):
        of("disram", policy="saliency")


@pytest.mark.parametrize("option", [{"epochs": 0}, {"rate": 0.0}, {"clip": 0.0}, {"kl": -0.1}, {"rate": float("nan")}])
def test_ppo_refuses_options_out_of_range(option: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="ppo needs epochs >= 1"):
        ESTIMATORS.make("ppo", **option)


@pytest.mark.parametrize("option", [{"temperature": 0.0}, {"stretch": -0.1}])
def test_hard_concrete_refuses_options_out_of_range(option: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="hard_concrete needs temperature > 0"):
        HardConcrete(**option)


# -------------------------------------------------------------------------------- answers


def sound(problem: Problem, users: int = 3, samples: int = 2) -> Estimate:
    mask_ug = problem.masks()[:1].expand(users, -1)
    return Estimate(torch.zeros(users, problem.units).double(), mask_ug, torch.zeros(users, samples).double())


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
def test_an_estimate_as_agreed_is_given_back(problem: Problem) -> None:
    pi, estimate = problem.distribution(problem.logits_g.expand(3, -1)), sound(problem)
    assert checked(estimate, pi, 2, "mine") is estimate
    coarse = replace(estimate, reward_uk=estimate.reward_uk.bfloat16())
    assert checked(coarse, pi, 2, "mine") is coarse


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"gamma_ug": torch.zeros(8).double()},
            r"'mine' must give gamma_ug as \(3, 8\) of torch\.float64, got \(8,\)",
        ),
        ({"gamma_ug": torch.zeros(3, 8)}, r"gamma_ug as .*float64, got \(3, 8\) of torch\.float32; repair it, or set"),
        ({"mask_ug": torch.zeros(3, 1, 8).bool()}, r"mask_ug as \(3, 8\) of torch\.bool, got \(3, 1, 8\)"),
        ({"mask_ug": torch.ones(3, 8).double()}, r"mask_ug as .*got \(3, 8\) of torch\.float64"),
        ({"reward_uk": torch.zeros(3, 3).double()}, r"reward_uk as \(3, 2\) of .*, got \(3, 3\)"),
        ({"reward_uk": torch.zeros(3, 2).long()}, r"reward_uk as .*got \(3, 2\) of torch\.int64"),
        (
            {"mask_ug": torch.ones(3, 8).bool()},
            r"'mine' must give a mask that the policy can draw: .* 2 units .*4",
        ),
    ],
)
def test_an_estimate_that_is_none_is_refused(changes: dict[str, torch.Tensor], told: str) -> None:
    problem = PROBLEMS["2 of 4, twice"]
    pi = problem.distribution(problem.logits_g.expand(3, -1))
    with pytest.raises(PluginError, match=told):
        checked(replace(sound(problem), **changes), pi, 2, "mine")
