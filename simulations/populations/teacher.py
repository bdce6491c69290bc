"""Teachers: a base network, rows of a pool, and the outputs that a mask over these rows gives.

`Chain` is a network of layers one after the other: units act through each other, and the truth is measured.
`Parallel` has layers side by side, each with its own outputs and one direction of the inputs that all of its units
read. So a user's expected loss is a quadratic form in its mask, known exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from federation.base import frozen
from federation.pool.spec import ModuleSpec, PoolSpec
from federation.streams import Streams

MEASURED = 256
"""Inputs on which a chain's expected loss is measured."""

_USERS = 32
"""Users measured in one computation."""


class Perceptron(nn.Module):
    """Linear layers fc1, fc2, .., with ReLU between them: (.., widths[0]) -> (.., widths[-1])."""

    def __init__(self, widths: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.depth = len(widths) - 1
        for layer, (d_in, d_out) in enumerate(pairwise(widths), start=1):
            self.add_module(f"fc{layer}", _linear(d_in, d_out, generator))

    def hidden(self, inputs: Tensor) -> Tensor:
        """What enters the last layer: (.., widths[-2])."""
        for layer in range(1, self.depth):
            inputs = torch.relu(self.get_submodule(f"fc{layer}")(inputs))
        return inputs

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.get_submodule(f"fc{self.depth}")(self.hidden(inputs))
        return outputs


class SideBySide(nn.Module):
    """Linear layers fc1, fc2, .. of the same inputs, outputs joined: (.., widths[0]) -> (.., sum(widths[1:]))."""

    def __init__(self, widths: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.layers = len(widths) - 1
        for layer, d_out in enumerate(widths[1:], start=1):
            self.add_module(f"fc{layer}", _linear(widths[0], d_out, generator))

    def hidden(self, inputs: Tensor) -> Tensor:
        """What enters the layers: the inputs."""
        return inputs

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([self.get_submodule(f"fc{layer}")(inputs) for layer in range(1, self.layers + 1)], -1)


def squared_loss(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Half the mean squared error over outputs, (B,): nats under a unit Gaussian, up to a constant."""
    return 0.5 * F.mse_loss(module(inputs), targets, reduction="none").mean(1)


def log_loss(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """log(1 + squared_loss), (B,): an example that is far off counts little more than one that is off."""
    return squared_loss(module, inputs, targets).log1p()


def hit_rate(hit: float) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """A quality without a gradient: 1 where the mean squared error over outputs is at most `hit`, else 0, (B,)."""

    def hits(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return (2.0 * squared_loss(module, inputs, targets) <= hit).float()

    return hits


def hidden_features(module: nn.Module, inputs: Tensor) -> Tensor:
    """What enters the last layer: (B, width)."""
    features: Tensor = module.hidden(inputs)  # type: ignore[operator]
    return features


@dataclass(frozen=True)
class Chain:
    """Layers one after the other. budget: units per module whose rows together weigh as much as the layer itself."""

    widths: tuple[int, ...]
    rank: int
    budget: int
    data: Streams

    @property
    def name(self) -> str:
        return f"perceptron-{'-'.join(map(str, self.widths))}"

    @property
    def feature_width(self) -> int:
        return self.widths[-2]

    @property
    def outputs(self) -> int:
        return self.widths[-1]

    def spec(self) -> PoolSpec:
        widths = pairwise(self.widths)
        modules = tuple(ModuleSpec(f"fc{j}", d_in, d_out) for j, (d_in, d_out) in enumerate(widths, start=1))
        return PoolSpec(modules, self.rank, scale=1.0)

    def network(self) -> nn.Module:
        """A new copy of the frozen base."""
        return frozen(Perceptron(self.widths, self.data.generator("base")))

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """(R, d_in + d_out) by section."""
        generator = self.data.generator("teacher")
        rows = {}
        for m in self.spec().modules:
            down = torch.randn(self.rank, m.d_in, generator=generator) * m.d_in**-0.5
            up = torch.randn(self.rank, m.d_out, generator=generator) * self.budget**-0.5
            rows[m.section] = torch.cat((down, up), 1)
        return rows

    def teach(self, inputs: Tensor, mask_ug: Tensor) -> Tensor:
        """The base with each user's rows: (U, N, widths[0]), (U, G) -> (U, N, outputs)."""
        shape = (*inputs.shape[:2], -1)
        mask_u1jr = mask_ug.view(len(mask_ug), 1, -1, self.rank).float()
        outputs = inputs.flatten(0, 1)
        for j, m in enumerate(self.spec().modules):
            hidden = outputs.relu_() if j else outputs
            down, up = self.rows[m.section].tensor_split([m.d_in], 1)
            # All R units in one product for all users, then masked: faster than gathering k units per user. Adding
            # in place takes 0.6 of the time of a sum of two products.
            low = (hidden @ down.t()).view(*shape).mul_(mask_u1jr[:, :, j]).flatten(0, 1)
            outputs = self._network.get_submodule(m.name)(hidden).addmm_(low, up)
        return outputs.view(*shape)

    def excess(self, bank: Tensor, mean_ud: Tensor, mask_ug: Tensor, best_ug: Tensor) -> Tensor:
        """Expected loss above that of the best mask, (U,), measured without noise on the bank's first inputs.

        Shapes: bank (B, widths[0]), mean_ud (U, widths[0]), masks (U, G).
        """
        losses = []
        for mean, mask, best in zip(*(torch.split(x, _USERS) for x in (mean_ud, mask_ug, best_ug)), strict=True):
            inputs = bank[:MEASURED] + mean[:, None]
            difference = self.teach(inputs, mask) - self.teach(inputs, best)
            losses.append(0.5 * difference.square().mean((1, 2)))
        return torch.cat(losses)

    @cached_property
    def _network(self) -> nn.Module:
        return self.network()


@dataclass(frozen=True)
class Parallel:
    """Layers side by side: widths[0] inputs, and widths[1:] outputs of each layer.

    ups: what the units of each module write, (R, d_out) by module, for an input of strength 1.
    With h_j the input along module j's direction and D the outputs of all modules, the expected loss of mask m above
    the best one b is 1/(2D) sum_j E[h_j^2] |(m_j - b_j) ups_j|^2.
    """

    widths: tuple[int, ...]
    ups: tuple[Tensor, ...]
    data: Streams

    @property
    def name(self) -> str:
        return f"parallel-{'-'.join(map(str, self.widths))}"

    @property
    def feature_width(self) -> int:
        return self.widths[0]

    @property
    def outputs(self) -> int:
        return sum(self.widths[1:])

    def spec(self) -> PoolSpec:
        modules = (ModuleSpec(f"fc{j}", self.widths[0], d_out) for j, d_out in enumerate(self.widths[1:], start=1))
        return PoolSpec(tuple(modules), len(self.ups[0]), scale=1.0)

    def network(self) -> nn.Module:
        """A new copy of the frozen base."""
        return frozen(SideBySide(self.widths, self.data.generator("base")))

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """(R, d_in + d_out) by section."""
        pairs = zip(self.spec().modules, self._direction_jd, self.ups, strict=True)
        return {m.section: torch.cat((direction.expand(len(up), -1), up), 1) for m, direction, up in pairs}

    def teach(self, inputs: Tensor, mask_ug: Tensor) -> Tensor:
        """The base with each user's rows: (U, N, widths[0]), (U, G) -> (U, N, outputs)."""
        strength_unj = self.strengths(inputs)
        effects = zip(strength_unj.unbind(2), self._effects(mask_ug.float()), strict=True)
        shift = torch.cat([strength[..., None] * effect[:, None] for strength, effect in effects], 2)
        return shift.add_(self._network(inputs))

    def excess(self, bank: Tensor, mean_ud: Tensor, mask_ug: Tensor, best_ug: Tensor) -> Tensor:
        """Expected loss above that of the best mask, (U,): the quadratic form, exact for inputs from the bank.

        Shapes: bank (B, widths[0]), mean_ud (U, widths[0]), masks (U, G).
        """
        strength_bj, shift_uj = bank @ self._direction_jd.t(), mean_ud @ self._direction_jd.t()
        power_uj = strength_bj.var(0, correction=0) + (strength_bj.mean(0) + shift_uj).square()
        effects = self._effects(mask_ug.float() - best_ug.float())
        error_uj = torch.stack([effect.square().sum(1) for effect in effects], 1)
        return (power_uj * error_uj).sum(1) / (2 * self.outputs)

    def strengths(self, inputs: Tensor) -> Tensor:
        """The inputs along each module's direction: (U, N, widths[0]) -> (U, N, J)."""
        return inputs @ self._direction_jd.t()

    def untaught(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """What targets have beyond the base network's outputs: (U, N, outputs)."""
        outputs: Tensor = self._network(inputs)
        return targets - outputs

    def _effects(self, mask_ug: Tensor) -> list[Tensor]:
        """What each user's units write together: (U, d_out) by module."""
        masks = mask_ug.view(len(mask_ug), len(self.ups), -1).unbind(1)
        return [mask_ur @ up for mask_ur, up in zip(masks, self.ups, strict=True)]

    @cached_property
    def _direction_jd(self) -> Tensor:
        direction = torch.randn(len(self.ups), self.widths[0], generator=self.data.generator("teacher"))
        return F.normalize(direction, dim=1)

    @cached_property
    def _network(self) -> nn.Module:
        return self.network()


def _linear(d_in: int, d_out: int, generator: torch.Generator) -> nn.Linear:
    linear = nn.Linear(d_in, d_out, bias=False)
    linear.weight.data.normal_(0.0, d_in**-0.5, generator=generator)
    return linear
