"""Rice coding of ascending positions: each gap as a unary quotient and `parameter` raw remainder bits.

Rice and Plaunt (1971); close to the entropy when positions are scattered evenly. Remainders and quotients lie
in two bit strings (as in Elias-Fano), so that both directions are array operations:

| bytes | field |
|---|---|
| ceil(count * parameter / 8) | remainders, `parameter` bits each, low bit first |
| as many as it takes | quotients in unary: q zeros and a one; the last byte is padded with zeros |
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from federation.cursor import Cursor, pack_bits
from federation.errors import CodecError

MAX_PARAMETER = 31

Positions = npt.NDArray[np.int64]


def encode(positions: Positions) -> tuple[int, bytes]:
    """The parameter that codes positions (count,), strictly ascending, in the fewest bits, and the bytes."""
    gaps = np.diff(positions, prepend=-1) - 1
    parameter = _best_parameter(gaps)
    remainders = (gaps[:, None] >> np.arange(parameter)) & 1
    quotients = gaps >> parameter
    unary = np.zeros(len(gaps) + int(quotients.sum()), dtype=bool)
    unary[np.cumsum(quotients + 1) - 1] = True
    return parameter, pack_bits(remainders.astype(bool)) + pack_bits(unary)


def decode(cursor: Cursor, count: int, universe: int, parameter: int) -> Positions:
    """`count` positions below `universe`: (count,), strictly ascending.

    Looks at no more bits than `count` positions in this universe can take.

    Raises CodecError if the bytes end early, a padding bit is set, or a position is outside the universe.
    """
    if count > universe or parameter > MAX_PARAMETER:
        raise CodecError(
            f"there are at most {universe} positions and a Rice parameter is at most {MAX_PARAMETER}, "
            f"got {count} and {parameter}; the payload is damaged or hostile"
        )
    remainders = cursor.bits(count * parameter, "remainders of positions").reshape(count, parameter)
    quotients = cursor.unary(count, (universe - count) >> parameter, "quotients of positions")
    gaps = (quotients << parameter) + (remainders.astype(np.int64) << np.arange(parameter)).sum(1)
    positions = np.cumsum(gaps + 1) - 1
    if count and positions[-1] >= universe:
        raise CodecError(f"positions are below {universe}, got {positions[-1]}; the payload is damaged or hostile")
    return positions


def _best_parameter(gaps: Positions) -> int:
    """The parameter with the fewest bits among the three around log2 of the mean gap."""
    if len(gaps) == 0:
        return 0
    guess = int(math.log2(gaps.mean() + 1))
    candidates = range(max(0, guess - 1), min(MAX_PARAMETER, guess + 1) + 1)
    return min(candidates, key=lambda parameter: len(gaps) * parameter + int((gaps >> parameter).sum()))
