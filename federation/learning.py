"""What a gate learns by: what rewards measure, how their gradient is estimated, what units cost. Checked together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from federation.base import BaseModel
from federation.errors import ConfigError
from federation.estimators.protocol import Estimator
from federation.estimators.registry import estimator_of
from federation.gate_config import GateConfig, RewardConfig
from federation.pool.spec import PoolSpec
from federation.qualities import Accuracy, Quality, make_quality


@dataclass(frozen=True)
class Learning:
    """cost_g: (G,), of switching on each unit, with a mean of 1."""

    quality: Quality
    estimator: Estimator
    cost_g: Tensor


def learning_of(gate: GateConfig, base: BaseModel, spec: PoolSpec) -> Learning:
    """What the configuration names, before any work.

    Raises PluginError for a quality or an estimator that is unknown; ConfigError for those that do not fit each other,
    the masks or the base model, and for costs of other modules than the pool's.
    """
    quality = make_quality(gate.reward.quality)
    if gate.policy == "gate" and isinstance(quality, Accuracy) and base.accuracy is None:
        raise ConfigError(
            f"gate.reward.quality = 'accuracy' needs a base model that defines it, {base.name!r} does not; "
            "set it to 'loss', or to a quality of your own"
        )
    return Learning(quality, estimator_of(gate, quality.differentiable), unit_costs(spec, gate.reward))


def unit_costs(spec: PoolSpec, reward: RewardConfig) -> Tensor:
    """What switching on each unit costs, (G,), with a mean of 1. Raises ConfigError for costs of other modules."""
    if reward.cost == "units":
        cost_j = torch.ones(len(spec.modules))
    elif reward.cost == "parameters":
        cost_j = torch.tensor([float(m.width) for m in spec.modules])
    else:
        names = [m.name for m in spec.modules]
        if set(reward.cost) != set(names):
            raise ConfigError(f"gate.reward.cost names every module, got {sorted(reward.cost)}; the pool has {names}")
        cost_j = torch.tensor([reward.cost[name] for name in names])
    return (cost_j / cost_j.mean()).repeat_interleave(spec.rank)
