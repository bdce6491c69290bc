"""Which users of a population are a node's: a contiguous part of each split, without those who were forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import numpy as np

from federation.data.population import Population, as_array
from federation.errors import NodeError, PopulationError
from federation.streams import UserIds

SPLITS = ("train", "new")


@runtime_checkable
class NamesUsers(Protocol):
    """A population whose users have names."""

    def id_of(self, name: str) -> int:
        """The id of a user. Raises PopulationError for a name of nobody."""
        ...

    def stored_id(self, name: str) -> int:
        """The id of a user of this name, whose data need not be here any longer. Raises PopulationError."""
        ...


@dataclass(frozen=True)
class OwnUsers:
    """A node's users. of_split: their ids, in the population's order; nodes in the order of their parts hold all."""

    population: Population
    of_split: Mapping[str, range | UserIds]

    @classmethod
    def of(cls, population: Population, part: int, parts: int, gone: UserIds) -> Self:
        """Part `part` of `parts`, counted from 0, without those who are gone."""
        splits = {split: part_of(population.users(split), part, parts) for split in SPLITS}
        return cls(population, {split: without(users, gone) for split, users in splits.items()})

    @property
    def counts(self) -> dict[str, int]:
        """How many there are, by split."""
        return {split: len(users) for split, users in self.of_split.items()}

    def at(self, split: str, positions: Sequence[int]) -> UserIds:
        """The users of a split at these positions, ascending from 0. Raises NodeError where one is not there."""
        users = self.of_split.get(split, range(0))
        if positions and positions[-1] >= len(users):
            raise NodeError(
                "unknown users",
                f"positions count a node's users of a split from 0, this one has {self.counts}, asked for the "
                f"{split} user at {positions[-1]}; ask it to describe itself",
            )
        return np.array([users[position] for position in positions], dtype=np.int64)

    def holds(self, user_id: int) -> bool:
        """Whether a user is one of them."""
        return any(user_id in users for users in self.of_split.values())

    def id_of(self, name: str) -> int:
        """A user's id: by name in a population that knows names, else by the id in digits.

        Raises NodeError for a name of nobody here.
        """
        user_id = _named(self.population, name)
        if not self.holds(user_id):
            raise self._none_of_them(name)
        return user_id

    def known_id(self, name: str) -> int:
        """The id that a name stands for, whether or not the user's data is here.

        Raises NodeError for a name that stands for none.
        """
        user_id = _stored(self.population, name)
        if user_id < 0:
            raise self._none_of_them(name)
        return user_id

    def _none_of_them(self, name: str) -> NodeError:
        return NodeError(
            "unknown users",
            f"a user is one of this node's {self.counts}, {name[:80]!r} is none of them; name another",
        )


def part_of(users: range | UserIds, part: int, parts: int) -> range | UserIds:
    """One of the contiguous parts that `np.array_split` cuts users into; of a range without listing it."""
    size, longer = divmod(len(users), parts)
    start = part * size + min(part, longer)
    return users[start : start + size + (part < longer)]


def without(users: range | UserIds, gone: UserIds) -> range | UserIds:
    """The users that are not among those who are gone; a range stays one where nobody is."""
    found = [user for user in gone.tolist() if user in users]
    return as_array(users)[~np.isin(users, found)] if found else users


def _named(population: Population, name: str) -> int:
    """A user's id, -1 for none."""
    if isinstance(population, NamesUsers):
        with suppress(PopulationError):
            return population.id_of(name)
        return -1
    return _in_digits(name)


def _stored(population: Population, name: str) -> int:
    """The id that a name stands for, -1 for none."""
    if isinstance(population, NamesUsers):
        with suppress(PopulationError):
            return population.stored_id(name)
        return -1
    return _in_digits(name)


def _in_digits(name: str) -> int:
    digits = name.isascii() and name.isdecimal() and len(name) < 20
    return int(name) if digits and int(name) < 2**63 else -1
