"""Users with few examples: which ones they own, and that nothing shows another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from federation.data.population import Batch, Part, side_by_side
from federation.streams import Streams, UserIds
from simulations.few_shots import with_shots

IDS = np.array([3, 8, 21, 40])
OWNED = 12


class Numbered:
    """Example n of user u is the point (u, n), of class n; `of` says of which part."""

    def batch(self, user_ids: UserIds, part: Part, size: int | None, streams: Streams) -> Batch:
        if size is None:
            place_un = np.broadcast_to(np.arange(OWNED), (len(user_ids), OWNED))
        else:
            draw = streams.distinct if size <= OWNED else streams.integers
            place_un = draw(f"examples/{part}", user_ids, OWNED, size)
        place = torch.from_numpy(place_un.copy())
        users = torch.from_numpy(user_ids)[:, None].expand_as(place)
        return Batch(torch.stack((users, place), 2).float(), place, 1.0 + place.float())


def owned_by(shots: int, seed: int = 0) -> torch.Tensor:
    """The numbers of the examples that each user owns, (U, shots)."""
    return with_shots(Numbered(), shots, Streams(seed)).batch(IDS, "support", None, Streams(99)).targets


def test_the_whole_support_part_is_the_shots_whatever_is_drawn() -> None:
    first = owned_by(5)
    assert first.shape == (len(IDS), 5)
    assert all(len(set(row.tolist())) == 5 for row in first)
    for streams in (Streams(0), Streams(7).at("serve", "tune", 3)):
        for size in (None, 5, 9):
            again = with_shots(Numbered(), 5, Streams(0)).batch(IDS, "support", size, streams)
            assert torch.equal(again.targets, first)
    assert not torch.equal(owned_by(5, seed=1), first)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_smaller_draw_is_without_replacement_of_the_shots_and_whole(size: int) -> None:
    own = owned_by(5)
    seen: list[set[int]] = [set() for _ in IDS]
    for step in range(40):
        drawn = with_shots(Numbered(), 5, Streams(0)).batch(IDS, "support", size, Streams(0).at("tune", step))
        assert drawn.targets.shape == (len(IDS), size)
        for u, row in enumerate(drawn.targets.tolist()):
            assert len(set(row)) == size
            seen[u] |= set(row)
        points = torch.stack((torch.from_numpy(IDS)[:, None].expand(-1, size), drawn.targets), 2)
        assert torch.equal(drawn.inputs, points.float())
        assert torch.equal(drawn.weight, 1.0 + drawn.targets)
    assert seen == [set(row.tolist()) for row in own]


def test_a_user_owns_the_same_in_any_block() -> None:
    together = owned_by(4)
    for u in range(len(IDS)):
        few = with_shots(Numbered(), 4, Streams(0))
        alone = few.batch(IDS[u : u + 1], "support", None, Streams(0))
        assert torch.equal(alone.targets[0], together[u])
        step = few.batch(IDS[u : u + 1], "support", 2, Streams(2))
        assert torch.equal(step.targets[0], few.batch(IDS, "support", 2, Streams(2)).targets[u])


def test_who_owns_fewer_has_some_more_than_once() -> None:
    more = owned_by(OWNED + 8)
    assert more.shape == (len(IDS), OWNED + 8)
    assert all(len(set(row.tolist())) <= OWNED for row in more)


@pytest.mark.parametrize("part", ["query", "test"])
@pytest.mark.parametrize("size", [None, 3])
def test_other_parts_are_as_they_were(part: Part, size: int | None) -> None:
    few = with_shots(Numbered(), 2, Streams(0)).batch(IDS, part, size, Streams(5))
    plain = Numbered().batch(IDS, part, size, Streams(5))
    assert torch.equal(few.inputs, plain.inputs)


def test_without_a_number_users_own_all() -> None:
    everyone = Numbered()
    assert with_shots(everyone, 0, Streams(0)) is everyone


def test_picked_examples_are_those_of_a_loop() -> None:
    whole = Numbered().batch(IDS, "support", None, Streams(0))
    index_un = torch.tensor([[0, 0, 5], [11, 2, 1], [4, 3, 3], [7, 8, 9]])
    picked = whole.pick(index_un)
    for u in range(len(IDS)):
        for n in range(3):
            at = int(index_un[u, n])
            assert torch.equal(picked.inputs[u, n], whole.inputs[u, at])
            assert (picked.targets[u, n], picked.weight[u, n]) == (whole.targets[u, at], whole.weight[u, at])


def test_batches_side_by_side_are_cut_into_themselves_again() -> None:
    whole = Numbered().batch(IDS, "support", None, Streams(0))
    parts = [whole.window(0, 5), whole.window(5, 6), whole.window(6, OWNED)]
    again = side_by_side(parts)
    for name in ("inputs", "targets", "weight"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    swapped = side_by_side(parts[::-1])
    assert swapped.targets[0].tolist() == [*range(6, OWNED), 5, *range(5)]
