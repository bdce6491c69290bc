"""What a deployed server refuses to begin with."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from federation.base import BaseModel, frozen
from federation.config import load_config
from federation.errors import ConfigError, FedquiltError, PluginError
from server.begin import first_state


def base() -> BaseModel:
    """A layer that nothing is said of but its loss."""

    def loss(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        outputs: Tensor = module(inputs)
        return (outputs - targets).square().mean(1)

    def features(module: nn.Module, inputs: Tensor) -> Tensor:
        return inputs

    return BaseModel(frozen(nn.Sequential(nn.Linear(3, 2))), loss, features, 3, ("0",), "a layer")


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        (("gate.estimator.name=reinforced",), PluginError, "no estimator is called 'reinforced'; did you mean"),
        (("gate.reward.quality.name=los",), PluginError, "no quality is called 'los'; did you mean"),
        (("gate.reward.quality.name=accuracy",), ConfigError, "'accuracy' needs a base model .* 'a layer' does not"),
        (("gate.estimator.name=disarm",), ConfigError, "works for gate.distribution 'bernoulli', got 'budget'"),
        (("gate.samples=1",), ConfigError, "needs at least 2 masks per user, got gate.samples = 1"),
        (("pool.start=teacher",), ConfigError, "a deployed pool starts fresh"),
    ],
)
def test_a_task_that_no_device_could_do_is_refused(
    settings: tuple[str, ...], kind: type[FedquiltError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        first_state(load_config(overrides=settings), base())


def test_others_begin_with_what_they_name() -> None:
    rules, state = first_state(load_config(), base())
    assert set(state.values) == set(rules.schema.sections) == {"pool/0", "gate", "load"}
    assert all(rows.isfinite().all() for rows in state.values.values())


def test_a_policy_that_asks_for_no_rewards_needs_no_quality_that_fits() -> None:
    config = load_config(overrides=["gate.policy=random", "gate.reward.quality.name=accuracy", "gate.samples=1"])
    assert set(first_state(config, base())[1].values) == {"pool/0"}
