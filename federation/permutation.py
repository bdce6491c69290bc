"""A keyed permutation of 0 .. n-1 in closed form: the image of a position without a table of all.

A Feistel network over pairs of digits in base ceil(sqrt(n)), so that it permutes 0 .. base^2-1, and cycle walking:
what falls outside is permuted again until it falls inside (Black and Rogaway, "Ciphers with arbitrary finite
domains", CT-RSA 2002). Fewer than 2 sqrt(n) + 1 numbers lie outside, so walking is rare.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
import numpy.typing as npt

from federation.splitmix import mixed
from federation.streams import Streams

ROUNDS = 8
"""Four make a random permutation in theory (Luby and Rackoff, 1988), of large domains; small ones need more, as the
eight of NIST's FF3."""


def permuted(positions: npt.NDArray[np.int64], count: int, streams: Streams) -> npt.NDArray[np.int64]:
    """The images of `positions` under the permutation of 0 .. count-1 that `streams` names.

    Shapes: positions (K,), each below `count`, result (K,). Costs O(K), whatever the count.
    """
    base = np.uint64(isqrt(max(count, 1) - 1) + 1)
    words = streams.bits("permutation", np.arange(ROUNDS), 2).astype(np.uint64)
    keys = words[:, 0] | words[:, 1] << np.uint64(32)
    images = _feistel(positions.astype(np.uint64), base, keys)
    while len(outside := np.flatnonzero(images >= count)):
        images[outside] = _feistel(images[outside], base, keys)
    return images.astype(np.int64)


def _feistel(numbers: npt.NDArray[np.uint64], base: np.uint64, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A permutation of 0 .. base**2 - 1: each round adds a function of one digit to the other."""
    left, right = np.divmod(numbers, base)
    for key in keys:
        word = mixed(right + key) >> np.uint64(32)
        left, right = right, (left + (word * base >> np.uint64(32))) % base
    return left * base + right
