"""What a user's reward measures, on examples that the masks were not adapted to: plugins of `fedquilt.qualities`.

A quality need not be differentiable. An estimator that asks for its gradient takes one that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from federation.base import BaseModel
from federation.config import QualityConfig
from federation.plugins import Plugins


class Quality(Protocol):
    """Higher is better. differentiable: whether autograd may go through `measure`."""

    differentiable: bool

    def measure(self, base: BaseModel, inputs: Tensor, targets: Tensor) -> Tensor:
        """The quality of each example under the base model with what is bound to it: (B, ..), (B, ..) -> (B,)."""
        ...


@dataclass(frozen=True)
class NegativeLoss:
    """Minus the base's loss, in nats per target."""

    differentiable = True

    def measure(self, base: BaseModel, inputs: Tensor, targets: Tensor) -> Tensor:
        return -base.loss(base.module, inputs, targets)


@dataclass(frozen=True)
class Accuracy:
    """The share of an example's targets that are right, of a base that can say (`BaseModel.accuracy`)."""

    differentiable = False

    def measure(self, base: BaseModel, inputs: Tensor, targets: Tensor) -> Tensor:
        assert base.accuracy is not None, f"{base.name!r} has no accuracy"
        return base.accuracy(base.module, inputs, targets)


QUALITIES: Plugins[Quality] = Plugins(
    kind="quality",
    group="fedquilt.qualities",
    contract=Quality,
    builtin={"loss": "federation.qualities:NegativeLoss", "accuracy": "federation.qualities:Accuracy"},
)


def make_quality(config: QualityConfig) -> Quality:
    """The quality that a configuration names, with its options."""
    return QUALITIES.make(config.name, **config.options)
