"""Philox against the vectors its authors publish; streams against the laws of addressing."""

import numpy as np
import pytest

from federation.streams import Streams, philox

# Known-answer vectors of Random123 (philox4x32-10): counter, key, result.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_gives_the_published_words(counter, key, expected):
    words = philox(tuple(np.array([c], dtype=np.uint64) for c in counter), key)
    assert words[0].tolist() == list(expected)


def test_a_users_numbers_do_not_depend_on_who_else_is_asked():
    streams = Streams(3).at("round", 5)
    together = streams.uniform("mask", np.array([4, 10**12, 7]), (6,))
    alone = streams.uniform("mask", np.array([10**12]), (6,))
    assert together[1].equal(alone[0])


def test_more_numbers_extend_fewer():
    users = np.arange(5)
    assert (Streams(0).bits("a", users, 11)[:, :6] == Streams(0).bits("a", users, 6)).all()


@pytest.mark.parametrize(
    "other", [Streams(4).at("round", 5), Streams(3).at("round", 6), Streams(3).at("round"), Streams(3).at("round5")]
)
def test_another_address_gives_other_numbers(other):
    users = np.arange(3)
    assert not Streams(3).at("round", 5).uniform("mask", users, (4,)).equal(other.uniform("mask", users, (4,)))


def test_uniform_is_open_and_uniform():
    u = Streams(1).uniform("u", np.arange(1000), (100,))
    assert u.min() > 0
    assert u.max() < 1
    expected = 100_000 / 20
    counts = u.histc(20, 0, 1)
    assert ((counts - expected).square() / expected).sum() < 50  # chi-square, 19 degrees of freedom, p < 1e-4


def test_normal_has_mean_zero_and_variance_one():
    z = Streams(1).normal("z", np.arange(1000), (100,))
    assert abs(z.mean()) < 4 / 100_000**0.5
    assert abs(z.square().mean() - 1) < 4 * (2 / 100_000) ** 0.5


def test_integers_stay_below_each_users_bound_and_reach_it():
    high = np.array([1, 2, 7])
    values = Streams(2).integers("i", np.arange(3), high, 500)
    assert values.max(1).tolist() == [0, 1, 6]
    assert values.min() == 0


def test_words_at_far_places_are_those_of_the_stream():
    users, places = np.array([3, 10**12]), np.array([[5, 0], [2, 2]])
    whole = Streams(4).bits("w", users, 24).reshape(2, 6, 4)
    assert (Streams(4).words("w", users, places) == whole[[[0], [1]], places]).all()
    assert (Streams(4).words("w", users, places + 10**9)[:, 0] != whole[[0, 1], places[:, 0]]).any(1).all()


@pytest.mark.parametrize(("high", "count"), [(1, 1), (7, 3), (7, 7), (10**9, 40)])
def test_distinct_integers_are_the_first_of_a_shuffled_list(high, count):
    """The twin swaps the places of a list (a dict, of those that have moved)."""
    users = np.array([2, 9, 10**10])
    words, drawn = Streams(5).bits("d", users, count), Streams(5).distinct("d", users, high, count)
    for u in range(len(users)):
        lies: dict[int, int] = {}
        for step in range(count):
            other = step + (int(words[u, step]) * (high - step) >> 32)
            lies[step], lies[other] = lies.get(other, other), lies.get(step, step)
        assert drawn[u].tolist() == [lies[step] for step in range(count)]
        assert len(set(drawn[u].tolist())) == count


def test_all_ordered_choices_of_distinct_integers_are_as_likely():
    drawn = Streams(6).distinct("d", np.arange(24_000), 4, 3)
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 1000) ** 2 / 1000).sum() < 60  # chi-square, 23 degrees of freedom, p < 1e-4


def test_the_largest_word_is_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """(2^24 - 1/2) / 2^24 is 1 in float32, and a unit that must be chosen needs a number below it."""
    words = np.array([[0, 2**32 - 1]], dtype=np.uint32)
    monkeypatch.setattr(Streams, "bits", lambda self, purpose, user_ids, count: words)
    found = Streams(0).uniform("any", np.array([1]), (2,))[0]
    assert 0 < found[0] < found[1] < 1
