"""Rice coding against a bit-by-bit twin, the entropy of the positions, and hostile bytes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation import rice
from federation.cursor import Cursor
from federation.errors import CodecError

position_sets = st.sets(st.integers(0, 5_000), max_size=60).map(lambda values: np.array(sorted(values), dtype=np.int64))


def slow_bytes(positions: np.ndarray, parameter: int) -> bytes:
    """The same layout, one bit after the other."""
    remainders, unary, last = "", "", -1
    for position in positions.tolist():
        quotient, remainder = divmod(position - last - 1, 2**parameter)
        remainders += "".join(str(remainder >> bit & 1) for bit in range(parameter))
        unary += "0" * quotient + "1"
        last = position
    return b"".join(int(bits[::-1] or "0", 2).to_bytes(-(-len(bits) // 8), "little") for bits in (remainders, unary))


@given(position_sets)
def test_bytes_equal_the_slow_twin_and_decode(positions: np.ndarray) -> None:
    parameter, coded = rice.encode(positions)
    assert coded == slow_bytes(positions, parameter)
    cursor = Cursor(coded)
    assert np.array_equal(rice.decode(cursor, len(positions), 5_001, parameter), positions)
    cursor.end()


@pytest.mark.parametrize("share", [0.02, 0.05, 0.2])
def test_scattered_positions_cost_within_four_percent_of_their_entropy(share: float) -> None:
    kept = np.random.default_rng(1).random(40_000) < share
    _, coded = rice.encode(np.flatnonzero(kept))
    entropy_bits = -40_000 * (share * math.log2(share) + (1 - share) * math.log2(1 - share))
    assert 8 * len(coded) < 1.04 * entropy_bits


@pytest.mark.parametrize("share", [0.005, 0.01, 0.02, 0.03, 0.05, 0.06, 0.12, 0.2, 0.4])
def test_the_chosen_parameter_is_the_best_for_scattered_positions(share: float) -> None:
    positions = np.flatnonzero(np.random.default_rng(2).random(100_000) < share)
    gaps = np.diff(positions, prepend=-1) - 1
    bits = [len(gaps) * (parameter + 1) + int((gaps >> parameter).sum()) for parameter in range(32)]
    chosen, _ = rice.encode(positions)
    assert bits[chosen] == min(bits)


@given(st.binary(max_size=40), st.integers(0, 100), st.integers(0, 80), st.integers(0, 254))
def test_any_bytes_decode_to_positions_or_raise_codec_error(
    data: bytes, count: int, universe: int, parameter: int
) -> None:
    try:
        positions = rice.decode(Cursor(data), count, universe, parameter)
    except CodecError:
        return
    assert len(positions) == count
    assert (np.diff(positions) > 0).all()
    assert count == 0 or (positions[0] >= 0 and positions[-1] < universe)


def test_a_parameter_that_would_overflow_is_refused() -> None:
    with pytest.raises(CodecError, match="at most 31"):
        rice.decode(Cursor(b"\xff" * 8 + b"\x01"), 1, 50, 64)


def test_cut_and_overlong_bytes_are_refused() -> None:
    parameter, coded = rice.encode(np.array([3, 90, 700]))
    for size in range(len(coded)):
        with pytest.raises(CodecError):
            rice.decode(Cursor(coded[:size]), 3, 701, parameter)
    with pytest.raises(CodecError, match="below 700, got 700"):
        rice.decode(Cursor(coded), 3, 700, parameter)
    with pytest.raises(CodecError, match="padding"):
        rice.decode(Cursor(coded[:-1] + bytes([coded[-1] | 0x80])), 3, 701, parameter)
