"""Frames: what is joined comes apart as it was, and no declared number is believed."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation import frames
from federation.errors import CodecError

PAYLOADS = [b"first", b"", b"the third one"]
MOST, MAX_BYTES = 3, 13


@given(st.lists(st.binary(max_size=40), max_size=12))
def test_what_is_joined_comes_apart_as_it_was(payloads: list[bytes]) -> None:
    assert frames.split(frames.join(payloads), most=12, max_bytes=40) == payloads


def test_the_bytes_follow_the_table() -> None:
    assert frames.join(PAYLOADS) == struct.pack("<4I", 3, 5, 0, 13) + b"firstthe third one"
    assert frames.join([]) == bytes(4)


def test_the_limits_themselves_are_allowed() -> None:
    assert frames.split(frames.join(PAYLOADS), MOST, MAX_BYTES) == PAYLOADS
    assert frames.split(frames.join([]), 0, 0) == []


FAULTS = {
    "nothing": (b"", ["at least 4 bytes", "got 0", "send it again"]),
    "more than asked for": (frames.join([*PAYLOADS, b""]), ["at most the 3 payloads", "got 4", "these users alone"]),
    "lengths cut": (frames.join(PAYLOADS)[:15], ["a frame of 3 payloads", "at least 16 bytes", "got 15", "cut"]),
    "a long payload": (frames.join([b"", bytes(14)]), ["at most 13 bytes", "one of 2 in a frame", "send fewer rows"]),
    "payloads cut": (frames.join(PAYLOADS)[:-1], ["34 bytes are declared and 33 are there", "send it again"]),
    "bytes behind": (frames.join(PAYLOADS) + b"\0", ["34 bytes are declared and 35 are there", "send it again"]),
}


@pytest.mark.parametrize(("data", "words"), FAULTS.values(), ids=FAULTS)
def test_faults_are_named(data: bytes, words: Sequence[str]) -> None:
    with pytest.raises(CodecError) as caught:
        frames.split(data, MOST, MAX_BYTES)
    assert all(word in str(caught.value) for word in words)


def test_four_billion_payloads_or_bytes_allocate_nothing() -> None:
    largest = 2**32 - 1
    bombs = [
        struct.pack("<I", largest),
        struct.pack("<2I", 1, largest),
        struct.pack("<I1000I", 1000, *[largest] * 1000),
    ]
    for bomb in bombs:
        tracemalloc.start()
        try:
            with pytest.raises(CodecError):
                frames.split(bomb, most=largest, max_bytes=largest)
            assert tracemalloc.get_traced_memory()[1] < 200_000
        finally:
            tracemalloc.stop()


class Endless(bytes):
    """Says that it is longer than a frame can hold."""

    def __len__(self) -> int:
        return 2**32


def test_what_does_not_fit_into_four_bytes_is_not_joined() -> None:
    with pytest.raises(CodecError, match=r"less than 2\*\*32 bytes, got 2 of up to 4294967296 bytes; send fewer users"):
        frames.join([b"", Endless()])
