"""Estimators by name, whether one can do what a configuration asks of it, and whether its answer is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from federation.errors import ConfigError, MaskError, PluginError
from federation.estimators.protocol import Estimate, Estimator
from federation.gate_config import GateConfig
from federation.mask_distribution import MaskDistribution
from federation.plugins import Plugins

ESTIMATORS: Plugins[Estimator] = Plugins(
    kind="estimator",
    group="fedquilt.estimators",
    contract=Estimator,
    builtin={
        "reinforce": "federation.estimators.score:Reinforce",
        "reinforce_gain": "federation.estimators.score:ReinforceGain",
        "self_critical": "federation.estimators.score:SelfCritical",
        "muprop": "federation.estimators.score:MuProp",
        "disarm": "federation.estimators.antithetic:Disarm",
        "ppo": "federation.estimators.ppo:Ppo",
        "straight_through": "federation.estimators.pathwise:StraightThrough",
        "hard_concrete": "federation.estimators.pathwise:HardConcrete",
    },
)


def estimator_of(gate: GateConfig, quality_differentiable: bool) -> Estimator:
    """The configured estimator. Raises PluginError and ConfigError as `Plugins.make` does; and, where the policy is the
    gate, ConfigError unless it can do what the configuration asks of it, with a quality that has a gradient or none."""
    name, kind, steps = gate.estimator.name, gate.distribution, gate.reward.steps
    estimator = ESTIMATORS.make(name, **gate.estimator.options)
    if gate.policy != "gate":
        return estimator
    if kind not in estimator.distributions:
        raise ConfigError(
            f"the estimator {name!r} works for gate.distribution {' or '.join(map(repr, estimator.distributions))}, "
            f"got {kind!r}; for {kind!r} there are: {_ours(lambda other: kind in other.distributions)}"
        )
    if gate.samples < estimator.fewest or gate.samples % estimator.multiple:
        multiple = f", in multiples of {estimator.multiple}" if estimator.multiple > 1 else ""
        raise ConfigError(
            f"the estimator {name!r} needs at least {estimator.fewest} masks per user{multiple}, got "
            f"gate.samples = {gate.samples}; set another number"
        )
    if estimator.differentiable and not quality_differentiable:
        without = _ours(lambda other: kind in other.distributions and not other.differentiable)
        raise ConfigError(
            f"the estimator {name!r} needs a quality with a gradient, and this quality has none; "
            f"set gate.estimator.name to one that needs none: {without}"
        )
    if steps and not estimator.tries_masks:
        trying = _ours(lambda other: kind in other.distributions and other.tries_masks)
        raise ConfigError(
            f"the estimator {name!r} tries no masks, its gradient is of the reward before any step, got "
            f"gate.reward.steps = {steps}; set 0, or gate.estimator.name to one that tries masks: {trying}"
        )
    return estimator


def checked(estimate: Estimate, distribution: MaskDistribution, samples: int, name: str) -> Estimate:
    """The same estimate, of the estimator of this name. Raises PluginError unless its shapes and kinds of numbers are
    the contract's, and its mask one that the distribution can give."""
    logits_ug = distribution.logits_ug
    users, units = logits_ug.shape
    numbers = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # a reward is as precise as its model
    _check_tensor(name, "gamma_ug", estimate.gamma_ug, (users, units), (logits_ug.dtype,))
    _check_tensor(name, "mask_ug", estimate.mask_ug, (users, units), (torch.bool,))
    _check_tensor(name, "reward_uk", estimate.reward_uk, (users, samples), numbers)
    try:
        distribution.check_masks(estimate.mask_ug[:, None])
    except MaskError as error:
        raise PluginError(f"the estimator {name!r} must give a mask that the policy can draw: {error}") from error
    return estimate


def _check_tensor(
    name: str, field: str, found: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if tuple(found.shape) != shape or found.dtype not in dtypes:
        raise PluginError(
            f"the estimator {name!r} must give {field} as {shape} of {' or '.join(map(str, dtypes))}, got "
            f"{tuple(found.shape)} of {found.dtype}; repair it, or set gate.estimator.name to another"
        )


def _ours(fits: Callable[[type[Estimator]], bool]) -> str:
    """The names of our own estimators that fit: others' would have to be imported first."""
    factories = {name: cast(type[Estimator], ESTIMATORS.load(name)) for name in ESTIMATORS.builtin}
    return ", ".join(name for name, factory in factories.items() if fits(factory))
