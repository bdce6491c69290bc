"""What persists for a user, and its records of fixed size.

A user's history is one key and one value: the records of the rounds that are still needed, oldest first. Every
record ends in a crc, which covers the key too, so a history found under another user's key is refused.

    part     bytes    field
    key      8        user id, int64, big-endian
    record   1        format version, 2
             4        round that wrote it, uint32, little-endian
             4        visits, int32, little-endian
             B        mask, packed as in `federation/masks.py`
             4 * E    embedding, float32, little-endian
             4        crc32 of the key and of the record before it, uint32, little-endian

A later version may change anything between the version byte and the crc, which stays last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from federation.errors import StoreError
from federation.streams import UserIds

FORMAT_VERSION = 2
MAX_ROUND = 2**32 - 1

KEY_BYTES = 8
_CRC_BYTES = 4

Records = npt.NDArray[np.void]
Positions = npt.NDArray[np.int64]


class RecordFault(Exception):
    """Stored bytes are not records of the user they stand under: the message says of whom, and what is wrong."""


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

    def take(self, positions: slice | Positions) -> UserBlock:
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


def user_keys(ids: UserIds) -> list[bytes]:
    """The key of each user's history. As bytes, keys sort as the ids do when read as unsigned."""
    keys: list[bytes] = ids.astype(">i8").view(f"V{KEY_BYTES}").tolist()
    return keys


@dataclass(frozen=True)
class Histories:
    """The records of U users: row r is of the user at position user_r[r]; by user, then by round.

    Shapes: user_r (R,) int64 ascending, rows (R,) records.
    """

    user_r: Positions
    rows: Records

    def newest(self, before_round: int) -> tuple[Positions, Records]:
        """The position of each user with a record of a round before `before_round`, and its newest such record."""
        earlier_r = self.rows["round"] < before_round
        user_r, rows = self.user_r[earlier_r], self.rows[earlier_r]
        last_r = np.append(user_r[1:] != user_r[:-1], True)[: len(user_r)]
        return user_r[last_r], rows[last_r]

    def without_superseded(self, durable_round: int) -> Histories:
        """Without the records that are older than their user's newest one of a round up to `durable_round`."""
        superseded_r = np.zeros(len(self.rows), bool)
        same_user_r = self.user_r[1:] == self.user_r[:-1]
        superseded_r[:-1] = same_user_r & (self.rows["round"][1:] <= durable_round)
        return self._where(~superseded_r)

    def of(self, positions: Positions) -> Histories:
        """The records of some of the users, who stand at 0, 1, .. in the result. positions: ascending."""
        chosen = self._where(np.isin(self.user_r, positions))
        return Histories(np.searchsorted(positions, chosen.user_r), chosen.rows)

    def until(self, round_index: int) -> Histories:
        """Without the records of rounds after `round_index`."""
        return self._where(self.rows["round"] <= round_index)

    def with_round(self, rows: Records) -> Histories:
        """With one record of one round for each of the U users, in place of what they had of that round.

        Shapes: rows (U,), all of one round.
        """
        kept = self._where(~np.isin(self.rows["round"], rows["round"]))
        user_r = np.concatenate((kept.user_r, np.arange(len(rows))))
        joined = np.concatenate((kept.rows, rows))
        order = np.lexsort((joined["round"], user_r))
        return Histories(user_r[order], joined[order])

    def packed(self, users: int) -> list[bytes]:
        """The value of each of the U users: empty for one without records."""
        size, whole = self.rows.dtype.itemsize, self.rows.tobytes()
        ends_u = np.cumsum(np.bincount(self.user_r, minlength=users)) * size
        return [whole[start:end] for start, end in pairwise([0, *ends_u.tolist()])]

    def _where(self, kept_r: npt.NDArray[np.bool_]) -> Histories:
        return self if kept_r.all() else Histories(self.user_r[kept_r], self.rows[kept_r])


@dataclass(frozen=True)
class RecordLayout:
    """The record of users with an embedding of width E = `embedding_width` and a mask of B = `mask_bytes`.

    >>> RecordLayout(embedding_width=16, mask_bytes=12).record_bytes
    89
    """

    embedding_width: int
    mask_bytes: int

    @cached_property
    def _dtype(self) -> np.dtype[np.void]:
        return np.dtype(
            [
                ("version", "u1"),
                ("round", "<u4"),
                ("visits", "<i4"),
                ("mask", "u1", (self.mask_bytes,)),
                ("embedding", "<f4", (self.embedding_width,)),
                ("crc", "<u4"),
            ]
        )

    @property
    def record_bytes(self) -> int:
        """Bytes of one record, without the key."""
        return self._dtype.itemsize

    def fresh(self, ids: UserIds) -> UserBlock:
        """Users that were never seen: embedding zero, no unit in the mask, no visits."""
        return self._block(ids, np.zeros(len(ids), self._dtype))

    def encode(self, block: UserBlock, round_index: int) -> Records:
        """(U,) records of one round, in the order of the block.

        Raises StoreError when the block is not of this layout, or the round is not one a record can hold.
        """
        self._check(block, round_index)
        rows = np.zeros(len(block), self._dtype)
        rows["version"] = FORMAT_VERSION
        rows["round"] = round_index
        rows["visits"] = block.visits_u.numpy(force=True)
        rows["mask"] = block.mask_ub.numpy(force=True)
        rows["embedding"] = block.embedding_ue.numpy(force=True)
        rows["crc"] = _checksums(user_keys(block.ids), rows)
        return rows

    def decode(self, ids: UserIds, newest: tuple[Positions, Records]) -> UserBlock:
        """The users of those records; fresh ones at the other positions."""
        positions, found = newest
        rows = np.zeros(len(ids), self._dtype)
        rows[positions] = found
        return self._block(ids, rows)

    def unpack(self, ids: UserIds, positions: Positions, values: Sequence[bytes]) -> Histories:
        """The records of U users from the values of those at `positions`, ascending; none for the others.

        Raises RecordFault when a value is no number of whole records, or a record fails its crc or has another version.
        """
        size = self._dtype.itemsize
        count_v, odd_v = np.divmod(np.fromiter(map(len, values), np.int64, len(values)), size)
        if (wrong := (odd_v != 0) | (count_v == 0)).any():
            length = len(values[int(wrong.argmax())])
            raise RecordFault(
                f"the history of user {ids[positions[wrong]][0]} has {length} bytes, its records have {size} each"
            )
        user_r = np.repeat(positions, count_v)
        rows = np.frombuffer(b"".join(values), self._dtype)
        self._verify(ids[user_r], rows)
        return Histories(user_r, rows)

    def _verify(self, ids_r: UserIds, rows: Records) -> None:
        faults = {
            "fails its crc32, so a bit has changed": rows["crc"] != _checksums(user_keys(ids_r), rows),
            f"has a format version other than {FORMAT_VERSION}": rows["version"] != FORMAT_VERSION,
        }
        for rule, bad_r in faults.items():
            if bad_r.any():
                raise RecordFault(f"a record of user {ids_r[bad_r][0]} {rule}")

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


def _checksums(keys_r: list[bytes], rows: Records) -> npt.NDArray[np.uint32]:
    """The crc that each record should end in. Mapped in C, 0.16 us a record; tables in numpy are no faster."""
    size = rows.dtype.itemsize
    bodies = np.ndarray(len(rows), f"V{size - _CRC_BYTES}", np.ascontiguousarray(rows), strides=(size,))
    return np.fromiter(map(crc32, bodies.tolist(), map(crc32, keys_r)), np.uint32, len(rows))
