"""Estimators by name, and whether one can do what a configuration asks of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from federation.config import EstimatorConfig
from federation.errors import ConfigError
from federation.estimators.protocol import DistributionKind, Estimator
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


def make_estimator(config: EstimatorConfig, kind: DistributionKind) -> Estimator:
    """The configured estimator. Raises ConfigError if it does not work for this kind of distribution, or as
    `Plugins.make` does."""
    estimator = ESTIMATORS.make(config.name, **config.options)
    _check_kind(estimator, config.name, kind)
    return estimator


def check_estimator(
    estimator: Estimator, name: str, kind: DistributionKind, samples: int, quality_differentiable: bool
) -> None:
    """Raises ConfigError unless the estimator works for this kind of distribution, with so many masks per user and,
    if it asks for the reward's gradient, with a quality that has one."""
    _check_kind(estimator, name, kind)
    if samples < estimator.fewest or samples % estimator.multiple:
        multiple = f", in multiples of {estimator.multiple}" if estimator.multiple > 1 else ""
        raise ConfigError(
            f"the estimator {name!r} needs at least {estimator.fewest} masks per user{multiple}, got "
            f"gate.samples = {samples}; set another number"
        )
    if estimator.differentiable and not quality_differentiable:
        without = _ours(lambda other: kind in other.distributions and not other.differentiable)
        raise ConfigError(
            f"the estimator {name!r} needs a quality with a gradient, and this quality has none; "
            f"set gate.estimator.name to one that needs none: {without}"
        )


def _check_kind(estimator: Estimator, name: str, kind: DistributionKind) -> None:
    if kind not in estimator.distributions:
        raise ConfigError(
            f"the estimator {name!r} works for gate.distribution {' or '.join(map(repr, estimator.distributions))}, "
            f"got {kind!r}; for {kind!r} there are: {_ours(lambda other: kind in other.distributions)}"
        )


def _ours(fits: Callable[[type[Estimator]], bool]) -> str:
    """The names of our own estimators that fit: others' would have to be imported first."""
    factories = {name: cast(type[Estimator], ESTIMATORS.load(name)) for name in ESTIMATORS.builtin}
    return ", ".join(name for name, factory in factories.items() if fits(factory))
