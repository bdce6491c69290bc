"""Users with a known best mask: a teacher's pool and network make their data, on demand, from the user's id.

Each user has a latent type. A type has a mean of its inputs, so features reveal it, and a habitual mask of
`budget` units per module. A user's own best mask is the habit with some units swapped. Targets are the base
network's outputs with the teacher's rows of that mask, plus noise. So, over the teacher's rows, the best mask
has the smallest expected loss there is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from federation.base import BaseModel, frozen
from federation.data.population import Batch, Part
from federation.errors import ConfigError, PopulationError
from federation.pool.spec import ModuleSpec, PoolSpec
from federation.streams import Streams, UserIds

_BANK = 1 << 14
"""Standard normal inputs and noises that all examples draw from: an index is cheaper than a vector."""


class Perceptron(nn.Module):
    """Linear layers fc1, fc2, .., with ReLU between them: (.., widths[0]) -> (.., widths[-1])."""

    def __init__(self, widths: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.depth = len(widths) - 1
        for layer, (d_in, d_out) in enumerate(pairwise(widths), start=1):
            linear = nn.Linear(d_in, d_out, bias=False)
            linear.weight.data.normal_(0.0, d_in**-0.5, generator=generator)
            self.add_module(f"fc{layer}", linear)

    def hidden(self, inputs: Tensor) -> Tensor:
        """What enters the last layer: (.., widths[-2])."""
        for layer in range(1, self.depth):
            inputs = torch.relu(self.get_submodule(f"fc{layer}")(inputs))
        return inputs

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.get_submodule(f"fc{self.depth}")(self.hidden(inputs))
        return outputs


def squared_loss(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Half the mean squared error over outputs, (B,): nats under a unit Gaussian, up to a constant."""
    return 0.5 * F.mse_loss(module(inputs), targets, reduction="none").mean(1)


def hidden_features(module: nn.Module, inputs: Tensor) -> Tensor:
    """What enters the last layer: (B, widths[-2])."""
    features: Tensor = module.hidden(inputs)  # type: ignore[operator]
    return features


def f1(mask_ug: Tensor, best_ug: Tensor) -> Tensor:
    """Harmonic mean of precision and recall of each user's units, all modules together: (U, G) -> (U,)."""
    shared = (mask_ug & best_ug).sum(1)
    return 2.0 * shared / (mask_ug.sum(1) + best_ug.sum(1))


@dataclass(frozen=True)
class SyntheticPopulation:
    """Users 0..train_users - 1 train; the next `new_users` are new. A user costs nothing until asked for.

    widths: of the base network; each pair of neighbours is one module.
    rank, budget: units, and active units, of each module.
    flips: probability that a unit of the type's habit is swapped for another one, per user.
    noise: standard deviation of the targets' noise. shift: standard deviation of a type's mean, per input.
    examples: what a user owns in each part.

    Raises ConfigError when a number is out of its range. With too many flips, a type's habit would be a worse
    guess than other units.
    """

    train_users: int
    new_users: int
    widths: tuple[int, ...] = (64, 128, 10)
    rank: int = 32
    budget: int = 4
    types: int = 8
    flips: float = 0.25
    noise: float = 0.1
    shift: float = 0.5
    examples: int = 64
    seed: int = 0

    name = "synthetic"

    def __post_init__(self) -> None:
        for least, fields in (
            (1, ("types", "examples")),
            (0, ("train_users", "new_users", "noise", "shift")),
        ):
            for field in fields:
                if getattr(self, field) < least:
                    raise ConfigError(f"{field} must be at least {least}, got {getattr(self, field)}")
        if len(self.widths) < 2:
            raise ConfigError(f"widths need an input and an output, as in (64, 128, 10), got {self.widths}")
        if not 1 <= self.budget <= self.rank:
            raise ConfigError(f"a budget must be within 1..{self.rank} units per module, got {self.budget}")
        most = 1 - self.budget / self.rank
        if not 0 <= self.flips <= most:
            raise ConfigError(
                f"flips must be within 0..{most:g} for {self.budget} of {self.rank} units, got {self.flips}; "
                "with more, a type says nothing about its users"
            )

    # The Population protocol

    def users(self, split: str) -> range:
        """The ids of "train" or "new"."""
        splits = {
            "train": range(self.train_users),
            "new": range(self.train_users, self.train_users + self.new_users),
        }
        if split not in splits:
            raise PopulationError(f"the synthetic population has the splits {list(splits)}, got {split!r}")
        return splits[split]

    def batch(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> Batch:
        """Inputs (U, N, widths[0]), targets (U, N, widths[-1]); every user owns `examples` of each part."""
        bank_un, noise_un = self._owned(user_ids, part, self._choose(user_ids, part, size, streams))
        inputs = F.embedding(bank_un, self._bank).add_(self._type_mean[self._type(user_ids), None])
        targets = self._teach(inputs, self.best_mask(user_ids)).add_(F.embedding(noise_un, self._noise_bank))
        return Batch(inputs, targets, torch.ones(inputs.shape[:2]))

    def base_model(self) -> BaseModel:
        return BaseModel(
            module=frozen(Perceptron(self.widths, self._data.generator("base"))),
            loss=squared_loss,
            features=hidden_features,
            feature_width=self.widths[-2],
            target_modules=tuple(m.name for m in self.pool_spec().modules),
            name=f"perceptron-{'-'.join(map(str, self.widths))}",
        )

    def groups(self, user_ids: UserIds) -> UserIds:
        """Users are drawn independently: each is its own group."""
        return user_ids

    def chars_per_target(self, user_ids: UserIds, part: Part) -> npt.NDArray[np.float64]:
        """Ones: targets are not text."""
        return np.ones(len(user_ids))

    def describe(self) -> dict[str, object]:
        return {"name": self.name, **asdict(self)}

    # What is known of the truth

    def pool_spec(self) -> PoolSpec:
        """The shape of the teacher's pool, and of any pool that can equal it."""
        widths = pairwise(self.widths)
        modules = tuple(ModuleSpec(f"fc{j}", d_in, d_out) for j, (d_in, d_out) in enumerate(widths, start=1))
        return PoolSpec(modules, self.rank, scale=1.0)

    def teacher_values(self) -> dict[str, Tensor]:
        """The teacher's rows (R, d_in + d_out) by section; k of them weigh as much as the layer itself."""
        return {section: rows.clone() for section, rows in self._teacher.items()}

    def best_mask(self, user_ids: UserIds) -> Tensor:
        """The mask that made the user's targets: the type's habit after the user's own swaps, (U, G) bool."""
        habit = self.state_best_mask(user_ids)
        chance = self._data.uniform("flips", user_ids, (habit.shape[1],))
        # Habitual units that stay come first (1..2), then others at random (0..1), then the swapped (-1..0).
        order = chance + torch.where(habit, torch.where(chance < self.flips, -1.0, 1.0), 0.0)
        best = order.view(len(habit), -1, self.rank).topk(self.budget, dim=2).indices
        mask = torch.zeros(len(habit), habit.shape[1] // self.rank, self.rank, dtype=torch.bool)
        return mask.scatter_(2, best, True).flatten(1)

    def state_best_mask(self, user_ids: UserIds) -> Tensor:
        """The best mask given the type alone: the type's habit, (U, G) bool.

        The type is all that features can reveal; swaps are independent of it. Each unit of the habit is in
        the user's best mask with probability 1 - flips, each other one with about flips * k / (R - k), which
        is no more: so no policy that sees only features has a higher expected F1. Gains show the swaps too:
        a policy that sees both can do better, up to `best_mask`.
        """
        return self._habit[self._type(user_ids)]

    # How it is made

    @cached_property
    def _data(self) -> Streams:
        return Streams(self.seed, ("synthetic",))

    @cached_property
    def _bank(self) -> Tensor:
        return torch.randn(_BANK, self.widths[0], generator=self._data.generator("bank"))

    @cached_property
    def _noise_bank(self) -> Tensor:
        return self.noise * torch.randn(_BANK, self.widths[-1], generator=self._data.generator("noise bank"))

    @cached_property
    def _type_mean(self) -> Tensor:
        return self.shift * torch.randn(self.types, self.widths[0], generator=self._data.generator("type mean"))

    @cached_property
    def _habit(self) -> Tensor:
        order = torch.rand(self.types, len(self.widths) - 1, self.rank, generator=self._data.generator("habit"))
        return (order.argsort(2).argsort(2) < self.budget).flatten(1)

    @cached_property
    def _teacher(self) -> dict[str, Tensor]:
        generator = self._data.generator("teacher")
        rows = {}
        for m in self.pool_spec().modules:
            down = torch.randn(self.rank, m.d_in, generator=generator) * m.d_in**-0.5
            up = torch.randn(self.rank, m.d_out, generator=generator) * self.budget**-0.5
            rows[m.section] = torch.cat((down, up), 1)
        return rows

    @cached_property
    def _base(self) -> nn.Module:
        return self.base_model().module

    def _type(self, user_ids: UserIds) -> Tensor:
        return torch.from_numpy(self._data.integers("type", user_ids, self.types, 1)[:, 0])

    def _choose(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> npt.NDArray[np.int64]:
        """Which examples, (U, N): all in order, or `size`, without replacement when the user owns enough."""
        if size is None:
            return np.broadcast_to(np.arange(self.examples), (len(user_ids), self.examples))
        draw = streams.distinct if size <= self.examples else streams.integers
        return draw(f"examples/{part}", user_ids, self.examples, size)

    def _owned(self, user_ids: UserIds, part: Part, example_un: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Where the inputs and the noises of a user's examples lie in the banks: (U, N) twice.

        Only the examples that were chosen are looked up, so owning more of them costs nothing.
        """
        words_un4 = self._data.words(f"data/{part}", user_ids, example_un)
        bank_un2 = torch.from_numpy(words_un4[..., :2].astype(np.int64) % _BANK)
        return bank_un2[..., 0], bank_un2[..., 1]

    def _teach(self, inputs: Tensor, mask_ug: Tensor) -> Tensor:
        """The base with each user's teacher rows: (U, N, widths[0]), (U, G) -> (U, N, widths[-1])."""
        shape = (*inputs.shape[:2], -1)
        mask_u1jr = mask_ug.view(len(mask_ug), 1, -1, self.rank).float()
        outputs = inputs.flatten(0, 1)
        for j, m in enumerate(self.pool_spec().modules):
            hidden = outputs.relu_() if j else outputs
            down, up = torch.split(self._teacher[m.section], [m.d_in, m.d_out], 1)
            # All R units in one product for all users, then masked: faster than gathering k units per user. Adding
            # in place takes 0.6 of the time of a sum of two products.
            low = (hidden @ down.t()).view(*shape).mul_(mask_u1jr[:, :, j]).flatten(0, 1)
            outputs = self._base.get_submodule(m.name)(hidden).addmm_(low, up)
        return outputs.view(*shape)
