"""U, the update rule: how the rows of U users take a step, with parameters that a federation meta-learns.

| rule    | step of the rows of unit g                                                          |
|---------|-------------------------------------------------------------------------------------|
| sgd     | - rate * gradient                                                                   |
| rates   | - rate_gs * v - decay_g * (rows - start), with v = momentum * v + gradient           |
| learned | the same, where v is scaled to a root mean square of 1 and an MLP adds to it         |

rate_gs, of a unit's factor (down or up) in step s, is within a factor `bound` of the rate it begins at; decay and
momentum lie in (0, 1). So no parameters, however far they are moved, make a step much larger. Sources: Meta-SGD (Li et
al., 2017) for rates per unit; LSLR (Antoniou et al., ICLR 2019) for those per step; Andrychowicz et al. (NeurIPS 2016)
for the learned rule, which as there takes its inputs as constants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from federation.meta_config import RuleConfig
from federation.pool.spec import ModuleSpec, Rows


@dataclass(frozen=True)
class Parameters:
    """A rule's parameters as U users have them: of their active units (U, J, k, W), and of all (U, P)."""

    units: Tensor
    shared: Tensor


@dataclass(frozen=True)
class Stepped:
    """Rows after some steps, and what a rule remembers of the steps: tensors of the rows' shape."""

    rows: Rows
    memory: Rows


class Rule(Protocol):
    """unit_width: W, parameters of each unit. shared_width: P, those of all together."""

    @property
    def unit_width(self) -> int: ...

    @property
    def shared_width(self) -> int: ...

    def first(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Where the parameters begin: of any unit (W,), and shared (P,)."""
        ...

    def begin(self, start: Rows) -> Stepped:
        """Before the first step."""
        ...

    def step(self, parameters: Parameters, start: Rows, now: Stepped, gradients: Sequence[Tensor], at: int) -> Stepped:
        """One step on, by the gradients in the order of the rows. at: steps taken so far."""
        ...


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent: nothing to learn."""

    learning_rate: float

    unit_width = 0
    shared_width = 0

    def first(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.zeros(0), torch.zeros(0)

    def begin(self, start: Rows) -> Stepped:
        return Stepped(start, {})

    def step(self, parameters: Parameters, start: Rows, now: Stepped, gradients: Sequence[Tensor], at: int) -> Stepped:
        rows = {name: row - self.learning_rate * g for (name, row), g in zip(now.rows.items(), gradients, strict=True)}
        return Stepped(rows, {})


@dataclass(frozen=True)
class Rates:
    """Rates per unit, factor and step, with decay towards the start and momentum.

    Of a unit: log rates of down and up, relative to `learning_rate`, and the logit of its decay. Shared: a log rate of
    each of `steps` steps (later ones are as the last), and the logit of the momentum.
    """

    modules: Sequence[ModuleSpec]
    learning_rate: float
    steps: int
    bound: float

    unit_width = 3

    @property
    def shared_width(self) -> int:
        return self.steps + 1

    def first(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Nearly plain gradient descent: a decay of 0.7% and a momentum of 5%, so that both have a gradient."""
        return torch.tensor([0.0, 0.0, -5.0]), torch.tensor([*[0.0] * self.steps, -3.0])

    def begin(self, start: Rows) -> Stepped:
        return Stepped(start, {name: torch.zeros_like(row) for name, row in start.items()})

    def step(self, parameters: Parameters, start: Rows, now: Stepped, gradients: Sequence[Tensor], at: int) -> Stepped:
        momentum = parameters.shared[:, self.steps].sigmoid()[:, None, None]
        velocity = {
            name: momentum * now.memory[name] + gradient for name, gradient in zip(now.rows, gradients, strict=True)
        }
        return Stepped(self._moved(parameters, start, now.rows, velocity, at), velocity)

    def _moved(self, parameters: Parameters, start: Rows, rows: Rows, direction: Rows, at: int) -> dict[str, Tensor]:
        """The rows after -rate * direction, drawn towards the start."""
        moved = {}
        for j, module in enumerate(self.modules):
            name = module.section
            units_ukw = parameters.units[:, j]
            decay = units_ukw[..., 2:].sigmoid()
            rate = self._rate(module, units_ukw[..., :2], parameters.shared[:, min(at, self.steps - 1)])
            moved[name] = rows[name] - rate * direction[name] - decay * (rows[name] - start[name])
        return moved

    def _rate(self, module: ModuleSpec, log_uk2: Tensor, log_u: Tensor) -> Tensor:
        """(U, k, d_in + d_out)."""
        most = math.log(self.bound)
        rate_uk2 = self.learning_rate * (most * ((log_uk2 + log_u[:, None, None]) / most).tanh()).exp()
        down, up = rate_uk2[..., :1], rate_uk2[..., 1:]
        return torch.cat((down.expand(-1, -1, module.d_in), up.expand(-1, -1, module.d_out)), 2)


_INPUTS = 5
_STILL = 2e-12
_ADDED = 2.0
"""Most that the MLP adds to an entry whose root mean square is 1."""


@dataclass(frozen=True)
class Learned(Rates):
    """`Rates` along a direction that an MLP corrects, entry by entry.

    The MLP's inputs, all taken as constants: the gradient and the velocity, each over its root mean square in the
    unit's factor; that size of the gradient, as a logarithm; how far the entry is from its start, over the start's root
    mean square; and the share of the steps that were taken. `shared` ends in its weights.
    """

    hidden: int = 8

    @property
    def shared_width(self) -> int:
        return self.steps + 1 + (_INPUTS + 2) * self.hidden + 1

    def first(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Nearly descent along the scaled gradient: the MLP's last layer is zero."""
        unit, shared = super().first(generator)
        inner = torch.randn(_INPUTS * self.hidden, generator=generator) / math.sqrt(_INPUTS)
        return unit, torch.cat((shared, inner, torch.zeros(2 * self.hidden + 1)))

    def step(self, parameters: Parameters, start: Rows, now: Stepped, gradients: Sequence[Tensor], at: int) -> Stepped:
        momentum = parameters.shared[:, self.steps].sigmoid()[:, None, None]
        velocity, direction = {}, {}
        for module, gradient in zip(self.modules, gradients, strict=True):
            name, constant = module.section, gradient.detach()
            velocity[name] = momentum * now.memory[name] + constant
            scaled, size = _scaled(constant, module)
            along, speed = _scaled(velocity[name], module)
            away = _away(now.rows[name].detach(), start[name].detach(), module)
            taken = torch.full_like(scaled, min(at / self.steps, 2.0))
            inputs = torch.stack((scaled, along.detach(), size.clamp_min(1e-12).log() / 10.0, away, taken), -1)
            moves = speed > _STILL  # else padding, or a factor that is not trained
            direction[name] = along + moves * self._corrections(parameters.shared, inputs)
        return Stepped(self._moved(parameters, start, now.rows, direction, at), velocity)

    def _corrections(self, shared_up: Tensor, inputs: Tensor) -> Tensor:
        """What the MLP adds: (U, P), (U, k, w, 5) -> (U, k, w)."""
        users, h = len(shared_up), self.hidden
        inner, bias, outer, last = torch.split(shared_up[:, self.steps + 1 :], [_INPUTS * h, h, h, 1], 1)
        flat = inputs.flatten(1, 2)
        hidden = torch.baddbmm(bias[:, None], flat, inner.view(users, _INPUTS, h)).tanh()
        out = torch.baddbmm(last[:, None], hidden, outer[..., None])
        return _ADDED * out.tanh().view(inputs.shape[:3])


def rule_of(config: RuleConfig, modules: Sequence[ModuleSpec], learning_rate: float, steps: int) -> Rule:
    """The rule that a configuration names, which begins at a rate and knows of so many different steps."""
    if config.name == "sgd":
        return Sgd(learning_rate)
    if config.name == "rates":
        return Rates(modules, learning_rate, steps, config.bound)
    return Learned(modules, learning_rate, steps, config.bound, config.hidden)


def _by_factor(row: Tensor, module: ModuleSpec) -> Sequence[Tensor]:
    return torch.split(row, [module.d_in, module.d_out], 2)


def _scaled(row: Tensor, module: ModuleSpec) -> tuple[Tensor, Tensor]:
    """Each unit's factors over their root mean square, and that: (U, k, w) twice. A zero factor stays zero."""
    sizes = [part.square().mean(2, keepdim=True).clamp_min(1e-24).sqrt() for part in _by_factor(row, module)]
    size = torch.cat([s.expand_as(part) for s, part in zip(sizes, _by_factor(row, module))], 2)
    return row / size, size


def _away(row: Tensor, start: Tensor, module: ModuleSpec) -> Tensor:
    """How far entries are from their start, in units of the start's size, within +-10."""
    _, size = _scaled(start, module)
    return ((row - start) / size.clamp_min(1e-3)).clamp(-10.0, 10.0)
