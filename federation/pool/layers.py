"""Adapted layers on PEFT's tuner machinery. A layer owns no parameters of a user: rows are bound for one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from federation.errors import PoolError
from federation.pool.kernel import gated_low_rank, plain_low_rank, stacked_low_rank
from federation.pool.prefix import prefix_of
from federation.second_order import is_twice_differentiable


@dataclass(frozen=True)
class UserRows:
    """Each user's own k rows: {module: (U, k, d_in + d_out)}. Zero rows are padding and do nothing."""

    users: int
    rows: Mapping[str, Tensor]


@dataclass(frozen=True)
class GatedPool:
    """The pool's rows {module: (R, d_in + d_out)}, shared, and how far each user switches each unit on: (U, R)."""

    users: int
    rows: Mapping[str, Tensor]
    gates: Mapping[str, Tensor]


Binding = UserRows | GatedPool

_BOUND: ContextVar[Binding | None] = ContextVar("fedquilt_binding", default=None)


@contextmanager
def binding(value: Binding) -> Iterator[None]:
    """Binds rows for the calls made inside. Per thread and task, so one user's training never meets another's."""
    token = _BOUND.set(value)
    try:
        yield
    finally:
        _BOUND.reset(token)


@dataclass
class TunerConfig(PeftConfig):  # type: ignore[misc]
    """What the tuner needs to know: the modules to adapt, as in PEFT, and the scale s."""

    target_modules: Any = None
    exclude_modules: Any = None
    scale: float = 1.0
    bias: str = field(default="none", init=False)


class PoolLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A frozen linear layer (`nn.Linear` or transformers' `Conv1D`) plus the units bound for this call.

    Its input's leading axis is users x examples, user by user; without a binding it is exactly the base layer.
    """

    adapter_layer_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, module_name: str, scale: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.module_name = module_name
        self.scale = scale
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.d_in, self.d_out = weight_of(base_layer).shape

    def _bias(self) -> Tensor | None:
        bias = self.base_layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        bound = _BOUND.get()
        if bound is None or self.disable_adapters:
            return torch.as_tensor(self.base_layer(x))
        if x.shape[0] % bound.users:
            raise PoolError(
                f"the leading axis must be users x examples, got {x.shape[0]} for {bound.users} users "
                f"(module {self.module_name!r}); give every user the same number of examples"
            )
        stacked = x.reshape(bound.users, -1, self.d_in)
        rows = bound.rows[self.module_name]
        if isinstance(bound, UserRows) and is_twice_differentiable():
            y = plain_low_rank(stacked, self._base(stacked), rows, self.scale)
        elif isinstance(bound, UserRows):
            y = stacked_low_rank(
                stacked, weight_of(self.base_layer), self._bias(), rows, self.scale, self._known(stacked)
            )
        else:
            base = self.base_layer(stacked)
            y = gated_low_rank(stacked, base, rows, bound.gates[self.module_name], self.scale)
        return torch.as_tensor(y).view(*x.shape[:-1], self.d_out)

    def _base(self, stacked: Tensor) -> Tensor:
        known = self._known(stacked)
        return torch.as_tensor(self.base_layer(stacked)) if known is None else known

    def _known(self, stacked: Tensor) -> Tensor | None:
        """The base's output, where the frozen prefix reaches up to this layer."""
        prefix = prefix_of(stacked)
        return None if prefix is None else prefix.recall(self.module_name, lambda: self.base_layer(stacked))


class PoolTuner(BaseTuner):  # type: ignore[misc]
    """Replaces the targeted linear layers of a model by `PoolLayer`s.

    Built directly (`PoolTuner(model, TunerConfig(...), "pool")`), since PEFT's registry takes no new adapter types.
    """

    prefix = "pool_"
    tuner_layer_cls = PoolLayer
    target_module_mapping: Mapping[str, list[str]] = {}

    def _create_and_replace(
        self,
        peft_config: TunerConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        _check_linear(target, current_key, peft_config)
        self._replace_module(parent, target_name, PoolLayer(target, current_key, peft_config.scale), target)


def target_layers(module: nn.Module, config: TunerConfig) -> dict[str, nn.Module]:
    """The linear layers that a tuner adapts in a module, or has adapted, by name. Raises PoolError for other layers."""
    found = {}
    for name, layer in module.named_modules():
        if name and check_target_module_exists(config, name):
            found[name] = layer.base_layer if isinstance(layer, PoolLayer) else layer
            _check_linear(found[name], name, config)
    return found


def weight_of(layer: nn.Module) -> Tensor:
    """A linear layer's weight as (d_in, d_out); a view."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(layer, Conv1D) else weight.t()


def _check_linear(layer: nn.Module, name: str, config: TunerConfig) -> None:
    if not isinstance(layer, nn.Linear | Conv1D):
        raise PoolError(
            f"only nn.Linear and Conv1D can be adapted, got {type(layer).__name__} at {name!r}; "
            f"narrow target_modules ({sorted(config.target_modules)})"
        )
