"""Who rests after how many silences."""

from __future__ import annotations

import logging

import pytest

from server.live.patience import Patience


def rests(patience: Patience, rounds: int, node: int = 7) -> list[int]:
    """The rounds of a node that is silent whenever it is asked, in which it is not asked."""
    left_out = []
    for round_index in range(1, rounds + 1):
        if node in patience.resting(round_index):
            left_out.append(round_index)
        else:
            patience.note(round_index, [node], [node])
    return left_out


def test_rests_grow_as_powers_of_two_up_to_the_longest() -> None:
    assert rests(Patience(100), 20) == [3, 5, 6, 8, 9, 10, 11, *range(13, 21)]
    assert rests(Patience(2), 13) == [3, 5, 6, 8, 9, 11, 12]


def test_one_silence_is_tolerated_and_an_answer_ends_the_count() -> None:
    patience = Patience(10)
    for round_index in range(1, 9):
        patience.note(round_index, [7, 8], [7] if round_index % 2 else [])
        assert not patience.resting(round_index + 1)


def test_an_answer_ends_a_rest() -> None:
    """A node is asked though it rests where too few others are left."""
    patience = Patience(10)
    for round_index in (1, 2, 3, 4):
        patience.note(round_index, [7], [7])
    assert patience.resting(5) == {7}
    patience.note(5, [7], [])
    assert patience.resting(6) == set()


def test_tries_of_one_round_count_each() -> None:
    patience = Patience(10)
    patience.note(4, [7, 8], [7])
    patience.note(4, [7, 8], [7])
    assert [patience.resting(number) for number in (4, 5, 6)] == [{7}, {7}, set()]


def test_whoever_is_not_asked_is_neither_silent_nor_forgiven(caplog: pytest.LogCaptureFixture) -> None:
    patience = Patience(10)
    with caplog.at_level(logging.WARNING):
        patience.note(1, [7], [7])
        patience.note(2, [8], [])
        patience.note(3, [7], [7])
    assert patience.resting(4) == {7}
    assert caplog.text.count("node 7 was silent 2 times in a row, it rests until round 4") == 1
