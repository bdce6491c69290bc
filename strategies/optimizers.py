"""Server optimizers: how a round's step changes the values (Reddi et al., "Adaptive federated optimization",
ICLR 2021).

All are lazy per row and factor: an entry whose row had no contributor, or whose factor was frozen, keeps its
value, its moments and its step count to the bit. A zero direction is not a frozen parameter: ordinary Adam
would go on moving such a row. The state is flat, as the checkpoint saves it:
{"round": (), "<moment>/<section>": (rows, width), ...}.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from federation.errors import ConfigError
from federation.update import Values
from strategies.protocol import Step, Tensors


@dataclass(frozen=True)
class _Scheduled:
    """A learning rate: constant, or falling to 0 over `decay_rounds` rounds as half a cosine
    (Loshchilov and Hutter, ICLR 2017). The state counts the rounds, from 0."""

    learning_rate: float
    decay_rounds: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise ConfigError(f"learning_rate must be finite and at least 0, got {self.learning_rate}")
        if self.decay_rounds is not None and self.decay_rounds < 1:
            raise ConfigError(f"decay_rounds must be at least 1, got {self.decay_rounds}; without it nothing decays")

    def rate(self, round_index: int) -> float:
        """The learning rate of a round."""
        if self.decay_rounds is None:
            return self.learning_rate
        share = min(round_index / self.decay_rounds, 1.0)
        return self.learning_rate * (1.0 + math.cos(math.pi * share)) / 2.0


@dataclass(frozen=True)
class Sgd(_Scheduled):
    """value += rate * factor * mean."""

    def init(self, values: Values) -> Tensors:
        return {"round": _round_zero()}

    def step(self, values: Values, step: Step, state: Tensors) -> tuple[dict[str, Tensor], Tensors]:
        rate = self.rate(int(state["round"]))
        new_values = dict(values)
        for name, section in step.sections.items():
            moved = values[name] + rate * section.factor[:, None] * section.mean
            new_values[name] = torch.where(step.moved(name), moved, values[name])
        return new_values, {"round": state["round"] + 1}


@dataclass(frozen=True)
class Momentum(_Scheduled):
    """m = beta * m + factor * mean; value += rate * m (Polyak's heavy ball; FedAvgM, Hsu et al., 2019)."""

    beta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_decay("beta", self.beta)

    def init(self, values: Values) -> Tensors:
        return {"round": _round_zero(), **_zeros("momentum", values)}

    def step(self, values: Values, step: Step, state: Tensors) -> tuple[dict[str, Tensor], Tensors]:
        rate = self.rate(int(state["round"]))
        new_values, new_state = dict(values), {**state, "round": state["round"] + 1}
        for name, section in step.sections.items():
            key, moved = f"momentum/{name}", step.moved(name)
            momentum = self.beta * state[key] + section.factor[:, None] * section.mean
            new_state[key] = torch.where(moved, momentum, state[key])
            new_values[name] = torch.where(moved, values[name] + rate * momentum, values[name])
        return new_values, new_state


@dataclass(frozen=True)
class Adam(_Scheduled):
    """value += rate * factor * m^ / (sqrt(v^) + epsilon) (Kingma and Ba, ICLR 2015).

    m^ and v^ are corrected for the bias of their own entry's step count; counts are (rows, width) int32, so
    that the optimizer need not know which columns make up a factor. The row's factor multiplies the output,
    since Adam would divide a constant scale of its input out again.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_decay("beta1", self.beta1)
        _check_decay("beta2", self.beta2)
        if not self.epsilon > 0:
            raise ConfigError(f"epsilon must be positive, got {self.epsilon}; 1e-8 is usual")

    def init(self, values: Values) -> Tensors:
        counts = {f"count/{name}": torch.zeros_like(value, dtype=torch.int32) for name, value in values.items()}
        return {"round": _round_zero(), **_zeros("first", values), **_zeros("second", values), **counts}

    def step(self, values: Values, step: Step, state: Tensors) -> tuple[dict[str, Tensor], Tensors]:
        rate = self.rate(int(state["round"]))
        new_values, new_state = dict(values), {**state, "round": state["round"] + 1}
        for name, section in step.sections.items():
            moved = step.moved(name)
            first = self.beta1 * state[f"first/{name}"] + (1.0 - self.beta1) * section.mean
            second = self.beta2 * state[f"second/{name}"] + (1.0 - self.beta2) * section.mean.square()
            count = state[f"count/{name}"] + 1
            direction = first / _debt(self.beta1, count)
            scale = (second / _debt(self.beta2, count)).sqrt() + self.epsilon
            value = values[name] + rate * section.factor[:, None] * direction / scale
            new_values[name] = torch.where(moved, value, values[name])
            for moment, tensor in (("first", first), ("second", second), ("count", count)):
                key = f"{moment}/{name}"
                new_state[key] = torch.where(moved, tensor, state[key])
        return new_values, new_state


def _round_zero() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


def _zeros(moment: str, values: Values) -> dict[str, Tensor]:
    return {f"{moment}/{name}": torch.zeros_like(value) for name, value in values.items()}


def _debt(beta: float, count: Tensor) -> Tensor:
    """1 - beta^count, the share of a moment that real steps make up.

    In float64, since 1 - 0.999 cancels; looked up, since there are far fewer different counts than entries.
    """
    table = 1.0 - beta ** torch.arange(int(count.max()) + 1, dtype=torch.float64)
    return table.float()[count]


def _check_decay(name: str, beta: float) -> None:
    if not 0.0 <= beta < 1.0:
        raise ConfigError(f"{name} must lie in [0, 1), got {beta}; 0.9 is usual")
