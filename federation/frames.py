"""Many payloads as one: what a node answers for all of its users.

Little endian:

| bytes | field |
|---|---|
| 4 | number of payloads n, uint32 |
| 4 n | length of each payload, uint32 |
| sum of these | the payloads, one after the other |
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise

from federation.errors import CodecError

_NUMBER = struct.Struct("<I")


def join(payloads: Sequence[bytes]) -> bytes:
    """The payloads as one. Raises CodecError where a number does not fit into four bytes."""
    lengths = [len(payload) for payload in payloads]
    if max(len(payloads), *lengths, 0) >= 2**32:
        raise CodecError(
            f"a frame holds less than 2**32 payloads of less than 2**32 bytes, got {len(payloads)} of up to "
            f"{max(lengths)} bytes; send fewer users at a time"
        )
    return b"".join((struct.pack(f"<{len(lengths) + 1}I", len(lengths), *lengths), *payloads))


def split(data: bytes, most: int, max_bytes: int) -> list[bytes]:
    """The payloads that `join` put together: at most `most`, of at most `max_bytes` bytes each.

    Everything that is declared is checked against these limits and the bytes there are, before anything of that size
    is allocated. Raises CodecError; its message holds no number of a single payload.
    """
    if len(data) < _NUMBER.size:
        raise CodecError(f"a frame has at least {_NUMBER.size} bytes, got {len(data)}; it is cut, send it again")
    (count,) = _NUMBER.unpack_from(data)
    if count > most:
        raise CodecError(
            f"a frame holds at most the {most} payloads asked for, got {count}; answer for these users alone"
        )
    start = _NUMBER.size * (1 + count)
    if len(data) < start:
        raise CodecError(
            f"a frame of {count} payloads has at least {start} bytes, got {len(data)}; it is cut, send it again"
        )
    lengths = struct.unpack_from(f"<{count}I", data, _NUMBER.size)
    if max(lengths, default=0) > max_bytes:
        raise CodecError(
            f"a payload has at most {max_bytes} bytes, one of {count} in a frame has more; send fewer rows"
        )
    ends = list(accumulate(lengths, initial=start))
    if ends[-1] != len(data):
        raise CodecError(
            f"a frame ends with its last payload, {ends[-1]} bytes are declared and {len(data)} are there; "
            "it is cut or damaged, send it again"
        )
    return [data[start:stop] for start, stop in pairwise(ends)]
