"""Instructions: what no server sends is refused before anything is done with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from federation.errors import ExchangeError
from federation.exchange import MOST_ROUNDS, Instructions

GOOD: dict[str, Any] = {
    "federation": "fed", "round_index": 3, "attempt": 1, "version": "r2-00ff", "split": "train",
    "positions": (0, 4), "durable_round": 1, "task": "{}",
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{}, {"positions": ()}, {"round_index": 0, "durable_round": 0}, {"durable_round": 3}, {"attempt": 10**6},
     {"round_index": 2**32 - 1, "durable_round": 2**32 - 1}, {"federation": "a" * 64}],
)  # fmt: skip
def test_what_a_server_sends_is_taken(change: dict[str, Any]) -> None:
    asked = Instructions(**{**GOOD, **change})
    assert {name: getattr(asked, name) for name in GOOD} == {**GOOD, **change}


@pytest.mark.parametrize(
    "change",
    [{"round_index": 2**32}, {"round_index": 2**40, "durable_round": 2**40 - 1}, {"round_index": -1},
     {"durable_round": -1}, {"durable_round": 4}, {"attempt": 0}],
)  # fmt: skip
def test_rounds_that_a_store_cannot_keep_are_refused(change: dict[str, Any]) -> None:
    """A user store that was compacted to such a round could never be written again."""
    ((_, value),) = list(change.items())[-1:]
    with pytest.raises(ExchangeError, match=rf"rounds count from 0 to {2**32 - 1}.* {value}.*; is the server of this"):
        Instructions(**{**GOOD, **change})
    assert MOST_ROUNDS == 2**32 - 1


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("value", [None, 1.0, True, b"fed", [0, 4], np.int64(1)])
def test_a_field_of_another_type_is_refused(name: str, value: object) -> None:
    with pytest.raises(
        ExchangeError, match=rf"instructions' {name} are made of \w+, got {type(value).__name__} .*server"
    ):
        Instructions(**{**GOOD, name: value})


@pytest.mark.parametrize("position", [0.0, "0", None, True, np.int64(0)])
def test_positions_are_whole_numbers(position: object) -> None:
    with pytest.raises(ExchangeError, match=rf"positions are made of int, got {type(position).__name__}"):
        Instructions(**{**GOOD, "positions": (position, 4)})


@pytest.mark.parametrize("positions", [(-1,), (0, 0), (4, 3)])
def test_positions_ascend(positions: tuple[int, ...]) -> None:
    with pytest.raises(ExchangeError, match="positions ascend from 0"):
        Instructions(**{**GOOD, "positions": positions})


@pytest.mark.parametrize("federation", ["", "..", "a/b", "A", "a" * 65, "-a", "fed\n"])
def test_only_ids_name_folders(federation: str) -> None:
    with pytest.raises(ExchangeError, match=r"a federation's id matches .*give it another"):
        Instructions(**{**GOOD, "federation": federation})
