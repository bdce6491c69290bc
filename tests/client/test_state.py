"""Users' records against bytes packed by hand, and against every single flipped bit."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.state import MAX_ROUND, RecordLayout, UserBlock, join
from federation.errors import StoreError

LAYOUT = RecordLayout(embedding_width=3, mask_bytes=2)
ONE = UserBlock(
    np.array([-5]),
    torch.tensor([[1.5, -2.0, float("inf")]]),
    torch.tensor([[0x81, 0x40]], dtype=torch.uint8),
    torch.tensor([7], dtype=torch.int32),
)


def block_of(ids: list[int], seed: int = 0) -> UserBlock:
    generator = torch.Generator().manual_seed(seed)
    users = len(ids)
    return UserBlock(
        np.array(ids, dtype=np.int64),
        torch.randn(users, 3, generator=generator),
        torch.randint(0, 256, (users, 2), generator=generator, dtype=torch.uint8),
        torch.randint(0, 2**31 - 1, (users,), generator=generator, dtype=torch.int32),
    )


def assert_equal(a: UserBlock, b: UserBlock) -> None:
    assert a.ids.tolist() == b.ids.tolist()
    for left, right in ((a.embedding_ue, b.embedding_ue), (a.mask_ub, b.mask_ub), (a.visits_u, b.visits_u)):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


def by_hand(version: int = 1) -> tuple[bytes, bytes]:
    """ONE at round 258, from the byte table."""
    key = struct.pack(">qI", -5, 258)
    value = struct.pack("<Bi2B3f", version, 7, 0x81, 0x40, 1.5, -2.0, float("inf"))
    return key, value + struct.pack("<I", zlib.crc32(key + value))


def test_the_bytes_are_those_of_the_table() -> None:
    assert LAYOUT.encode(ONE, 258) == [by_hand()]
    assert LAYOUT.record_bytes == len(by_hand()[1])
    assert_equal(LAYOUT.decode(ONE.ids, [by_hand()], "here"), ONE)


@given(ids=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=8), round_index=st.integers(0, MAX_ROUND))
def test_decode_undoes_encode(ids: list[int], round_index: int) -> None:
    block = block_of(ids)
    assert_equal(LAYOUT.decode(block.ids, LAYOUT.encode(block, round_index), "here"), block)


def test_users_without_a_record_are_fresh() -> None:
    block = block_of([4, 9])
    first, second = LAYOUT.encode(block, 0)
    mixed = LAYOUT.decode(np.array([4, 8, 9]), [first, None, second], "here")
    assert_equal(mixed.take(np.array([0, 2])), block)
    assert_equal(mixed.take(slice(1, 2)), LAYOUT.fresh(np.array([8])))
    fresh = LAYOUT.fresh(np.array([8]))
    assert not fresh.embedding_ue.any()
    assert not fresh.mask_ub.any()
    assert not fresh.visits_u.any()


def test_join_and_take_are_inverse() -> None:
    block = block_of([4, 9, 1, 7, 3])
    assert_equal(join([block.take(slice(0, 2)), block.take(slice(2, 2)), block.take(slice(2, 5))]), block)


def test_every_flipped_bit_is_refused() -> None:
    for bit in range(8 * (LAYOUT.key_bytes + LAYOUT.record_bytes)):
        packed = bytearray(b"".join(by_hand()))
        packed[bit // 8] ^= 1 << bit % 8
        pair = bytes(packed[: LAYOUT.key_bytes]), bytes(packed[LAYOUT.key_bytes :])
        with pytest.raises(StoreError, match=r"user -5 in shard 3 fails its crc32.*restore"):
            LAYOUT.decode(ONE.ids, [pair], "shard 3")


@pytest.mark.parametrize("change", [-1, 1])
def test_another_length_is_refused(change: int) -> None:
    key, value = by_hand()
    for pair in ((key, (value + b"\0")[: len(value) + change]), ((key + b"\0")[: len(key) + change], value)):
        message = f"user -5 in shard 3 has {len(pair[0])} and {len(pair[1])} bytes.*needs 12 and {len(value)}"
        with pytest.raises(StoreError, match=message):
            LAYOUT.decode(ONE.ids, [pair], "shard 3")


def test_another_version_or_user_is_refused_though_its_crc_is_right() -> None:
    with pytest.raises(StoreError, match=r"user -5 .* format version other than 1"):
        LAYOUT.decode(ONE.ids, [by_hand(version=2)], "shard 3")
    with pytest.raises(StoreError, match=r"user 6 .* belongs to another user"):
        LAYOUT.decode(np.array([6]), [by_hand()], "shard 3")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("embedding_ue", torch.zeros(1, 4)),
        ("embedding_ue", torch.zeros(1, 3, dtype=torch.float64)),
        ("mask_ub", torch.zeros(1, 1, dtype=torch.uint8)),
        ("visits_u", torch.zeros(1, dtype=torch.int64)),
    ],
)
def test_a_block_of_another_layout_is_refused(field: str, value: torch.Tensor) -> None:
    with pytest.raises(StoreError, match=f"{field}.*another gate or pool"):
        LAYOUT.encode(replace(ONE, **{field: value}), 0)


@pytest.mark.parametrize("round_index", [-1, MAX_ROUND + 1])
def test_a_round_that_no_key_holds_is_refused(round_index: int) -> None:
    with pytest.raises(StoreError, match="round must lie in"):
        LAYOUT.encode(ONE, round_index)
