"""What a configuration may ask of an estimator, and what it is told otherwise."""

from __future__ import annotations

import pytest

from federation.config import EstimatorConfig
from federation.errors import ConfigError, PluginError
from federation.estimators.pathwise import HardConcrete
from federation.estimators.ppo import Ppo
from federation.estimators.registry import ESTIMATORS, check_estimator, make_estimator


def test_options_reach_the_estimator() -> None:
    made = make_estimator(EstimatorConfig(name="ppo", options={"epochs": 2, "clip": 0.1}), "budget")
    assert made == Ppo(epochs=2, clip=0.1)


@pytest.mark.parametrize("name", ["disarm", "hard_concrete"])
def test_one_for_independent_units_is_refused_for_a_budget(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*'bernoulli', got 'budget'.*reinforce, reinforce_gain") as caught:
        make_estimator(EstimatorConfig(name=name), "budget")
    assert "disarm," not in str(caught.value).split("there are")[1]
    assert make_estimator(EstimatorConfig(name=name), "bernoulli")


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(PluginError, match="did you mean 'reinforce'"):
        make_estimator(EstimatorConfig(name="reinforced"), "budget")


@pytest.mark.parametrize(
    ("name", "samples", "told"),
    [("reinforce", 1, "at least 2 masks per user, got gate.samples = 1"), ("disarm", 3, "in multiples of 2, got")],
)
def test_a_number_of_masks_that_it_cannot_use_is_refused(name: str, samples: int, told: str) -> None:
    estimator = ESTIMATORS.make(name)
    with pytest.raises(ConfigError, match=told):
        check_estimator(estimator, name, "bernoulli", samples, True)
    check_estimator(estimator, name, "bernoulli", samples + 1, True)


def test_one_that_needs_a_gradient_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match=r"needs a quality with a gradient.*: reinforce, self_critical, ppo$"):
        check_estimator(ESTIMATORS.make("muprop"), "muprop", "budget", 4, False)
    check_estimator(ESTIMATORS.make("reinforce"), "reinforce", "budget", 4, False)


@pytest.mark.parametrize("option", [{"epochs": 0}, {"rate": 0.0}, {"clip": 0.0}, {"kl": -0.1}, {"rate": float("nan")}])
def test_ppo_refuses_options_out_of_range(option: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="ppo needs epochs >= 1"):
        ESTIMATORS.make("ppo", **option)


@pytest.mark.parametrize("option", [{"temperature": 0.0}, {"stretch": -0.1}])
def test_hard_concrete_refuses_options_out_of_range(option: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="hard_concrete needs temperature > 0"):
        HardConcrete(**option)
