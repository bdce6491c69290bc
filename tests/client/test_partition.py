"""Which users are a node's: against `np.array_split`, and names and positions of others."""

from __future__ import annotations

import numpy as np
import pytest

from client.partition import OwnUsers, part_of, without
from federation.errors import NodeError, PopulationError
from simulations.populations.synthetic import SyntheticPopulation

NOBODY = np.zeros(0, np.int64)


def population(train_users: int = 60, new_users: int = 20) -> SyntheticPopulation:
    return SyntheticPopulation(train_users=train_users, new_users=new_users)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 11])
@pytest.mark.parametrize("count", [0, 1, 6, 7, 20])
def test_parts_are_those_of_array_split(count: int, parts: int) -> None:
    ids = np.arange(count) * 3 + 5
    for part, expected in enumerate(np.array_split(ids, parts)):
        assert part_of(ids, part, parts).tolist() == expected.tolist()
        assert list(part_of(range(5, 5 + 3 * count, 3), part, parts)) == expected.tolist()


def test_a_part_of_very_many_users_is_a_range_where_nobody_is_gone() -> None:
    own = OwnUsers.of(population(10**15), 2, 3, np.array([5]))
    assert own.of_split["train"] == range(666666666666667, 10**15)
    assert own.at("train", [0, 333333333333332]).tolist() == [666666666666667, 10**15 - 1]
    assert own.holds(10**15 - 1)


@pytest.mark.parametrize("users", [range(4, 20, 2), np.arange(4, 20, 2)])
def test_who_is_gone_is_left_out(users: range | np.ndarray) -> None:
    assert without(users, NOBODY) is users
    assert without(users, np.array([5, 99])) is users
    assert np.asarray(without(users, np.array([18, 5, 4]))).tolist() == [6, 8, 10, 12, 14, 16]


def test_parts_are_cut_before_anybody_is_left_out() -> None:
    """So that nobody of another node moves to this one when someone is forgotten."""
    parts = [OwnUsers.of(population(), part, 2, np.array([0, 1, 65])) for part in (0, 1)]
    assert parts[0].at("train", range(28)).tolist() == list(range(2, 30))
    assert parts[1].at("train", range(30)).tolist() == list(range(30, 60))
    assert [own.counts for own in parts] == [{"train": 28, "new": 9}, {"train": 30, "new": 10}]
    assert parts[0].at("new", [5]).tolist() == [66]
    assert not parts[0].holds(65)


@pytest.mark.parametrize(("split", "positions"), [("train", [0, 30]), ("new", [10]), ("validation", [0])])
def test_positions_of_nobody_are_refused(split: str, positions: list[int]) -> None:
    own = OwnUsers.of(population(), 1, 2, NOBODY)
    with pytest.raises(NodeError, match=rf"'train': 30, 'new': 10.* {split} user at {positions[-1]}; ask it") as raised:
        own.at(split, positions)
    assert raised.value.fault == "unknown users"
    assert own.at(split, []).tolist() == []


def test_users_without_names_go_by_their_ids() -> None:
    own = OwnUsers.of(population(), 1, 2, NOBODY)
    assert [own.id_of(name) for name in ("30", "59", "70", "079")] == [30, 59, 70, 79]


@pytest.mark.parametrize("name", ["29", "-1", "", "1.0", " 31", "٣١", "alice", "9" * 19, "9" * 30, "9" * 5000])
def test_ids_of_others_are_unknown_users(name: str) -> None:
    own = OwnUsers.of(population(), 1, 2, NOBODY)
    with pytest.raises(NodeError, match=r"this node's \{'train': 30, 'new': 10\}, .* name another") as raised:
        own.id_of(name)
    assert raised.value.fault == "unknown users"
    assert len(str(raised.value)) < 250


class Named(SyntheticPopulation):
    def id_of(self, name: str) -> int:
        if name not in ("ann", "bo"):
            raise PopulationError(f"nobody is called {name!r}")
        return {"ann": 4, "bo": 50}[name]

    def stored_id(self, name: str) -> int:
        if name == "":
            raise PopulationError("a name has letters")
        return len(name)


def test_users_go_by_their_names_where_they_have_any() -> None:
    own = OwnUsers.of(Named(train_users=60, new_users=20), 0, 2, NOBODY)
    assert own.id_of("ann") == 4
    for name in ("bo", "4", "cy"):  # of another node, an id, nobody
        with pytest.raises(NodeError, match=f"{name!r} is none of them"):
            own.id_of(name)


def test_a_name_stands_for_an_id_whether_or_not_its_data_is_here() -> None:
    named = OwnUsers.of(Named(train_users=60, new_users=20), 0, 2, NOBODY)
    assert [named.known_id(name) for name in ("ann", "4", "someone")] == [3, 1, 7]
    numbered = OwnUsers.of(population(), 1, 2, NOBODY)
    assert [numbered.known_id(name) for name in ("0", "31", "99999", str(2**63 - 1))] == [0, 31, 99999, 2**63 - 1]
    for own, name in ((named, ""), (numbered, "ann"), (numbered, str(2**63)), (numbered, "-1")):
        with pytest.raises(NodeError, match=f"{name!r} is none of them") as raised:
            own.known_id(name)
        assert raised.value.fault == "unknown users"
