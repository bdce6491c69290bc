"""Users who see handwritten digits each in a way of their own, over a small frozen base that knows upright ones.

The images are split before users are drawn: those of pre-training, of training users and of new users do not overlap,
nor do a user's support, query and test images. Users are virtual: who owns what, and how it is seen, follows from the
user's id, when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from federation.base import BaseModel
from federation.data.population import Batch, Part
from federation.errors import ConfigError, PopulationError
from federation.plugins import check_options
from federation.streams import Streams, UserIds
from simulations.populations.digits_base import DigitsBaseConfig, digits_base, pretrained_digits
from simulations.populations.digits_images import CLASSES, PATCHES, PER_CLASS, Condition, Indices, cycles, digit_images
from simulations.pretrain import pretraining_report

Stream = Literal["classes", "permuted"]


@dataclass(frozen=True)
class DigitsPopulation:
    """Users 0..train_users - 1 train; the next `new_users` are new. A user costs nothing until asked for.

    rotation: each user's images are turned by an angle uniform within +-rotation degrees.
    patches: of the image's 16 patches of 2x2 pixels, so many change places, in a cycle of the user's own.
    contrast: pixels x in -1..1 become a x + b, with a uniform within 1 +- contrast and b within +-contrast.
    inverted: share of users whose images are negatives (-a instead of a).
    labels: of the ten classes, so many change names, in a cycle of the user's own: the user's private names.
    examples: what a user owns in support, and as many in query; test_examples: in test. A tenth of each class.
    stream: what a user's sequence of tasks is.
        classes   each task has classes of its own (two of them in 5 tasks), in the user's own order; they keep their
                  names. `batch` of the population is all tasks together
        permuted  each task has all classes and the user's same images; each after the first has a rotation and a cycle
                  of patches of its own, drawn as the first. `batch` of the population is the first task
    tasks: how many there are.
    pretraining: fields of `DigitsBaseConfig`.

    Raises ConfigError when an option is out of its range.
    """

    train_users: int = 2000
    new_users: int = 400
    rotation: float = 45.0
    patches: int = 0
    contrast: float = 0.3
    inverted: float = 0.1
    labels: int = 4
    examples: int = 40
    test_examples: int = 100
    stream: Stream = "classes"
    tasks: int = 5
    seed: int = 0
    pretraining: Mapping[str, Any] = field(default_factory=dict)

    name = "digits"

    def __post_init__(self) -> None:
        for option, most in (("rotation", 180), ("inverted", 1), ("contrast", 0.9)):
            if not 0 <= getattr(self, option) <= most:
                raise ConfigError(f"{option} must be within 0..{most}, got {getattr(self, option)}; 0 switches it off")
        for option, among in (("patches", PATCHES), ("labels", CLASSES)):
            if getattr(self, option) not in (0, *range(2, among + 1)):
                raise ConfigError(
                    f"{option} that change among each other are 2..{among}, got {getattr(self, option)}; "
                    "0 switches it off"
                )
        for option in ("train_users", "new_users"):
            if getattr(self, option) < 0:
                raise ConfigError(f"{option} must be at least 0, got {getattr(self, option)}")
        self._check_examples()
        self._check_stream()
        check_options("pretraining", DigitsBaseConfig, self.pretraining)
        DigitsBaseConfig(**self.pretraining)

    def _check_examples(self) -> None:
        """Every class gives as many, and a pool has enough of each. Raises ConfigError."""
        for option in ("examples", "test_examples"):
            value = getattr(self, option)
            if value < CLASSES or value % CLASSES:
                raise ConfigError(
                    f"{option} must be a multiple of the {CLASSES} classes, got {value}; "
                    f"set {max(1, round(value / CLASSES)) * CLASSES}"
                )
        owned, most = 2 * self.examples + self.test_examples, CLASSES * PER_CLASS
        if owned > most:
            raise ConfigError(
                f"a user owns 2 * examples + test_examples of the {most} images of its split, got {owned}; lower either"
            )

    def _check_stream(self) -> None:
        """A stream must have tasks that differ. Raises ConfigError."""
        if self.stream not in get_args(Stream):
            raise ConfigError(f"stream is one of {get_args(Stream)}, got {self.stream!r}")
        if self.tasks < 1:
            raise ConfigError(f"tasks must be at least 1, got {self.tasks}")
        if self.stream == "classes" and CLASSES % self.tasks:
            raise ConfigError(
                f"with stream = 'classes' tasks must divide the {CLASSES} classes, got {self.tasks}; set 1, 2, 5 or 10"
            )
        if self.stream == "permuted" and not (self.rotation or self.patches):
            raise ConfigError(
                "with stream = 'permuted' tasks differ in rotation and patches, got 0 of both; set patches = 16"
            )

    # The protocols Population and Sequenced

    def users(self, split: str) -> range:
        """The ids of "train" or "new"."""
        splits = {
            "train": range(self.train_users),
            "new": range(self.train_users, self.train_users + self.new_users),
        }
        if split not in splits:
            raise PopulationError(f"the digits population has the splits {list(splits)}, got {split!r}")
        return splits[split]

    def batch(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> Batch:
        """Inputs (U, N, 1, 8, 8), targets (U, N) int64: all classes, as the first task of "permuted" shows them.

        With size None classes take turns, 0 to 9 and again, so that the first n of a part are a balanced n.
        """
        everything_uc = np.broadcast_to(np.arange(CLASSES), (len(user_ids), CLASSES))
        return self._batch(user_ids, part, size, streams, everything_uc, 0)

    def of_task(self, index: int) -> DigitsTask:
        if not 0 <= index < self.tasks:
            raise PopulationError(f"the digits population has tasks 0..{self.tasks - 1}, got {index}")
        return DigitsTask(self, index)

    def base_model(self) -> BaseModel:
        return digits_base(self._base_folder)

    def groups(self, user_ids: UserIds) -> UserIds:
        """Users are drawn independently: each is its own group."""
        return user_ids

    def chars_per_target(self, user_ids: UserIds, part: Part) -> npt.NDArray[np.float64]:
        """Ones: targets are not text."""
        return np.ones(len(user_ids))

    def describe(self) -> dict[str, object]:
        images = digit_images()
        return {
            "name": self.name,
            **asdict(self),
            "images": {
                "pretraining": len(images.pretraining),
                "train": CLASSES * PER_CLASS,
                "new": CLASSES * PER_CLASS,
                "sha256": images.fingerprint,
            },
            "base_upright_accuracy": pretraining_report(self._base_folder)["upright_accuracy"],
        }

    # What is known of the truth

    def condition(self, user_ids: UserIds, task: int = 0) -> Condition:
        """How users see the digits of a task; only rotation and patches depend on it, and only if `permuted`."""
        varied = self._data.at("task", task) if task and self.stream == "permuted" else self._data

        def around_zero(streams: Streams, purpose: str, most: float) -> torch.Tensor:
            return most * (2.0 * streams.uniform(purpose, user_ids, ()) - 1.0)

        negative_u = self._data.uniform("inverted", user_ids, ()) < self.inverted
        slope_u = 1.0 + around_zero(self._data, "slope", self.contrast)
        return Condition(
            degree_u=around_zero(varied, "rotation", self.rotation),
            patch_up=torch.from_numpy(cycles(varied.distinct("patches", user_ids, PATCHES, self.patches), PATCHES)),
            slope_u=torch.where(negative_u, -slope_u, slope_u),
            offset_u=around_zero(self._data, "offset", self.contrast),
            name_uc=torch.from_numpy(cycles(self._data.distinct("labels", user_ids, CLASSES, self.labels), CLASSES)),
        )

    def classes_of(self, user_ids: UserIds, task: int) -> Indices:
        """The classes of a task of the stream "classes", in the user's own order: (U, CLASSES / tasks)."""
        order_uc = self._data.distinct("order", user_ids, CLASSES, CLASSES)
        return np.array_split(order_uc, self.tasks, axis=1)[task]

    # How it is made

    @cached_property
    def _data(self) -> Streams:
        return Streams(self.seed, ("digits",))

    @cached_property
    def _base_folder(self) -> Path:
        return pretrained_digits(digit_images(), DigitsBaseConfig(**self.pretraining))

    def _batch(
        self, user_ids: UserIds, part: Part, size: int | None, streams: Streams, class_uc: Indices, task: int
    ) -> Batch:
        """Examples of the classes class_uc (U, C) under the conditions of a task."""
        total = (self.test_examples if part == "test" else self.examples) // CLASSES * class_uc.shape[1]
        chosen_un = _choose(user_ids, part, total, size, streams)
        place_un, column_un = np.divmod(chosen_un, class_uc.shape[1])
        class_un = np.take_along_axis(class_uc, column_un, 1)
        ink = self._ink(user_ids, part, class_un, place_un)
        condition = self.condition(user_ids, task)
        targets = condition.targets(torch.from_numpy(class_un))
        return Batch(condition.inputs(ink), targets, torch.ones(targets.shape))

    def _ink(self, user_ids: UserIds, part: Part, class_un: Indices, place_un: Indices) -> torch.Tensor:
        """The images at places of a user's own order of each class's images: (U, N, 8, 8).

        The order begins with the support images of the class, then come those of query and of test.
        """
        share, test_share = self.examples // CLASSES, self.test_examples // CLASSES
        stack_uc = np.asarray(user_ids)[:, None] * CLASSES + np.arange(CLASSES)
        order = self._data.distinct("images", stack_uc.ravel(), PER_CLASS, 2 * share + test_share)
        first = {"support": 0, "query": share, "test": 2 * share}[part]
        rows_u1 = np.arange(len(user_ids))[:, None]
        image_un = order.reshape(len(user_ids), CLASSES, -1)[rows_u1, class_un, first + place_un]
        new_u1 = (np.asarray(user_ids) >= self.train_users).astype(np.int64)[:, None]
        return digit_images().pools[new_u1, class_un, image_un]


@dataclass(frozen=True)
class DigitsTask:
    """One task of every user's sequence; see `DigitsPopulation.stream`."""

    population: DigitsPopulation
    index: int

    def batch(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> Batch:
        """As `DigitsPopulation.batch`, of this task alone: its classes, or its rotation and patches."""
        if self.population.stream == "permuted":
            class_uc = np.broadcast_to(np.arange(CLASSES), (len(user_ids), CLASSES))
        else:
            class_uc = self.population.classes_of(user_ids, self.index)
        return self.population._batch(user_ids, part, size, streams, class_uc, self.index)


def _choose(user_ids: UserIds, part: Part, total: int, size: int | None, streams: Streams) -> Indices:
    """Which of `total` examples, (U, N): all in order, or `size`, without replacement when there are enough."""
    if size is None:
        return np.broadcast_to(np.arange(total), (len(user_ids), total))
    draw = streams.distinct if size <= total else streams.integers
    return draw(f"examples/{part}", user_ids, total, size)


digits = DigitsPopulation
"""The name in the registry of populations."""
