"""Strategies and server optimizers by name."""

from __future__ import annotations

from typing import Any

from federation.plugins import Plugins
from strategies.protocol import Optimizer, Strategy

STRATEGIES: Plugins[Strategy[Any]] = Plugins(
    kind="strategy",
    group="fedquilt.strategies",
    contract=Strategy,
    builtin={"fedavg": "strategies.means:FedAvg", "masked_mean": "strategies.means:MaskedMean"},
)

OPTIMIZERS: Plugins[Optimizer] = Plugins(
    kind="optimizer",
    group="fedquilt.optimizers",
    contract=Optimizer,
    builtin={
        "sgd": "strategies.optimizers:Sgd",
        "momentum": "strategies.optimizers:Momentum",
        "adam": "strategies.optimizers:Adam",
    },
)


def make_strategy(name: str, /, **options: Any) -> Strategy[Any]:
    """The strategy called `name`, for example `make_strategy("masked_mean", kappa=2.0)`."""
    return STRATEGIES.make(name, **options)


def make_optimizer(name: str, /, **options: Any) -> Optimizer:
    """The optimizer called `name`, for example `make_optimizer("adam", learning_rate=5e-3)`."""
    return OPTIMIZERS.make(name, **options)
