"""The permutation: one, for every count; another for every key; and no favourites among places."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from federation.permutation import permuted
from federation.splitmix import mixed
from federation.streams import Streams

NEAR_POWERS = [2**power + step for power in (2, 3, 6, 8, 12) for step in (-1, 0, 1)]
NEAR_SQUARES = [side * side + step for side in (5, 31, 100) for step in (-1, 0, 1)]


def table(count: int, key: int) -> list[int]:
    """The whole permutation of one key."""
    images: list[int] = permuted(np.arange(count), count, Streams(key)).tolist()
    return images


@pytest.mark.parametrize("count", [1, 2, 3, *NEAR_POWERS, *NEAR_SQUARES, 54_321])
def test_every_number_is_an_image_once(count: int) -> None:
    for key in range(3):
        assert sorted(table(count, key)) == list(range(count))


@pytest.mark.parametrize("count", [10**6, 10**9, 10**15, 2**62 - 1, 2**62])
def test_images_of_some_positions_of_many_are_different_and_in_range(count: int) -> None:
    positions = np.unique(np.concatenate((np.arange(5000), count - 1 - np.arange(5000), count // 2 + np.arange(5000))))
    images = permuted(positions, count, Streams(1))
    assert len(np.unique(images)) == len(positions)
    assert 0 <= images.min() < images.max() < count
    low, high = np.quantile(images.astype(float) / count, (0.25, 0.75))
    assert abs(low - 0.25) < 0.02
    assert abs(high - 0.75) < 0.02


def test_an_image_needs_no_other_position() -> None:
    whole = permuted(np.arange(1000), 1000, Streams(5))
    assert permuted(np.array([17, 999, 0]), 1000, Streams(5)).tolist() == whole[[17, 999, 0]].tolist()
    assert len(permuted(np.arange(0), 1000, Streams(5))) == 0


def test_keys_have_orders_of_their_own() -> None:
    orders = [
        permuted(np.arange(1000), 1000, streams) for streams in (Streams(0), Streams(1), Streams(0).at("epoch", 1))
    ]
    for a, b in permutations(orders, 2):
        assert (a == b).sum() < 10  # of two random orders, one position in a thousand agrees


@pytest.mark.parametrize(("count", "kept"), [(4, 4), (7, 3), (10, 2)])
def test_ordered_draws_are_equally_likely(count: int, kept: int) -> None:
    """Chi-square over all ordered draws: every (place, image) alone would hide dependence between places."""
    cells = {draw: cell for cell, draw in enumerate(permutations(range(count), kept))}
    keys = 20 * len(cells)
    drawn = [cells[tuple(permuted(np.arange(kept), count, Streams(key)).tolist())] for key in range(keys)]
    observed = np.bincount(drawn, minlength=len(cells))
    chi_square = ((observed - 20.0) ** 2 / 20.0).sum()
    freedom = len(cells) - 1
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


def test_neighbours_are_not_kept_together() -> None:
    """Of a random order of n, about one step in n/2 is between neighbours, and steps go up as often as down."""
    steps = np.diff(permuted(np.arange(100_000), 100_000, Streams(2)))
    assert (np.abs(steps) == 1).sum() < 15
    assert abs((steps > 0).mean() - 0.5) < 4 * np.sqrt(1 / 12 / 100_000)


def test_mixing_is_splitmix64_and_can_be_undone() -> None:
    """The first outputs of SplitMix64 from state 0, as in java.util.SplittableRandom's reference."""
    states = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mixed(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
