"""Users with a known best mask: a teacher's pool and network make their data, on demand, from the user's id.

Each user has a latent type. A type has a mean of its inputs, so features reveal it, and a habitual mask of
`budget` units per module. A user's own best mask is the habit with some units swapped. Targets are the base
network's outputs with the teacher's rows of that mask, plus noise. So, over the teacher's rows, the best mask
has the smallest expected loss there is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from federation.base import BaseModel
from federation.data.population import Batch, Part
from federation.errors import ConfigError, PopulationError
from federation.pool.spec import PoolSpec
from federation.streams import Streams, UserIds
from simulations.populations.habits import Arrangement, Groups, Singles, highest, module_ups, swapped
from simulations.populations.posterior import Noise, log_evidence, posterior_chances, prior_chances, residuals_of
from simulations.populations.teacher import Chain, Parallel, hidden_features, hit_rate, log_loss, squared_loss

Kind = Literal["network", "additive", "interacting"]

_BANK = 1 << 14
"""Standard normal inputs and noises that all examples draw from: an index is cheaper than a vector."""

_OUTLIER = 20.0
"""Standard deviation of the noise of corrupted targets."""


def f1(mask_ug: Tensor, best_ug: Tensor) -> Tensor:
    """Harmonic mean of precision and recall of each user's units, all modules together: (U, G) -> (U,)."""
    shared = (mask_ug & best_ug).sum(1)
    return 2.0 * shared / (mask_ug.sum(1) + best_ug.sum(1))


@dataclass(frozen=True)
class SyntheticPopulation:
    """Users 0..train_users - 1 train; the next `new_users` are new. A user costs nothing until asked for.

    kind: how units work together.
        network      a perceptron; each pair of neighbouring widths is one module
        additive     each unit writes to an output of its own: the expected loss is a sum over units
        interacting  half of the units are complements (an opener and a closer: one alone harms), half are substitutes
                     (two that do the same: one suffices, both overshoot); see `Groups`. First-order gains mislead here:
                     they show a closer as harmful, and both substitutes as useful
    widths: of the base network. Unless kind = "network": the inputs, then the outputs of each of the layers that lie
        side by side, at least `rank` each, as in (64, 24, 24).
    rank, budget: units, and active units, of each module.
    types: of users. late_types: that many of them are met only among new users and in the last third of the
        training users, which join last where a federation starts with a share of them.
    flips: probability that a unit of the type's habit (if interacting: a pair of complements, or of substitutes) is
        swapped for another one, per user.
    noise: standard deviation of the targets' noise. Single units write with strength 1 (not in a network), so noise 1
        leaves gains from 4 examples in doubt.
    shift: standard deviation of a type's mean, per input.
    distractors: units per module, the last ones, that echo what a type's habit writes altogether. Their first-order
        gain is high for users of that type, beside the right units they overshoot, and no best mask has them. Not in
        a network.
    outliers: share of examples whose targets are corrupted, by noise of standard deviation 20.
    hit: mean squared error over outputs up to which an example counts as right, for the quality "accuracy".
    loss: of the base, half the mean squared error l over outputs, or log(1 + l), which outliers hardly move.
    examples: what a user owns in each part.

    The accuracy has no gradient, and the same best mask as the loss. An example's error is its noise plus what a mask
    does wrong; the noise is symmetric and has one peak, outliers or not, so the chance that the error is small is
    greatest where the mask does nothing wrong (Anderson, 1955). But few outliers fill the gradient of the loss with
    noise, so gains of the loss say little, while to the accuracy an outlier is one miss, whatever the mask.

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
    kind: Kind = "network"
    distractors: int = 0
    late_types: int = 0
    outliers: float = 0.0
    hit: float = 1.0
    loss: Literal["squared", "log"] = "squared"

    name = "synthetic"

    def __post_init__(self) -> None:
        for least, fields in (
            (1, ("types", "examples")),
            (0, ("train_users", "new_users", "noise", "shift", "distractors", "late_types", "outliers", "hit")),
        ):
            for field in fields:
                if getattr(self, field) < least:
                    raise ConfigError(f"{field} must be at least {least}, got {getattr(self, field)}")
        if len(self.widths) < 2:
            raise ConfigError(f"widths need an input and an output, as in (64, 128, 10), got {self.widths}")
        if self.late_types >= self.types:
            raise ConfigError(f"late_types must be fewer than the {self.types} types, got {self.late_types}")
        if self.outliers >= 1:
            raise ConfigError(f"outliers are a share of the examples below 1, got {self.outliers}")
        self._check_units()
        self._check_flips()

    def _check_units(self) -> None:
        """The pool must fit its budget and the base. Raises ConfigError."""
        for name, known in (("kind", get_args(Kind)), ("loss", ("squared", "log"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is one of {known}, got {getattr(self, name)!r}")
        if self.kind == "network" and self.distractors:
            raise ConfigError(
                f"distractors need kind = 'additive' or 'interacting', got {self.distractors} in a network"
            )
        if self.kind != "network" and min(self.widths[1:]) < self.rank:
            raise ConfigError(
                f"with kind = {self.kind!r} the layers lie side by side, with at least {self.rank} outputs for "
                f"{self.rank} units, got widths {self.widths}; set ({self.widths[0]}, {self.rank}, {self.rank})"
            )
        if self.kind == "interacting" and (self.rank - self.distractors) % 4:
            raise ConfigError(
                f"with kind = 'interacting' rank - distractors must be a multiple of 4 (pairs of complements, and as "
                f"many of substitutes), got {self.rank} - {self.distractors}"
            )
        usable = self.rank - self.distractors
        if not 1 <= self.budget <= usable or max(self._arrangement.chosen) > self._arrangement.alternatives:
            raise ConfigError(f"a budget must be within 1..{usable} units per module, got {self.budget}{self._pairs()}")

    def _check_flips(self) -> None:
        """There must be enough other units to swap for. Raises ConfigError."""
        most = 1 - max(self._arrangement.chosen) / self._arrangement.alternatives
        if not 0 <= self.flips <= most:
            raise ConfigError(
                f"flips must be within 0..{most:g} for {self.budget} of {self.rank - self.distractors} units"
                f"{self._pairs()}, got {self.flips}; with more, a type says nothing about its users"
            )

    def _pairs(self) -> str:
        """How the budget is spent where units come in pairs, for errors."""
        if self.kind != "interacting":
            return ""
        complements, substitutes = self._arrangement.chosen
        return (
            f" ({complements} pairs of complements and {substitutes} of substitutes, "
            f"of {self._arrangement.alternatives} each)"
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
        inputs = F.embedding(bank_un, self._bank).add_(self._type_mean[self.type_of(user_ids), None])
        targets = self._teacher.teach(inputs, self.best_mask(user_ids)).add_(F.embedding(noise_un, self._noise_bank))
        return Batch(inputs, targets, torch.ones(inputs.shape[:2]))

    def base_model(self) -> BaseModel:
        return BaseModel(
            module=self._teacher.network(),
            loss=log_loss if self.loss == "log" else squared_loss,
            features=hidden_features,
            feature_width=self._teacher.feature_width,
            target_modules=tuple(m.name for m in self.pool_spec().modules),
            name=self._teacher.name,
            accuracy=hit_rate(self.hit),
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
        return self._teacher.spec()

    def teacher_values(self) -> dict[str, Tensor]:
        """The teacher's rows (R, d_in + d_out) by section. In a network k of them weigh as much as the layer itself;
        otherwise the rows of single units have strength 1."""
        return {section: rows.clone() for section, rows in self._teacher.rows.items()}

    def type_of(self, user_ids: UserIds) -> npt.NDArray[np.int64]:
        """The latent type of each user, 0..types - 1: (U,)."""
        early_u = np.asarray(user_ids) < self.train_users - self.train_users // 3
        high_u = np.where(early_u, self.types - self.late_types, self.types)
        return self._data.integers("type", user_ids, high_u, 1)[:, 0]

    def best_mask(self, user_ids: UserIds) -> Tensor:
        """The mask that made the user's targets: the type's habit after the user's own swaps, (U, G) bool."""
        type_u = self.type_of(user_ids)
        habit = self._habit[type_u]
        chance = self._data.uniform("flips", user_ids, tuple(habit.shape[1:]))
        mine = swapped(habit, chance, self.flips, self._arrangement.chosen)
        return self._arrangement.units(mine, self._second[type_u])

    def state_best_mask(self, user_ids: UserIds) -> Tensor:
        """The best mask given the type alone: the type's habit, (U, G) bool.

        The type is all that features can reveal; swaps are independent of it. Each unit of the habit is in
        the user's best mask with probability 1 - flips, each other one with about flips * k / (R - k), which
        is no more: so no policy that sees only features has a higher expected F1 (nor, unless in a network, a lower
        expected loss, while at most half of the habit is flipped). Gains show the swaps too: a policy that sees both
        can do better, up to `best_mask`.
        """
        type_u = self.type_of(user_ids)
        return self._arrangement.units(self._habit[type_u], self._second[type_u])

    def informed_mask(self, user_ids: UserIds, examples: Batch) -> Tensor:
        """The best mask given the type and the user's own examples (U, N, ..), (U, G) bool.

        Of the masks that a user can have, the one with the most units of the user's own best mask to expect. It has
        the highest expected F1 and, as all units in use are worth the same, the smallest expected loss, both given
        the type and these examples. However a policy was trained, what it makes of the examples tells it no more of
        a user than they and the type do: so no policy that chooses such masks does better on average.

        Neglected: masks that no user has (half a pair, both substitutes, distractors, classes that share the budget
        otherwise), which pay only where nearly nothing is known; masks of another size, as without a fixed budget per
        module; that inputs and noises come from finite banks; and, with outliers, what other examples say when it is
        judged whether one is corrupted (`log_evidence`).

        Raises PopulationError in a network, where units write to the same outputs.
        """
        if isinstance(self._teacher, Chain):
            raise PopulationError(
                "the best mask given examples is known where units write to outputs of their own, got kind = "
                f"{self.kind!r}; set kind = 'additive' or 'interacting' in population.options"
            )
        type_u, chosen = self.type_of(user_ids), self._arrangement.chosen
        habit, second = self._habit[type_u], self._second[type_u]
        noise = Noise(self.noise, _OUTLIER, self.outliers)
        residuals = residuals_of(self._teacher, self._arrangement, second, examples)
        evidence = log_evidence(residuals, prior_chances(habit, self.flips, chosen), noise)
        chance = posterior_chances(evidence, habit, self.flips, chosen)
        return self._arrangement.units(highest(chance, chosen), second)

    def expected_loss(self, user_ids: UserIds, mask_ug: Tensor) -> Tensor:
        """Each user's expected squared loss with a mask over the teacher's rows, (U, G) bool -> (U,).

        Squared whatever `loss` says, which is what a model is trained by and measured in.
        Exact for the additive and interacting kinds; in a network, what a mask loses against the best one is the mean
        over 256 inputs, the same for all users of a type, without noise.
        """
        mean_ud = self._type_mean[self.type_of(user_ids)]
        excess_u = self._teacher.excess(self._bank, mean_ud, mask_ug, self.best_mask(user_ids))
        return excess_u + 0.5 * self._noise_bank.square().mean()

    # How it is made

    @cached_property
    def _data(self) -> Streams:
        return Streams(self.seed, ("synthetic",))

    @cached_property
    def _bank(self) -> Tensor:
        return torch.randn(_BANK, self.widths[0], generator=self._data.generator("bank"))

    @cached_property
    def _noise_bank(self) -> Tensor:
        """Corrupted ones first. Their mean is zero, so that not even a few large ones move the best mask."""
        noise = self.noise * torch.randn(_BANK, self._teacher.outputs, generator=self._data.generator("noise bank"))
        corrupted = round(self.outliers * _BANK)
        if corrupted:
            large = torch.randn(corrupted, self._teacher.outputs, generator=self._data.generator("outliers"))
            noise[:corrupted] = _OUTLIER * (large - large.mean(0))
        return noise

    @cached_property
    def _type_mean(self) -> Tensor:
        return self.shift * torch.randn(self.types, self.widths[0], generator=self._data.generator("type mean"))

    @cached_property
    def _arrangement(self) -> Arrangement:
        arrangement = Groups if self.kind == "interacting" else Singles
        return arrangement(self.rank, self.budget, self.distractors)

    @cached_property
    def _habit(self) -> Tensor:
        """The alternatives that each type uses: (T, J, C, N) bool."""
        chosen, n = self._arrangement.chosen, self._arrangement.alternatives
        shape = (self.types, len(self.widths) - 1, len(chosen), n)
        return highest(-torch.rand(shape, generator=self._data.generator("habit")), chosen)

    @cached_property
    def _second(self) -> Tensor:
        """Of which two substitutes each type means the second: (T, J, N) bool."""
        shape = (self.types, len(self.widths) - 1, self._arrangement.alternatives)
        return torch.rand(shape, generator=self._data.generator("second")) < 0.5

    @cached_property
    def _teacher(self) -> Chain | Parallel:
        if self.kind == "network":
            return Chain(self.widths, self.rank, self.budget, self._data)
        habit_tjr = self._arrangement.units(self._habit, self._second).view(self.types, -1, self.rank)
        ups = (
            module_ups(self._arrangement, habit_tjr[:, j], j * self.distractors, outputs)
            for j, outputs in enumerate(self.widths[1:])
        )
        return Parallel(self.widths, tuple(ups), self._data)

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
