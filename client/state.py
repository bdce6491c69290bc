"""What persists for a user, and its record of fixed size.

A record is a key and a value; the crc covers both, so a value found under another user's key is refused too.

    part   bytes    field
    key    8        user id, int64, big-endian (keys sort by user, then round)
           4        round that wrote it, uint32, big-endian
    value  1        format version, 1
           4        visits, int32, little-endian
           B        mask, packed as in `federation/masks.py`
           4 * E    embedding, float32, little-endian
           4        crc32 of the key and of the value before it, uint32, little-endian

A later version may change anything between the version byte and the crc, which stays last.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from federation.errors import StoreError
from federation.streams import UserIds

FORMAT_VERSION = 1
MAX_ROUND = 2**32 - 2
"""The last round that a key can hold, so that the round after it fits too."""

_KEY = np.dtype([("user", ">i8"), ("round", ">u4")])
_CRC_BYTES = 4

Records = npt.NDArray[np.void]


@dataclass(frozen=True)
class UserBlock:
    """The state of U users.

    ids: (U,) int64. embedding_ue: (U, E) float32, private to the user. mask_ub: (U, B) uint8, packed bits.
    visits_u: (U,) int32, how often the user took part.
    """

    ids: UserIds
    embedding_ue: Tensor
    mask_ub: Tensor
    visits_u: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, positions: slice | npt.NDArray[np.int64]) -> UserBlock:
        """Some of the users."""
        index = positions if isinstance(positions, slice) else torch.from_numpy(positions)
        return UserBlock(self.ids[positions], self.embedding_ue[index], self.mask_ub[index], self.visits_u[index])


def join(blocks: Sequence[UserBlock]) -> UserBlock:
    """The users of all blocks, in order. Needs at least one block."""
    return UserBlock(
        np.concatenate([block.ids for block in blocks]),
        torch.cat([block.embedding_ue for block in blocks]),
        torch.cat([block.mask_ub for block in blocks]),
        torch.cat([block.visits_u for block in blocks]),
    )


def user_key(user_id: int, round_index: int) -> bytes:
    """The key of one user's record: 12 bytes."""
    return user_id.to_bytes(8, "big", signed=True) + round_index.to_bytes(4, "big")


@dataclass(frozen=True)
class RecordLayout:
    """The record of users with an embedding of width E = `embedding_width` and a mask of B = `mask_bytes`.

    >>> RecordLayout(embedding_width=16, mask_bytes=12).record_bytes
    85
    """

    embedding_width: int
    mask_bytes: int

    @cached_property
    def _dtype(self) -> np.dtype[np.void]:
        return np.dtype(
            [
                ("key", _KEY),
                ("version", "u1"),
                ("visits", "<i4"),
                ("mask", "u1", (self.mask_bytes,)),
                ("embedding", "<f4", (self.embedding_width,)),
                ("crc", "<u4"),
            ]
        )

    @property
    def key_bytes(self) -> int:
        return _KEY.itemsize

    @property
    def record_bytes(self) -> int:
        """Bytes of a value, without its key."""
        return self._dtype.itemsize - _KEY.itemsize

    def fresh(self, ids: UserIds) -> UserBlock:
        """Users that were never seen: embedding zero, no unit in the mask, no visits."""
        return self._block(ids, np.zeros(len(ids), self._dtype))

    def encode(self, block: UserBlock, round_index: int) -> list[tuple[bytes, bytes]]:
        """U pairs of a key and a value, in the order of the block.

        Raises StoreError when the block is not of this layout, or the round is not one a key can hold.
        """
        self._check(block, round_index)
        rows = np.zeros(len(block), self._dtype)
        rows["key"]["user"] = block.ids
        rows["key"]["round"] = round_index
        rows["version"] = FORMAT_VERSION
        rows["visits"] = block.visits_u.numpy(force=True)
        rows["mask"] = block.mask_ub.numpy(force=True)
        rows["embedding"] = block.embedding_ue.numpy(force=True)
        rows["crc"] = self._checksums(rows.tobytes())
        packed, size, key = rows.tobytes(), self._dtype.itemsize, self.key_bytes
        return [(packed[at : at + key], packed[at + key : at + size]) for at in range(0, len(packed), size)]

    def decode(self, ids: UserIds, records: Sequence[tuple[bytes, bytes] | None], place: str) -> UserBlock:
        """The users of `records`, key and value for each id, or None for a user without one (who is fresh).

        place: where the records were found, for messages.
        Raises StoreError when a record has another length or version, fails its crc, or is another user's.
        """
        rows = np.zeros(len(ids), self._dtype)
        found = np.array([at for at, record in enumerate(records) if record is not None], dtype=np.int64)
        pairs = [record for record in records if record is not None]
        for key, value in pairs:
            if (len(key), len(value)) != (self.key_bytes, self.record_bytes):
                wanted = f"{self.key_bytes} and {self.record_bytes}"
                rule = f"has {len(key)} and {len(value)} bytes of key and value, its layout needs {wanted}"
                raise _refusal(int.from_bytes(key[:8], "big", signed=True), place, rule)
        packed = b"".join([part for pair in pairs for part in pair])
        rows[found] = np.frombuffer(packed, self._dtype)
        self._verify(ids[found], rows[found], packed, place)
        return self._block(ids, rows)

    def _verify(self, ids: UserIds, rows: Records, packed: bytes, place: str) -> None:
        faults = {
            "fails its crc32, so a bit has changed": rows["crc"] != self._checksums(packed),
            f"has a format version other than {FORMAT_VERSION}": rows["version"] != FORMAT_VERSION,
            "belongs to another user": rows["key"]["user"] != ids,
        }
        for rule, bad_u in faults.items():
            if bad_u.any():
                raise _refusal(int(ids[bad_u][0]), place, rule)

    def _checksums(self, packed: bytes) -> npt.NDArray[np.uint32]:
        size, view = self._dtype.itemsize, memoryview(packed)
        ends = range(size - _CRC_BYTES, len(packed), size)
        return np.array([zlib.crc32(view[end + _CRC_BYTES - size : end]) for end in ends], dtype=np.uint32)

    def _block(self, ids: UserIds, rows: Records) -> UserBlock:
        return UserBlock(
            ids,
            torch.from_numpy(rows["embedding"].astype(np.float32)),
            torch.from_numpy(rows["mask"].astype(np.uint8)),
            torch.from_numpy(rows["visits"].astype(np.int32)),
        )

    def _check(self, block: UserBlock, round_index: int) -> None:
        users = len(block)
        tensors: dict[str, tuple[Any, tuple[int, ...], torch.dtype]] = {
            "embedding_ue": (block.embedding_ue, (users, self.embedding_width), torch.float32),
            "mask_ub": (block.mask_ub, (users, self.mask_bytes), torch.uint8),
            "visits_u": (block.visits_u, (users,), torch.int32),
        }
        for name, (tensor, shape, dtype) in tensors.items():
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise StoreError(
                    f"{name} of a block must be {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}; "
                    "was the block made for another gate or pool?"
                )
        if not 0 <= round_index <= MAX_ROUND:
            raise StoreError(f"a record's round must lie in 0..{MAX_ROUND}, got {round_index}; count rounds from 0")


def _refusal(user: int, place: str, rule: str) -> StoreError:
    return StoreError(
        f"the record of user {user} in {place} {rule}; restore the shard from a copy, "
        "read it with the version that wrote it, or remove the shard's folder so that its users start afresh"
    )
