"""Random numbers addressed by name: the same number for the same (seed, path, purpose, user), whoever asks.

Counter-based (Philox4x32-10; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), computed
for a whole block of users at once. So a result depends neither on the number of workers nor on the order of calls.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

UserIds = npt.NDArray[np.int64]

_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter: tuple[npt.NDArray[np.uint64], ...], key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Philox4x32-10 over arrays of counters.

    Shapes: four counters of one shape (...), each below 2**32, held as uint64; result (..., 4) uint32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _WEYL_0) & 0xFFFFFFFF, (k1 + _WEYL_1) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def below(words: npt.NDArray[np.uint32], high: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Integers in [0, high) from random words, uniform up to a share of high / 2**32; shapes broadcast."""
    return ((words * high) >> _SHIFT).astype(np.int64)


@dataclass(frozen=True)
class Streams:
    """A place in the tree of random streams.

    >>> Streams(7).at("round", 3).uniform("mask", np.array([5, 9]), (2,)).shape
    torch.Size([2, 2])
    """

    seed: int
    path: tuple[str | int, ...] = ()

    def at(self, *path: str | int) -> Streams:
        """The stream below this one, for example `streams.at("round", 12)`."""
        return Streams(self.seed, self.path + path)

    def _key(self, purpose: str) -> tuple[int, int]:
        name = repr((self.seed, self.path, purpose)).encode()
        digest = hashlib.blake2b(name, digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    def words(self, purpose: str, user_ids: UserIds, places_un: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
        """Four random 32-bit words at each place, below 2**32, of each user's stream; places cost alike, near or far.

        Shapes: user_ids (U,), places_un (U, N) or (1, N), result (U, N, 4).
        """
        users = np.asarray(user_ids, dtype=np.int64).astype(np.uint64)[:, None]
        low, high, place = np.broadcast_arrays(users & _LOW, users >> _SHIFT, places_un.astype(np.uint64))
        return philox((place, np.zeros_like(place), low, high), self._key(purpose))

    def bits(self, purpose: str, user_ids: UserIds, count: int) -> npt.NDArray[np.uint32]:
        """`count` random 32-bit words per user. Shapes: user_ids (U,), result (U, count)."""
        places = np.arange(-(-count // 4))[None, :]
        return self.words(purpose, user_ids, places).reshape(len(user_ids), places.shape[1] * 4)[:, :count]

    def uniform(self, purpose: str, user_ids: UserIds, shape: tuple[int, ...]) -> Tensor:
        """Uniform numbers strictly between 0 and 1, on torch's default device, the same on all.

        Shapes: user_ids (U,), result (U, *shape) float32.
        """
        words = self.bits(purpose, user_ids, int(np.prod(shape)))
        values = ((words >> np.uint32(8)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-24)
        below_one = np.minimum(values, np.float32(1 - 2.0**-24))  # the largest word rounds up to 1
        return torch.as_tensor(below_one).view(len(user_ids), *shape)

    def integers(self, purpose: str, user_ids: UserIds, high_u: npt.ArrayLike, count: int) -> npt.NDArray[np.int64]:
        """Integers in [0, high_u). Shapes: user_ids (U,), high_u (U,) or (), result (U, count)."""
        high = np.broadcast_to(np.asarray(high_u, dtype=np.uint64), (len(user_ids),))[:, None]
        return below(self.bits(purpose, user_ids, count), high)

    def distinct(self, purpose: str, user_ids: UserIds, high: int, count: int) -> npt.NDArray[np.int64]:
        """`count` <= `high` different integers in [0, high), in random order. Shapes: user_ids (U,), result (U, count).

        The first steps of a shuffle (Fisher and Yates): step n swaps the places n and n + [0, high - n). What lies at
        a place then is found by going back over the swaps. So drawing few of many costs no more than drawing few.
        """
        assert count <= high, (count, high)
        step_n = np.arange(count)
        swapped_un = step_n + below(self.bits(purpose, user_ids, count), (high - step_n).astype(np.uint64))
        for step in reversed(range(count - 1)):
            later = swapped_un[:, step + 1 :]
            later[later == swapped_un[:, step, None]] = step
        return swapped_un

    def normal(self, purpose: str, user_ids: UserIds, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers (Box-Muller). Shapes: user_ids (U,), result (U, *shape) float32."""
        pair = self.uniform(purpose, user_ids, (2, int(np.prod(shape))))
        radius, angle = torch.sqrt(-2.0 * torch.log(pair[:, 0])), 2.0 * torch.pi * pair[:, 1]
        return (radius * torch.cos(angle)).view(len(user_ids), *shape)

    def generator(self, purpose: str) -> torch.Generator:
        """A torch generator on the CPU, for values that belong to no user (initialisation)."""
        low, high = self._key(purpose)
        return torch.Generator().manual_seed(low | (high & 0x7FFFFFFF) << 32)
