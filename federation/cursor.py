"""Reading bytes that may be cut, damaged or hostile: every step is checked, nothing is allocated on trust."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from federation.errors import CodecError

Bits = npt.NDArray[np.bool_]


def pack_bits(bits: Bits) -> bytes:
    """Bits as bytes, low bit first, the last byte padded with zeros."""
    return np.packbits(bits, bitorder="little").tobytes()


class Cursor:
    """A place in a payload. Every method reads what comes next and moves on, or raises CodecError.

    `what` names the field in the error.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._rest = memoryview(data)

    def take(self, size: int, what: str) -> memoryview:
        """`size` bytes, not copied."""
        if size > len(self._rest):
            raise CodecError(
                f"{what}: {size} bytes are needed, {len(self._rest)} are left; the payload is cut or damaged"
            )
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def fields(self, layout: struct.Struct, what: str) -> tuple[Any, ...]:
        """The fields of a struct."""
        return layout.unpack(self.take(layout.size, what))

    def byte(self, what: str) -> int:
        """One byte."""
        return self.take(1, what)[0]

    def numbers(self, dtype: str, count: int, what: str) -> Tensor:
        """A copy of `count` numbers, in the machine's byte order."""
        found = np.frombuffer(self.take(count * np.dtype(dtype).itemsize, what), dtype=dtype)
        return torch.from_numpy(found.astype(found.dtype.newbyteorder("=")))

    def bits(self, count: int, what: str) -> Bits:
        """What `pack_bits` made of `count` bits."""
        bits = _unpacked(self.take(-(-count // 8), what))
        _refuse_padding(bits[count:], what)
        return bits[:count]

    def unary(self, count: int, total: int, what: str) -> npt.NDArray[np.int64]:
        """`count` numbers with a sum of at most `total`, packed as that many zeros and a one each."""
        bits = _unpacked(self._rest[: -(-(count + total) // 8)])
        ends = np.flatnonzero(bits)[:count]
        if len(ends) < count:
            raise CodecError(f"{what}: {count} numbers are needed, {len(ends)} are left; the payload is cut or damaged")
        used_bits = int(ends[-1]) + 1 if count else 0
        self.bits(used_bits, what)
        return np.diff(ends, prepend=-1) - 1

    def end(self) -> None:
        """Nothing must be left."""
        if len(self._rest):
            raise CodecError(
                f"a payload ends with its last row, {len(self._rest)} bytes are left; is it of this schema?"
            )


def _unpacked(data: memoryview) -> Bits:
    return np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little").view(np.bool_)


def _refuse_padding(padding: Bits, what: str) -> None:
    if padding.any():
        raise CodecError(
            f"{what}: {len(padding)} padding bits must be zero, {int(padding.sum())} are set; is it damaged?"
        )
